"""One student for pictures of three shapes, beside its teacher: docs/aspects.md.

    python tests/benchmarks/scenes_aspects.py --out DIR [--seeds 0 1 2] [--images 384]

Runs configs/scenes_aspects_ladd.toml once, on pictures that the program draws, and for each seed
configs/scenes_aspects_dmd2.toml. Then 384 latents of each shape are compared with real scenes of that shape, in
features of the shipped classifier of latents: of the student at 4 steps, and of its teacher at 25 with guidance. What
is there is not done again. --set KEY=VALUE: another value in the second config, to be tried on a seed not reported.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[2]))

from chain import CONFIGS, run

from distill_core.cli.sample import levels_for, load_student, sampler_of
from distill_core.data.scenes import draw_rows, render
from distill_core.diffusion.schedules import grid_sigmas
from distill_core.evaluation.frechet import Gaussian, frechet_distance
from distill_core.evaluation.samples import evaluation_samples
from distill_core.files import load_tensors, read_json, save_json, save_tensors
from distill_core.models import scenes
from distill_core.models.denoiser import Denoiser, Guided
from distill_core.models.pipelines import ModelConfig, open_source
from distill_core.training.config import load_config

SIZES = {"1:1": (64, 64), "3:2": (96, 64), "2:3": (64, 96)}  # width and height in pixels
PICTURES, DRAWN = 1536, 7  # of each shape to tune on, and their seed
REFERENCE, REFERENCE_SEED = 2160, 2_000_000  # real scenes of each shape, of other numbers
TEACHER_STEPS, STEPS, MOST = 25, 4, 1.2


def latent_shape(size: tuple[int, int]) -> tuple[int, int, int]:
    return scenes.LATENT_SHAPE[0], size[1] // scenes.PIXELS, size[0] // scenes.PIXELS


class Judge:
    """fd of latents to real scenes of their shape, and how many of the words that were asked for they show."""

    def __init__(self, out: Path, images: int) -> None:
        self.images, self.words = images, scenes.combinations()
        self.conds = scenes.encode_text([scenes.caption(row) for row in self.words.tolist()])
        self.empty, (self.net, _) = scenes.encode_text([""]), scenes.load_classifier("latent")
        self.references = {name: self._reference(out, name) for name in SIZES}

    @torch.no_grad()
    def features(self, latents: Tensor) -> Tensor:
        return torch.cat([self.net.features(part) for part in latents.split(128)])

    @torch.no_grad()
    def _reference(self, out: Path, name: str) -> Gaussian:
        """Moments of real scenes of the same words, as the autoencoder shows them."""
        path = out / f"reference-{name.replace(':', 'x')}.safetensors"
        if not path.exists():
            encoder, found = scenes.load_autoencoder().encoder, []
            for part in torch.arange(REFERENCE).split(60):
                rows = draw_rows(REFERENCE_SEED, part.tolist())
                pictures, _ = render(self.words[part % len(self.words)], rows, SIZES[name])
                found.append(encoder(pictures.contiguous(memory_format=torch.channels_last)).contiguous())
            save_tensors(path, Gaussian.of(self.features(torch.cat(found)))._asdict())
        stored, _ = load_tensors(path)
        return Gaussian(stored["mean"], stored["cov"])

    @torch.no_grad()
    def figures(self, name: str, latents: Tensor) -> dict[str, float]:
        features, asked = self.features(latents), self.words[torch.arange(len(latents)) % len(self.words)]
        logits = scenes.by_group(self.net.head(torch.relu(features))).values()
        right = [(part.argmax(1) == words).double().mean() for part, words in zip(logits, asked.T, strict=True)]
        fd = frechet_distance(*Gaussian.of(features), *self.references[name])
        return {"fd": round(fd, 2), "words": round(100 * torch.stack(right).mean().item(), 1)}

    def teacher(self, lora: Path) -> dict[str, dict[str, float]]:
        """Of the tuned model, at guidance, by shape."""
        source = open_source(ModelConfig(path="scenes", loras=(str(lora),)))
        model, grid = (
            Guided(Denoiser(source.backend), self.empty, scenes.GUIDANCE),
            grid_sigmas(source.backend.process, TEACHER_STEPS),
        )
        return {name: self.figures(name, self._sample(model, grid, size, "euler")) for name, size in SIZES.items()}

    def student(self, config: Path, lora: Path) -> dict[str, dict[str, float]]:
        source, student, said = load_student(load_config(config), lora)
        found = {}
        for name, size in SIZES.items():
            grid = levels_for(source.backend, said, latent_shape(size), STEPS)
            found[name] = self.figures(name, self._sample(student, grid, size, **sampler_of(said)))
        return found

    @torch.no_grad()
    def _sample(self, model: Denoiser | Guided, grid: Tensor, size: tuple[int, int], sampler: str, **options) -> Tensor:
        options |= {"count": self.images, "size": 96, "sampler": sampler}
        return evaluation_samples(model, grid, self.conds, latent_shape(size), **options)


def tuned_teacher(out: Path) -> Path:
    """The LoRA of the first stage."""
    config, pictures = CONFIGS / "scenes_aspects_ladd.toml", out / "pictures"
    for width, height in SIZES.values():
        folder = pictures / f"{width}x{height}"
        if not (folder / f"{PICTURES - 1:05d}.txt").exists():
            run("scenes", "--out", folder, "--count", PICTURES, "--seed", DRAWN, "--size", f"{width}x{height}")
    run("cache", config, "--images", pictures, "--out", out / "real")
    run("train", config, "--data", out / "real", "--out", out / "tuned")
    return out / "tuned" / "student.safetensors"


def config_of(seed: int, folder: Path, lora: Path, changes: list[str]) -> Path:
    """The second stage's file with a seed for its data and its training."""
    text = (CONFIGS / "scenes_aspects_dmd2.toml").read_text(encoding="utf-8")
    for section in ("cache", "train"):
        text = text.replace(f"[{section}]\n", f"[{section}]\nseed = {seed}\n")
    text = text.replace('"tuned/student.safetensors"', json.dumps(str(lora)))
    for change in changes:
        key, value = change.split("=", 1)
        text = re.sub(rf"(?m)^{key} = .*$", f"{key} = {value}", text)
    path = folder / "config.toml"
    path.write_text(text, encoding="utf-8")
    return path


def observe(seed: int, out: Path, judge: Judge, lora: Path, changes: list[str]) -> dict[str, dict[str, float]]:
    """The student's figures of a seed, by shape."""
    folder = out / "-".join([f"seed-{seed}", *(re.sub(r"\W+", "_", change) for change in changes)])
    folder.mkdir(parents=True, exist_ok=True)
    report = folder / f"figures-{judge.images}.json"
    if not report.exists():
        began, config = time.process_time(), config_of(seed, folder, lora, changes)
        data = folder / "data"
        run("cache", config, "--out", data)
        run("train", config, "--data", data, "--out", folder)
        figures = judge.student(config, folder / "student.safetensors")
        save_json(report, {**figures, "seconds": round(time.process_time() - began)})
    return {name: read_json(report)[name] for name in SIZES}


def table(teacher: dict[str, dict[str, float]], students: dict[int, dict[str, dict[str, float]]]) -> str:
    """Medians over the seeds with the worst beside."""
    lines = [
        "| shape | teacher, 25 steps: fd | words, % | student, 4 steps: fd, median (worst) | words, % | fd, times the "
        "teacher's: median (worst) | at most 1.2 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, of_teacher in teacher.items():
        fds, words = ([of[name][key] for of in students.values()] for key in ("fd", "words"))
        ratios = [fd / of_teacher["fd"] for fd in fds]
        verdict = "yes" if max(ratios) <= MOST else "median only" if median(ratios) <= MOST else "no"
        lines.append(
            f"| {name} | {of_teacher['fd']:.1f} | {of_teacher['words']:.1f} | {median(fds):.1f} ({max(fds):.1f}) | "
            f"{median(words):.1f} ({min(words):.1f}) | {median(ratios):.2f} ({max(ratios):.2f}) | {verdict} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=384)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", dest="changes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    lora, judge = tuned_teacher(args.out), Judge(args.out, args.images)
    report = args.out / f"teacher-{args.images}.json"
    if not report.exists():
        save_json(report, judge.teacher(lora))
    students = {seed: observe(seed, args.out, judge, lora, args.changes) for seed in args.seeds}
    print(table({name: read_json(report)[name] for name in SIZES}, students))


if __name__ == "__main__":
    main()

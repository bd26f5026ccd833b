"""What preference tuning does to the mini model and to a student of it: docs/dpo.md.

    python tests/benchmarks/dpo.py --out DIR [--seeds 0 1 2] [--images 500]

Each seed runs the chain of configs/mini_dpo.toml and configs/mini_dpo_ladd.toml, about four minutes of one processor.
The classifier of images ranks the pairs; the judge is the classifier of latents, which ranks and trains nothing. What
is there is not done again. --beta, --rate, --steps: other values than the config's, to be tried on a seed that is not
reported.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[2]))

from chain import CONFIGS, run

from distill_core.diffusion.schedules import grid_sigmas
from distill_core.evaluation.metrics import MiniEvaluator
from distill_core.evaluation.samples import evaluation_samples
from distill_core.lora_files import read_lora
from distill_core.models import mini
from distill_core.models.denoiser import Denoiser, Guided
from distill_core.models.lora_stack import frozen_lora
from distill_core.models.mini import mini_backend, mini_conditioning
from distill_core.models.shipped import FeatureClassifier
from distill_core.presets.recipe import student_levels
from distill_core.training.run_folder import RunFolder

WEIGHTS, STEPS, TEACHER_STEPS = (0.5, 1.0), (1, 4), 12
HIGHER = ("judge", "ranker", "accuracy", "accuracy_pixels")  # the others are better when lower


@dataclass(frozen=True)
class Setting:
    """What differs from the ready config; 0 for its own value."""

    beta: float = 0.0
    rate: float = 0.0
    steps: int = 0

    @property
    def name(self) -> str:
        return "".join(f"-{key}{value:g}" for key, value in vars(self).items() if value)

    def put_into(self, text: str) -> str:
        """The config with these values, each in the last line that sets its key: [cache] has steps, too."""
        for key, value in (("beta", self.beta), ("student_lr", self.rate), ("steps", self.steps)):
            if value:
                start, end = [found.span() for found in re.finditer(rf"(?m)^{key} = .*$", text)][-1]
                text = f"{text[:start]}{key} = {value}{text[end:]}"
        return text


class Judges:
    """Figures of latents from the same noises: fd and accuracy in both spaces, and both classifiers' mean
    log-probability of the class that was asked for."""

    def __init__(self, images: int) -> None:
        self.images, (self.conds, self.empty) = images, mini_conditioning()
        self.labels = torch.arange(images) % len(self.conds)
        self.evaluator = MiniEvaluator(repeats=0)
        self.latent, _ = mini.load_classifier("latent")
        self.pixel, _ = mini.load_classifier("pixel")

    def sample(self, model: Denoiser | Guided, sigmas: Tensor, sampler: str) -> Tensor:
        options = {"count": self.images, "size": 100, "sampler": sampler}
        return evaluation_samples(model, sigmas, self.conds, mini.LATENT_SHAPE, **options)

    def teacher(self, lora: Path | None) -> Tensor:
        backend = mini_backend()
        on = frozen_lora(backend, str(lora), "lora") if lora else None
        guided = Guided(Denoiser(backend, on), self.empty, mini.GUIDANCE)
        return self.sample(guided, grid_sigmas(backend.process, TEACHER_STEPS), "euler")

    def student(self, lora: Path, steps: int) -> Tensor:
        backend, (state, said) = mini_backend(), read_lora(lora)
        view = Denoiser(backend, backend.open_lora(state))
        return self.sample(view, student_levels(said["sigmas"], steps), said["sampler"])

    @torch.no_grad()
    def score(self, classifier: FeatureClassifier, space: str, x: Tensor) -> Tensor:
        seen = [mini.classifier_input(space, part) for part in x.split(100)]
        scores = torch.cat([classifier(part) for part in seen]).double().log_softmax(1)
        return scores[torch.arange(len(x)), self.labels]

    def figures(self, latents: Tensor) -> dict[str, float]:
        found = {name: figure.value for name, figure in self.evaluator(latents, self.labels).items()}
        shown = {name: found[name] for name in ("fd", "fd_pixels", "accuracy", "accuracy_pixels")}
        images = self.evaluator.decode(latents)
        shown |= {
            "judge": self.score(self.latent, "latent", latents).mean().item(),
            "ranker": self.score(self.pixel, "pixel", images).mean().item(),
        }
        return {name: round(value, 4) for name, value in shown.items()}


def seeded(name: str, seed: int, folder: Path, setting: Setting = Setting()) -> Path:
    """A ready config with a seed for its data and its training, and the LoRA of ``folder`` as teacher."""
    text = setting.put_into((CONFIGS / name).read_text(encoding="utf-8"))
    for section in ("cache", "train"):
        text = text.replace(f"[{section}]\n", f"[{section}]\nseed = {seed}\n")
    text = text.replace('"dpo/student.safetensors"', json.dumps(str(folder / "dpo" / "student.safetensors")))
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def tuned_teacher(seed: int, folder: Path, pairs: Path, setting: Setting) -> Path:
    """The LoRA of Diffusion-DPO on pairs that are made in ``pairs``."""
    config = seeded("mini_dpo.toml", seed, folder, setting)
    run("cache", config, "--out", pairs)
    run("train", config, "--data", pairs, "--out", folder / "dpo")
    return folder / "dpo" / "student.safetensors"


def observe(seed: int, out: Path, judges: Judges, setting: Setting, student: bool) -> dict[str, dict[str, float]]:
    """All figures of a seed, by who made the samples."""
    folder = out / f"seed-{seed}{setting.name}"
    folder.mkdir(parents=True, exist_ok=True)
    began = time.process_time()
    lora = tuned_teacher(seed, folder, out / f"pairs-{seed}", setting)
    logs = RunFolder(folder / "dpo").logs()
    last = [entry for entry in logs if "validation_accuracy" in entry][-1]
    found = {"pairs": {name: last[name] for name in ("validation_accuracy", "validation")}}
    found["pairs"]["margin"] = logs[-1]["margin"]
    found["teacher"] = judges.figures(judges.teacher(None))
    found["teacher + DPO"] = judges.figures(judges.teacher(lora))
    if student:
        config = seeded("mini_dpo_ladd.toml", seed, folder)
        run("cache", config, "--out", folder / "data")
        run("train", config, "--data", folder / "data", "--out", folder / "run")
        file = folder / "run" / "student.safetensors"
        files = {"student": file}
        for weight in WEIGHTS:
            files[f"student + {weight:g} DPO"] = path = folder / f"both-{weight:g}.safetensors"
            run("merge", config, "--lora", file, "--add", lora, "--weight", str(weight), "--out", path)
        for name, path in files.items():
            for steps in STEPS:
                found[f"{name}, {steps}"] = judges.figures(judges.student(path, steps))
    found["cost"] = {"cpu_s": round(time.process_time() - began, 1)}
    return found


def worst(name: str, values: Sequence[float]) -> float:
    return min(values) if name in HIGHER or name == "validation_accuracy" else max(values)


def table(found: dict[str, dict]) -> str:
    """Medians over the seeds, with the worst beside, and what was asked for."""
    runs = list(found.values())
    names = ("judge", "accuracy", "fd", "ranker", "accuracy_pixels", "fd_pixels")
    lines = [f"| | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for who in [who for who in runs[0] if who not in ("pairs", "cost")]:
        cells = [[run[who][name] for run in runs] for name in names]
        spelled = [f"{median(c):.3g} ({worst(n, c):.3g})" for n, c in zip(names, cells, strict=True)]
        lines.append(f"| {who} | {' | '.join(spelled)} |")
    held_out = [run["pairs"]["validation_accuracy"] for run in runs]
    ratio = [run["teacher + DPO"]["fd"] / run["teacher"]["fd"] for run in runs]
    lines += ["", f"implicit accuracy on held-out pairs: {median(held_out):.3f} ({min(held_out):.3f})"]
    lines += [f"fd of the tuned teacher / the teacher's: {median(ratio):.2f} ({max(ratio):.2f})"]
    pairs = [("teacher", "teacher + DPO")]
    pairs += [(f"student, {s}", f"student + {w:g} DPO, {s}") for s in STEPS for w in WEIGHTS]
    for before, after in pairs:
        if before in runs[0] and after in runs[0]:
            gains = {n: [run[after][n] - run[before][n] for run in runs] for n in ("judge", "accuracy")}
            spelled = "; ".join(f"{n} {median(g):+.3f} ({min(g):+.3f})" for n, g in gains.items())
            lines.append(f"{after} over {before}: {spelled}")
    lines.append(f"CPU seconds a seed: {', '.join(str(run['cost']['cpu_s']) for run in runs)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for runs, results.json and table.md")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=500, help="samples of each model (default 500)")
    parser.add_argument("--beta", type=float, default=0.0)
    parser.add_argument("--rate", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--no-student", action="store_true", help="the tuned teacher alone")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    path, setting = args.out / "results.json", Setting(args.beta, args.rate, args.steps)
    known = json.loads(path.read_text()) if path.exists() else {}
    judges, student = Judges(args.images), not args.no_student
    names = {seed: f"{seed}{setting.name}{'' if student else ', teacher'}" for seed in args.seeds}
    for seed, name in names.items():
        if name not in known:
            known[name] = observe(seed, args.out, judges, setting, student)
            path.with_suffix(".new").write_text(json.dumps(known, indent=1))
            os.replace(path.with_suffix(".new"), path)
    text = table({name: known[name] for name in names.values()})
    (args.out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

"""How well a one-step student of the scenes inpainting model fills pictures: docs/conditions.md.

    python tests/benchmarks/scenes_inpainting.py --out DIR [--seeds 0 1 2] [--images 1080] [--terms NAME ...]

A seed draws its own pictures and masks and trains by the commands of configs/scenes_inpainting_ladd.toml, once with
each of `TERMS`, and by those of configs/scenes_inpainting_pairs_ladd.toml. Teacher and students fill the same pictures,
of which no seed trains on any, from the same noises; no mask there hides the whole picture. What is there is not done
again. --picture FILE: a picture of filled pictures.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[2]))

from chain import captions, changed, dataset, kept, ratio, run, spelled

from distill_core.cli.sample import open_student, read_student
from distill_core.data.dataset import LatentDataset
from distill_core.diffusion.schedules import grid_sigmas
from distill_core.evaluation.frechet import frechet_figure
from distill_core.evaluation.intervals import Bootstrap, Figure
from distill_core.evaluation.metrics import accuracies
from distill_core.evaluation.plots import sample_grid
from distill_core.evaluation.samples import evaluation_samples
from distill_core.evaluation.spaces import scenes_space
from distill_core.models import scenes
from distill_core.models.denoiser import Denoiser, Guided
from distill_core.models.items import MASK, filled
from distill_core.models.pipelines import ModelConfig, open_source

CONFIG = "scenes_inpainting_ladd.toml"
TEST = 1000  # seed of the pictures that are filled
GUIDANCE, TEACHER_STEPS = 2.0, 25
TERMS = {  # and steps of about equal processor seconds
    "adversarial + distillation": ("{ adversarial = 1.0, distillation = 2.5 }", 250),
    "adversarial": ("{ adversarial = 1.0 }", 330),
    "distillation": ("{ distillation = 2.5 }", 330),
}


PAIRS = "adversarial + pairs"


def pictures(out: Path, seed: int, count: int) -> LatentDataset:
    folder, line = out / f"data-{seed}", f'source = "random"\nseed = {seed}'
    if seed == TEST:
        line += "\nshares = { strokes = 1, discs = 1, rectangles = 1, outpainting = 1 }"
    config = changed(CONFIG, folder / "config.toml", {"source =": line})
    return dataset(folder, config, seed, count)


class Test:
    """Pictures that are filled, and how that is judged."""

    def __init__(self, out: Path, images: int) -> None:
        data = pictures(out, TEST, images)
        self.items = data.read(data.largest)
        self.uncond, self.images = data.uncond(), images
        self.source = open_source(ModelConfig(path="scenes_inpainting"))
        mask = self.items.cond.extra[MASK]
        self.hole = torch.nn.functional.interpolate(mask, scale_factor=scenes.PIXELS)
        self.true = self.decode(self.items.latents)
        self.words = scenes.labels(captions(out / f"data-{TEST}" / "pictures"))
        self.spaces = [scenes_space("latent"), scenes_space("pixel")]
        self.bootstrap = Bootstrap(images)

    def decode(self, latents: Tensor) -> Tensor:
        return torch.cat([self.source.decode(part) for part in latents.split(100)])

    def fill(self, model: Denoiser | Guided, sigmas: Tensor, **sampler) -> Tensor:
        """The items' latents with their holes filled."""
        options = {"count": self.images, "size": 60, **sampler}
        made = evaluation_samples(model, sigmas, self.items.cond, scenes.LATENT_SHAPE, **options)
        return filled(made, self.items.latents, self.items.cond.extra)

    def teacher(self, steps: int = TEACHER_STEPS, guidance: float = GUIDANCE) -> Tensor:
        model = Guided(Denoiser(self.source.backend), self.uncond, guidance)
        return self.fill(model, grid_sigmas(model.process, steps), sampler="euler")

    def student(self, file: Path) -> Tensor:
        state, said = read_student(file)
        return self.fill(open_student(self.source, state, said), torch.tensor([*said["sigmas"], 0.0]))

    def figures(self, latents: Tensor) -> dict[str, Figure]:
        """fd and words in both spaces, and the squared error in the hole, in pixels from -1 to 1."""
        images, found = self.decode(latents), {}
        with torch.no_grad():
            for space in self.spaces:
                parts = zip(latents.split(100), images.split(100), strict=True)
                features = torch.cat([space.features(*part) for part in parts])
                found[f"fd{space.suffix}"] = frechet_figure(features, space.reference, self.bootstrap)
                found |= accuracies(space, features, self.words, self.bootstrap)
        error = ((images - self.true).square() * self.hole).sum((1, 2, 3)) / (3 * self.hole.sum((1, 2, 3)))
        return found | {"error": self.bootstrap.of_mean(error)}


def student_file(out: Path, seed: int, name: str, count: int) -> Path:
    """The student of a seed and of some terms, trained by the commands once."""
    folder = out / f"run-{seed}" / name.replace(" ", "-")
    file = folder / "run" / "student.safetensors"
    if file.exists():
        return file
    data = pictures(out, seed, count).folder
    if name == PAIRS:
        fills = out / f"fills-{seed}"
        lines = {"count =": f"count = 1536\nseed = {seed}", "batch_size = 32": f"batch_size = 32\nseed = {seed}"}
        lines["mix ="] = f'mix = {{ "{data}" = 1.0, "{fills}" = 1.0 }}'
        config = changed("scenes_inpainting_pairs_ladd.toml", folder / "config.toml", lines)
        run("cache", config, "--data", data, "--out", fills)
        run("train", config, "--out", folder / "run")
    else:
        terms, steps = TERMS[name]
        lines = {"steps =": f"steps = {steps}\nseed = {seed}", "terms =": f"terms = {terms}"}
        config = changed(CONFIG, folder / "config.toml", lines)
        run("train", config, "--data", data, "--out", folder / "run")
    return file


SHOWN = ("fd", "fd_pixels", "error", "alignment", "alignment_pixels")
HIGHER = ("alignment", "alignment_pixels")


def table(true: dict[str, Figure], teacher: dict[str, Figure], students: dict[str, list[dict[str, Figure]]]) -> str:
    """Figures by model, medians over the seeds with the worst beside; each seed's ratio to the teacher's; and whether
    the term on real data helps. true: those of the pictures themselves."""
    lines = [f"| | {' | '.join(SHOWN)} |", "|---|" + "---|" * len(SHOWN)]
    for name, found in (("true pictures", true), (f"teacher, {TEACHER_STEPS} steps", teacher)):
        lines.append(f"| {name} | {' | '.join(f'{found[n].value:.3g}' for n in SHOWN)} |")
    for name, seeds in students.items():
        cells = [spelled([found[n].value for found in seeds], n not in HIGHER) for n in SHOWN]
        lines.append(f"| {name}, 1 step | {' | '.join(cells)} |")
    lines.append("")
    for name, seeds in students.items():
        for metric in ("fd", "fd_pixels", "error"):
            ratios = [ratio(found[metric], teacher[metric]) for found in seeds]
            each = ", ".join(f"{r:.2f}" for r in ratios)
            lines.append(f"{name}: {metric} / the teacher's {spelled([r.value for r in ratios])}: {each}")
    both, alone = students.get("adversarial + distillation"), students.get("adversarial")
    if both and alone:
        for metric in SHOWN:
            less = ", ".join(f"{a[metric] - b[metric]:.3g}" for a, b in zip(both, alone, strict=True))
            lines.append(f"with the distillation term less without: {metric} {less}")
    return "\n".join(lines)


def draw(test: Test, latents: dict[str, Tensor], path: Path, count: int = 12) -> None:
    """The first items with holes of a middling size."""
    size = test.hole.mean((1, 2, 3))
    rows = ((size > 0.15) & (size < 0.6)).nonzero()[:count, 0]
    shown = [("hole", test.true[rows] * (1 - test.hole[rows])), ("true picture", test.true[rows])]
    shown += [(name, test.decode(of[rows])) for name, of in latents.items()]
    sample_grid(shown, [""] * len(rows), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=1080, help="pictures that are filled (default 1080)")
    parser.add_argument("--items", type=int, default=2048, help="pictures of a seed's training (default 2048)")
    parser.add_argument("--terms", nargs="+", choices=[PAIRS, *TERMS], default=[PAIRS, *TERMS])
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    test = Test(args.out, args.images)
    latents = {f"teacher, {TEACHER_STEPS} steps": kept(args.out / "latents" / "teacher.safetensors", test.teacher)}
    (teacher,) = map(test.figures, latents.values())
    students: dict[str, list[dict[str, Figure]]] = {name: [] for name in args.terms}
    for seed in args.seeds:
        for name in args.terms:
            file = student_file(args.out, seed, name, args.items)
            path = args.out / "latents" / f"{seed}-{name.replace(' ', '-')}.safetensors"
            filled_by = kept(path, partial(test.student, file))
            students[name].append(test.figures(filled_by))
            latents.setdefault(f"{name}, 1 step", filled_by)
    text = table(test.figures(test.items.latents), teacher, students)
    (args.out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    if args.picture:
        draw(test, latents, args.picture)


if __name__ == "__main__":
    main()

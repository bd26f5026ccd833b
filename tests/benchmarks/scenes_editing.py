"""Whether a one-step student of the scenes editing model can be told how much to edit: docs/conditions.md.

    python tests/benchmarks/scenes_editing.py --out DIR [--seeds 0 1 2] [--items 64]

A seed draws its own pairs, lets the teacher edit them at drawn strengths and trains a student of it, by the commands of
configs/scenes_editing_ladd.toml. Teacher and students edit the same pictures from the same noises at five strengths of
the text and five of the picture, the other at its default. What is there is not done again. --picture FILE: the item
--shown at five times five strengths, by both.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[2]))

from chain import changed, dataset, kept, run, spelled

from distill_core.cli.sample import open_student, read_student
from distill_core.data.dataset import LatentDataset
from distill_core.data.scenes import draw_edits
from distill_core.diffusion.schedules import grid_sigmas
from distill_core.evaluation.plots import sample_grid
from distill_core.evaluation.samples import evaluation_samples
from distill_core.models import scenes
from distill_core.models.denoiser import Denoiser
from distill_core.models.guidance import guided
from distill_core.models.items import IMAGE_STRENGTH, SOURCE_IMAGE, TEXT_STRENGTH
from distill_core.models.pipelines import ModelConfig, open_source
from distill_core.training.config import load_config

CONFIG = "scenes_editing_ladd.toml"
TEST, TEACHER_STEPS, VALUES = 1000, 25, 5
TOLD = "student"
Strengths = tuple[float, float]  # of text and picture
Edit = Callable[[Strengths], Tensor]  # -> latents [N, 16, 8, 8]


def config_of(folder: Path, seed: int, count: int) -> Path:
    sources = (folder / "pictures" / "before").as_posix()
    lines = {"sources =": f'sources = "{sources}"', "count =": f"count = {count}\nseed = {seed}"}
    return changed(CONFIG, folder / "config.toml", lines | {"student_lr =": f"student_lr = 6e-4\nseed = {seed}"})


def student_file(out: Path, seed: int, count: int) -> Path:
    """The student of a seed, by the commands, once."""
    folder = out / f"seed-{seed}"
    file = folder / "run" / "student.safetensors"
    if not file.exists():
        config = config_of(folder, seed, count)
        pairs = dataset(folder, config, seed, count, edits=True)
        run("cache", config, "--data", pairs.folder, "--out", folder / "edits")
        run("train", config, "--data", folder / "edits", "--out", folder / "run")
    return file


class Test:
    """Pictures that are edited, and what an edit is measured by."""

    def __init__(self, out: Path, count: int) -> None:
        folder = out / f"data-{TEST}"
        data: LatentDataset = dataset(folder, config_of(folder, TEST, count), TEST, count, edits=True)
        self.items, self.uncond, self.count = data.read(data.largest[:count]), data.uncond(), count
        self.source = open_source(ModelConfig(path="scenes_editing"))
        before, after = draw_edits(TEST, range(count))
        self.group = (before != after).int().argmax(1)
        self.word = after[torch.arange(count), self.group]
        self.after = after
        self.classifier, _ = scenes.load_classifier("pixel")

    def teacher(self, strengths: Strengths) -> Tensor:
        model = guided(Denoiser(self.source.backend), self.uncond, 1.0)
        return self.edit(model, grid_sigmas(model.process, TEACHER_STEPS), strengths, sampler="euler")

    def student(self, file: Path, strengths: Strengths, told: bool = True) -> Tensor:
        state, said = read_student(file)
        student = open_student(self.source, state, said)
        if not told:
            student.strengths = None
        return self.edit(student, torch.tensor([*said["sigmas"], 0.0]), strengths)

    def edit(self, model, sigmas: Tensor, strengths: Strengths, **sampler) -> Tensor:
        told = {
            n: torch.full((self.count,), v) for n, v in zip((TEXT_STRENGTH, IMAGE_STRENGTH), strengths, strict=True)
        }
        cond = self.items.cond.with_items(told)
        return evaluation_samples(model, sigmas, cond, scenes.LATENT_SHAPE, count=self.count, size=32, **sampler)

    @torch.no_grad()
    def logits(self, latents: Tensor) -> Tensor:
        """Of the word that each edit asks for [N], by the classifier of images."""
        groups = scenes.by_group(self.classifier(self.source.decode(latents)))
        table = [*groups.values()]
        return torch.stack([table[g][i, w] for i, (g, w) in enumerate(zip(self.group, self.word, strict=True))])

    @torch.no_grad()
    def words(self, latents: Tensor) -> float:
        """The share of all four words that are as asked."""
        groups = scenes.by_group(self.classifier(self.source.decode(latents)))
        right = [part.argmax(1) == self.after[:, g] for g, part in enumerate(groups.values())]
        return torch.stack(right).double().mean().item()

    def distances(self, latents: Tensor) -> Tensor:
        """To the picture that is edited [N], root of the mean square in latents."""
        return (latents - self.items.cond.extra[SOURCE_IMAGE]).square().mean((1, 2, 3)).sqrt()


def spearman(values: Tensor) -> Tensor:
    """Rank correlation of each row of values [R, N] with its order."""
    ranks = values.argsort(1).argsort(1).double()
    order = torch.arange(values.shape[1]).double()
    ranks, order = ranks - ranks.mean(1, keepdim=True), order - order.mean()
    return (ranks * order).sum(1) / (ranks.norm(dim=1) * order.norm())


def spaced(span: Sequence[float]) -> list[float]:
    return [round(v, 4) for v in torch.linspace(*span, VALUES).tolist()]


class Sweep:
    """The two curves of a model: how a strength moves what it should, the other strength at its default.

    edit: makes the latents of all items at strengths.
    """

    def __init__(self, test: Test, edit: Edit, text: Sequence[float], image: Sequence[float], default: Strengths):
        self.words = test.words(edit(default))
        self.logits = torch.stack([test.logits(edit((value, default[1]))) for value in text], 1)  # [N, VALUES]
        self.distances = torch.stack([test.distances(edit((default[0], value))) for value in image], 1)

    @property
    def curves(self) -> dict[str, Tensor]:
        return {"text": self.logits.double().mean(0), "image": self.distances.double().mean(0)}

    def figures(self, teacher: Sweep) -> dict[str, float]:
        """Rank correlations of the curves, and their largest distance from the teacher's in parts of that."""
        found = {"words": self.words}
        for (name, mine), its in zip(self.curves.items(), teacher.curves.values(), strict=True):
            items = self.logits if name == "text" else self.distances
            found[f"{name}: Spearman"] = spearman(mine[None]).item()
            found[f"{name}: Spearman of an item"] = spearman(items).mean().item()
            found[f"{name}: off the teacher's"] = ((mine - its).abs() / its.abs()).max().item()
            found[f"{name}: range"] = (mine.max() - mine.min()).item()
        return found


def table(text: Sequence[float], image: Sequence[float], sweeps: dict[str, list[Sweep]], teacher: Sweep) -> str:
    """The curves and what is asked of them, medians over the seeds with the worst beside."""
    lines = []
    for name, values, what in (("text", text, "logit"), ("image", image, "distance")):
        lines += [f"| {what} at {name} strength | {' | '.join(f'{v:g}' for v in values)} |", "|---|" + "---|" * VALUES]
        for who, seeds in {"teacher": [teacher], **sweeps}.items():
            points = torch.stack([sweep.curves[name] for sweep in seeds], 1).tolist()
            lines.append(f"| {who} | {' | '.join(spelled(point) for point in points)} |")
        lines.append("")
    for who, seeds in {"teacher": [teacher], **sweeps}.items():
        found = [sweep.figures(teacher) for sweep in seeds]
        for name in found[0]:
            lower = "off" in name or name == "image: Spearman"
            lines.append(f"{who}: {name} {spelled([of[name] for of in found], lower)}")
    return "\n".join(lines)


def grid(test: Test, edits: dict[str, Edit], text: Sequence[float], image: Sequence[float], path: Path) -> None:
    """The last item: a column for each model and text strength, a row for each strength of the picture."""
    rows = []
    for value in image:
        latents = [edit((of, value))[-1] for edit in edits.values() for of in text]
        rows.append((f"image {value:g}", test.source.decode(torch.stack(latents))))
    sample_grid(rows, [f"{who}\ntext {of:g}" for who in edits for of in text], path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--items", type=int, default=64, help="pictures that are edited (default 64)")
    parser.add_argument("--count", type=int, default=768, help="edits of a seed's training (default 768)")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--shown", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    test = Test(args.out, args.items)
    config = load_config(config_of(args.out, 0, 1))
    text, image = spaced(config.cache.text_strength), spaced(config.cache.image_strength)
    default = config.strengths.text, config.strengths.image

    def teacher(strengths: Strengths) -> Tensor:
        path = args.out / "latents" / f"teacher-{strengths[0]:g}-{strengths[1]:g}.safetensors"
        return kept(path, partial(test.teacher, strengths))

    its = Sweep(test, teacher, text, image, default)
    students: dict[str, list[Sweep]] = {TOLD: [], "student, told nothing": []}
    for seed in args.seeds:
        file = student_file(args.out, seed, args.count)
        students["student"].append(Sweep(test, partial(test.student, file), text, image, default))
        students["student, told nothing"].append(
            Sweep(test, partial(test.student, file, told=False), text, image, default)
        )
    said = table(text, image, students, its)
    (args.out / "table.md").write_text(said + "\n", encoding="utf-8")
    print(said)
    if args.picture:
        few = Test(args.out, args.shown + 1)
        student = partial(few.student, student_file(args.out, args.seeds[0], args.count))
        grid(few, {"teacher": few.teacher, TOLD: student}, text, image, args.picture)


if __name__ == "__main__":
    main()

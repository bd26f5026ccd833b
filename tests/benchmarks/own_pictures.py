"""A person's own few pictures, of mixed sizes, in 30 trainings: ``python tests/benchmarks/own_pictures.py --out DIR``.

Styles that the mini model does not know (Fashion-MNIST turned, upside down or inverted), of 10, 30 and 100 pictures in
1 to 7 sizes, are trained with LADD and with ADD for 300 steps, with pre-flight and early end as they are by default.
The distance is Fréchet's in the pixel classifier's features, of 200 four-step samples to 200 pictures of the style
that were held out, before and after. A line of ``results.jsonl`` a run; what is there is not done again, and a run that
was cut off goes on from its checkpoint. At the end: table.md and own_pictures.jpg (docs/own_pictures.md).

``--pictures`` is the folder with Fashion-MNIST's idx.gz files, those of Debian's package dataset-fashion-mnist.
``--only "LADD*-10"`` takes the runs whose names fit a pattern.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.append(str(Path(__file__).resolve().parents[2]))

from distill_core.data.dataset import LatentDataset
from distill_core.data.fashion_mnist import DEBIAN_DATA, read_split, upscale
from distill_core.data.real import save_latents
from distill_core.digests import fingerprint
from distill_core.evaluation import live_plots
from distill_core.evaluation.frechet import fd_between
from distill_core.evaluation.metrics import MiniEvaluator
from distill_core.evaluation.spaces import mini_space
from distill_core.experiments.demo import LADD_SETTINGS, LEVELS, draw_samples
from distill_core.methods.add import ADDConfig
from distill_core.methods.components import Components, VisionConfig
from distill_core.methods.config import MethodConfig
from distill_core.models import mini
from distill_core.models.denoiser import Denoiser
from distill_core.models.pipelines import ModelConfig, open_source
from distill_core.training.loop import TrainConfig
from distill_core.training.preflight import preflight
from distill_core.training.run import RunConfig, StudentConfig, new_run, train_to_end
from distill_core.training.run_folder import RunFolder

STYLES = {
    "turned": lambda x: x.rot90(1, (2, 3)),
    "upside down": lambda x: x.flip(2),
    "inverted": lambda x: -x,
    "inverted, turned": lambda x: -x.rot90(1, (2, 3)),
    "pale, mirrored": lambda x: (0.5 * x + 0.5).flip(3),
}
COUNTS = (10, 30, 100)
SIZES = ((64, 64), (48, 64), (64, 48), (64, 80), (80, 64), (48, 80), (80, 80))  # height and width in pixels
NUMBER_OF_SIZES = dict(zip(STYLES, (1, 2, 3, 5, 7), strict=True))
TRAIN = TrainConfig(steps=300, batch_size=4, student_lr=3e-4, discriminator_lr=2e-3, checkpoint_every=50)
METHODS: dict[str, MethodConfig] = {
    "LADD": replace(LADD_SETTINGS, warmup_steps=0),
    "ADD": ADDConfig(student_sigmas=LEVELS, probabilities=(0.4, 0.2, 0.2, 0.2), r1=0.05),
}
IMAGES, SAMPLE_SEED = 200, 7000
SHOWN = ("inverted", 10), ("turned", 30), ("pale, mirrored", 100)  # rows of the picture
NO_PICTURES = """there is no Fashion-MNIST in {}. Debian and Ubuntu have it as a package (31 MB, MIT licence):
    apt-get install dataset-fashion-mnist
or, without root: apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb DIR, and then
    --pictures DIR/usr/share/datasets/fashion-mnist"""


@dataclass(frozen=True)
class Case:
    """One training.  seed: of the training, and which part of the pictures it has."""

    style: str
    count: int
    method: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method} {self.style} {self.count}".replace(",", "").replace(" ", "-")


CASES = [
    Case(style, count, method, seed) for count in COUNTS for seed, style in enumerate(STYLES) for method in METHODS
]


class Pictures:
    """Pictures of a style: some to train on, in mixed sizes, and others held out."""

    def __init__(self, folder: Path, skipped: int = 0) -> None:
        """folder: of the files.  skipped: test pictures of each class before those that are held out.

        Ends the program where there are no pictures.
        """
        if not list(folder.glob("*-idx3-ubyte.gz")):
            raise SystemExit(NO_PICTURES.format(folder))
        (train, train_labels), (test, test_labels) = (read_split(folder, split) for split in ("train", "t10k"))
        self.train, self.train_labels = train[:5000], train_labels[:5000]
        balanced = torch.cat([(test_labels == c).nonzero()[skipped : skipped + 2 * IMAGES // 10, 0] for c in range(10)])
        self.held_out = test[balanced]

    def own(self, case: Case) -> Iterator[tuple[Tensor, int]]:
        """Pictures [1, 3, h, w] and their classes: another part of the train split for each style."""
        first = 500 * case.seed
        for index in range(case.count):
            size = SIZES[index % NUMBER_OF_SIZES[case.style]]
            picture = STYLES[case.style](upscale(self.train[first + index : first + index + 1]))
            resized = F.interpolate(picture, size=size, mode="bilinear", align_corners=False)
            yield resized, int(self.train_labels[first + index])

    def others(self, style: str) -> tuple[Tensor, Tensor]:
        """Two halves of the held-out pictures [N, 3, 64, 64]: the reference, and what is as near to it as can be."""
        pictures = STYLES[style](upscale(self.held_out))
        return pictures[0::2], pictures[1::2]


def dataset_of(case: Case, pictures: Pictures, folder: Path) -> LatentDataset:
    """The encoded pictures of a case."""
    encoder, (classes, empty) = mini.load_autoencoder(), mini.mini_conditioning()
    with torch.no_grad():
        items = [(encoder.encode(picture).latents[0], classes[[label]]) for picture, label in pictures.own(case)]
    save_latents([latent for latent, _ in items], [cond for _, cond in items], empty, folder)
    return LatentDataset(folder)


class Ruler:
    """Distances of images to the held-out pictures of a style."""

    def __init__(self, pictures: Pictures) -> None:
        self.pictures, self.evaluator, (self.classes, _) = pictures, MiniEvaluator(), mini.mini_conditioning()
        self.untrained = self.samples(Denoiser(mini.mini_backend()))

    @torch.no_grad()
    def samples(self, student: Denoiser) -> Tensor:
        """Images [N, 3, 64, 64] in four steps, always from the same noise."""
        return self.evaluator.decode(draw_samples(student, 4, "ancestral", SAMPLE_SEED, IMAGES, self.classes))

    def features(self, images: Tensor) -> Tensor:
        space = mini_space("pixel")
        return torch.cat([space.features(part, part) for part in images.split(250)])

    def distances(self, style: str, after: Tensor) -> dict[str, float]:
        """Of samples before and after, and of other pictures of the style."""
        reference, other = self.pictures.others(style)
        target = self.features(reference)
        images = {"before": self.untrained, "after": after, "floor": other}
        return {name: fd_between(self.features(x), target) for name, x in images.items()}


def observe(case: Case, ruler: Ruler, out: Path) -> dict:
    """Train one case to its end, and how far its samples were from the style and are now."""
    source, folder = open_source(ModelConfig(path="mini")), out / case.name
    data = dataset_of(case, ruler.pictures, folder / "data")
    config = RunConfig(
        METHODS[case.method],
        replace(TRAIN, seed=case.seed),
        StudentConfig(16, sampler="ancestral", sampler_options={"eta": 1.0}),
        {"base": fingerprint(source.backend.network), "dataset": data.digest()},
        vision=VisionConfig(size=32),
    )
    run = new_run(config, Components(source.backend, source.decode_with_gradient, source.encoder), data, folder)
    started, ended = time.process_time(), "at its last step"
    try:
        preflight(run)
        train_to_end(run, config, RunFolder(folder), folder / "student.safetensors")
    except (ValueError, FloatingPointError) as error:
        ended = str(error)
    seconds, logs = time.process_time() - started, RunFolder(folder).logs()
    with run.ema_weights():
        after = ruler.samples(run.method.student)
    torch.save(after[:10].half(), folder / "samples.pt")
    diversity = [entry["diversity"] for entry in logs[-50:] if "diversity" in entry]
    return {
        "run": case.name,
        "sizes": len(data.shapes),
        "steps": run.step,
        "ended": ended,
        **ruler.distances(case.style, after),
        "words": list(dict.fromkeys(entry["health"] for entry in logs)),
        "diversity": sum(diversity) / len(diversity) if diversity else None,
        "seconds": seconds,
    }


def note(entry: dict, out: Path) -> None:
    """Keep what has been observed."""
    with open(out / "results.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
    print(entry, flush=True)


def results(out: Path) -> dict[str, dict]:
    """What has been observed, by run."""
    file = out / "results.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return {entry["run"]: entry for entry in map(json.loads, lines)}


def table(found: dict[str, dict]) -> str:
    """A row a run, and what they show together."""
    lines = [
        "| style | pictures | sizes | method | distance before | after | of before | other pictures | status | ended |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    done = [(case, found[case.name]) for case in CASES if case.name in found]
    for case, entry in done:
        figures = f"{entry['before']:.1f} | {entry['after']:.1f} | {left(entry):.0%} | {entry['floor']:.1f}"
        words = ", ".join(word for word in entry["words"] if word != "starting")
        ended = entry["ended"].splitlines()[0]
        lines.append(
            f"| {case.style} | {case.count} | {entry['sizes']} | {case.method} | {figures} | {words} | {ended} |"
        )
    early = sum(entry["steps"] < TRAIN.steps for _, entry in done)
    nearer = sum(entry["after"] < entry["before"] for _, entry in done)
    lines += ["", f"{early} of {len(done)} runs ended early; {nearer} of {len(done)} came nearer.", ""]
    for title, runs in groups(done).items():
        parts = sorted(map(left, runs))
        lines.append(f"{title}: median {median(parts):.0%} of the distance is left, {parts[-1]:.0%} in the worst run.")
    return "\n".join(lines)


def left(entry: dict) -> float:
    """How much of the distance is left."""
    return entry["after"] / entry["before"]


def groups(done: list[tuple[Case, dict]]) -> dict[str, list[dict]]:
    """The runs of each method, and of each method with each number of pictures."""
    found: dict[str, list[dict]] = {}
    for case, entry in done:
        for title in (case.method, f"{case.method}, {case.count} pictures"):
            found.setdefault(title, []).append(entry)
    return dict(sorted(found.items()))


def picture(out: Path, ruler: Ruler) -> None:
    """Rows of a style: the pictures of a run, the student's samples before, and after."""
    rows = []
    for style, count in SHOWN:
        cases = [case for case in CASES if (case.style, case.count) == (style, count)]
        own = [pixels[0] for pixels, _ in islice(ruler.pictures.own(cases[0]), 10)]
        rows += [(f"{count} own pictures,\n{style}", own), ("student before", ruler.untrained[:10])]
        for case in cases:
            after = torch.load(out / case.name / "samples.pt", weights_only=True)
            rows.append((f"after 300 steps\nof {case.method}", after.float()))
    images = [(text, [(pixels.permute(1, 2, 0) + 1) / 2 for pixels in row]) for text, row in rows]
    live_plots.grid(images, cell=64).save(out / "own_pictures.jpg", quality=85)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for runs, results.jsonl and what they show")
    parser.add_argument("--pictures", type=Path, default=Path(DEBIAN_DATA), help="folder with the idx.gz files")
    parser.add_argument("--only", default="*", help="take the runs whose names fit this pattern")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    ruler = Ruler(Pictures(args.pictures))
    for case in CASES:
        if fnmatch(case.name, args.only) and case.name not in results(args.out):
            note(observe(case, ruler, args.out), args.out)
    found = results(args.out)
    (args.out / "table.md").write_text(table(found) + "\n", encoding="utf-8")
    print(table(found))
    if len(found) == len(CASES):
        picture(args.out, ruler)


if __name__ == "__main__":
    main()

"""The ground of `tune_turbo`: the mini turbo, own pictures of a style that it does not know, and how both are judged.

Five classes of Fashion-MNIST have a new style, an invertible change of the picture. So a sample is judged by undoing
the change and asking the shipped classifier of images, which knows the clothes as they are. The other five classes are
what the turbo is to keep.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from distill_core.data.fashion_mnist import read_split, upscale
from distill_core.data.real import save_latents
from distill_core.diffusion.noise import item_generator
from distill_core.diffusion.schedules import shifted_sigmas
from distill_core.evaluation.frechet import Gaussian, fd_between, frechet_distance
from distill_core.evaluation.retention import Asked, retention, sample_answers
from distill_core.evaluation.spaces import mini_space
from distill_core.experiments.demo import draw_samples
from distill_core.files import load_tensors, save_tensors
from distill_core.lora_files import read_lora
from distill_core.models import mini
from distill_core.models.backends.diffusers import DiffusersBackend
from distill_core.models.denoiser import Denoiser

OWN, KEPT = (
    (1, 3, 5, 7, 9),
    (0, 2, 4, 6, 8),
)  # trouser, dress, sandal, sneaker, boot; t-shirt, pullover, coat, shirt, bag
REFERENCE = 200  # held-out pictures of a class
NOISES = 16  # of each kept class, for the retention score
Change = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]  # of images [B, 3, H, W], and its inverse
CHANGES: dict[str, Change] = {
    "turned": (lambda x: x.rot90(1, (2, 3)), lambda x: x.rot90(-1, (2, 3))),
    "inverted": (lambda x: -x, lambda x: -x),
}
NO_PICTURES = """there is no Fashion-MNIST in {}. Debian and Ubuntu have it as a package (31 MB, MIT licence):
    apt-get install dataset-fashion-mnist
or, without root: apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb DIR, and then
    --pictures DIR/usr/share/datasets/fashion-mnist"""
Lora = dict[str, Tensor]


def turbo_lora() -> Lora:
    """The shipped student: with it the mini teacher is the turbo, four steps at `demo.LEVELS`, ancestral."""
    return read_lora(mini.ASSETS / "student.safetensors")[0]


@torch.no_grad()
def with_loras(*loras: Lora) -> DiffusersBackend:
    """The mini teacher with LoRAs added to its weights."""
    backend = mini.mini_backend()
    for lora in loras:
        for layer, parts in backend.lora_parts(lora)[0].items():
            weight = backend.network.get_submodule(layer).weight
            for part in parts:
                weight[part.first : part.first + len(part.up)] += part.up @ part.down
    return backend


def joined(*loras: Lora, without: Lora | None = None) -> Lora:
    """One LoRA that does what several do, less what ``without`` does."""
    parts = [*loras, *([{k: -v if "lora_B" in k else v for k, v in without.items()}] if without else [])]
    return {name: torch.cat([part[name] for part in parts], dim=int("lora_B" in name)) for name in parts[0]}


class Ground:
    """Own pictures of a change, and its judge.

    source: folder of Fashion-MNIST's files.  cache: folder for moments of references.  images: samples of each kind.
    Ends the program where there are no pictures.
    """

    def __init__(self, source: Path, cache: Path, change: str, images: int) -> None:
        if not list(source.glob("*-idx3-ubyte.gz")):
            raise SystemExit(NO_PICTURES.format(source))
        self.train, self.test = read_split(source, "train"), read_split(source, "t10k")
        self.change, self.images = change, images
        self.apply, self.undo = CHANGES[change]
        self.autoencoder, (self.classes, self.empty) = mini.load_autoencoder(), mini.mini_conditioning()
        self.space = mini_space("pixel")
        self.references = self._references(cache / f"reference-{change}.safetensors")

    def own_pictures(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Pictures [count, 3, 64, 64] in the new style and their classes, equally many of each; of the train split."""
        pictures, labels = self.train
        chosen = []
        for c in OWN:
            rows = (labels == c).nonzero()[:, 0]
            chosen.append(rows[torch.randperm(len(rows), generator=item_generator(seed, c))[: count // len(OWN)]])
        rows = torch.cat(chosen)
        return self.apply(upscale(pictures[rows])), labels[rows]

    def save_own(self, count: int, seed: int, folder: Path) -> None:
        """The dataset of own pictures."""
        pictures, labels = self.own_pictures(count, seed)
        conds = [self.classes[[label]] for label in labels.tolist()]
        save_latents(list(self.encode(pictures)), conds, self.empty, folder)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        parts = images.contiguous(memory_format=torch.channels_last).split(50)
        return torch.cat([self.autoencoder.encoder(part).contiguous() for part in parts])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images [N, 3, 64, 64] in [-1, 1]."""
        parts = [part.contiguous(memory_format=torch.channels_last) for part in latents.split(50)]
        return torch.cat([self.autoencoder.decoder(part).clamp(-1, 1) for part in parts])

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        return torch.cat([self.space.features(part, part) for part in images.split(250)])

    def held_out(self, classes: tuple[int, ...], skip: int = 0, count: int = REFERENCE) -> Tensor:
        pictures, labels = self.test
        return upscale(torch.cat([pictures[labels == c][skip : skip + count] for c in classes]))

    def _references(self, path: Path) -> dict[str, Gaussian]:
        """Moments of held-out pictures; the new style, strange to the autoencoder, is taken as that shows it."""
        if not path.exists():
            own = self.undo(self.decode(self.encode(self.apply(self.held_out(OWN)))))
            kept = self.held_out(KEPT, count=len(self.test[0]))
            moments = {name: Gaussian.of(self.features(x)) for name, x in (("own", own), ("kept", kept))}
            save_tensors(path, {f"{name}.{key}": v for name, g in moments.items() for key, v in g._asdict().items()})
        stored, _ = load_tensors(path)
        return {name: Gaussian(stored[f"{name}.mean"], stored[f"{name}.cov"]) for name in ("own", "kept")}

    def floor(self) -> dict[str, float]:
        """Other held-out pictures in the samples' place: no model can be expected to do better."""
        count = self.images // len(OWN)
        own = self.undo(self.decode(self.encode(self.apply(self.held_out(OWN, REFERENCE, count)))))
        kept = self.decode(self.encode(self.held_out(KEPT, REFERENCE, count)))
        labels = torch.tensor(OWN).repeat_interleave(count)
        return self._figures("learned", "own", own, labels) | self._figures("kept", "kept", kept, None)

    def samples(self, backend: DiffusersBackend, steps: int, classes: tuple[int, ...], count: int) -> Tensor:
        """Images of a turbo as it is sampled, always from the same noises, which no training draws."""
        conds = self.classes[list(classes)]
        return self.decode(draw_samples(Denoiser(backend), steps, "ancestral", 0, count, conds))

    def judge(self, lora: Lora | None, steps: tuple[int, ...]) -> dict[str, dict[str, float]]:
        """Of the turbo with a LoRA, by its number of steps: learned (fd of own classes, the change undone), accuracy
        there and, at the most steps, kept (fd of the other classes)."""
        backend = with_loras(turbo_lora(), *([lora] if lora else []))
        labels, found = torch.tensor(OWN)[torch.arange(self.images) % len(OWN)], {}
        for count in steps:
            own = self.undo(self.samples(backend, count, OWN, self.images))
            found[str(count)] = self._figures("learned", "own", own, labels)
        kept = self.samples(backend, max(steps), KEPT, self.images)
        found[str(max(steps))] |= self._figures("kept", "kept", kept, None)
        return found

    def distance(self, lora: Lora | None, classes: tuple[int, ...]) -> float:
        """fd of some of the kept classes at four steps, to all held-out pictures of these."""
        samples = self.samples(with_loras(turbo_lora(), *([lora] if lora else [])), 4, classes, self.images)
        pictures = self.held_out(classes, count=len(self.test[0]))
        return round(fd_between(self.features(samples), self.features(pictures)), 3)

    def variety(self, lora: Lora, own: tuple[Tensor, Tensor]) -> dict[str, float]:
        """Whether samples of own classes have collapsed, in features of images with the change undone, beside as many
        held-out pictures: variety (distance between two of a class) and nearest (distance to the nearest own picture
        of the class), both relative to theirs.  own: pictures and classes of `own_pictures`."""
        count = NOISES * len(OWN)
        drawn = self.undo(self.samples(with_loras(turbo_lora(), lora), 4, OWN, count))
        shown = self.undo(self.decode(self.encode(self.apply(self.held_out(OWN, REFERENCE, NOISES)))))
        learned = self.features(self.undo(self.decode(self.encode(own[0]))))
        classes = [(drawn[i :: len(OWN)], shown[i * NOISES : (i + 1) * NOISES], c) for i, c in enumerate(OWN)]
        apart, near = [], []
        for samples, pictures, c in classes:
            both = [self.features(x) for x in (samples, pictures)]
            apart.append([torch.pdist(x).mean() for x in both])
            near.append([torch.cdist(x, learned[own[1] == c]).amin(1).mean() for x in both])
        means = {name: torch.tensor(rows).mean(0) for name, rows in (("variety", apart), ("nearest", near))}
        return {name: round((mean[0] / mean[1]).item(), 3) for name, mean in means.items()}

    def retention(self, lora: Lora) -> dict[str, float]:
        """What the score says, without any reference, of the turbo with a LoRA."""
        conds = [self.classes[[c]] for c in KEPT]
        asked = Asked(
            conds, shifted_sigmas(4, shift_alpha=1.0), mini.LATENT_SHAPE, NOISES, "ancestral", {"eta": 1.0}, seed=1
        )
        models = [Denoiser(with_loras(turbo_lora(), *of)) for of in ((), (lora,))]
        figures = retention(*(sample_answers(model, asked) for model in models), len(conds), repeats=0)
        return {key: round(figure.value, 4) for key, figure in figures.items()}

    def _figures(self, name: str, reference: str, images: Tensor, labels: Tensor | None) -> dict[str, float]:
        features = self.features(images)
        found = {name: round(frechet_distance(*Gaussian.of(features), *self.references[reference]), 3)}
        if labels is not None and self.space.head is not None:
            right = self.space.head(features).argmax(1) == labels
            found["accuracy"] = round(right.float().mean().item(), 4)
        return found

"""The grounds of `compare`: a small model, what it is asked for, and how its samples are judged.

A new ground is a function that makes a `Ground`, and a line in `GROUNDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.cache import CacheConfig
from ..data.dataset import LatentDataset
from ..data.fashion_mnist import read_split, upscale
from ..data.real import save_latents
from ..data.scenes import draw_rows, render
from ..diffusion.noise import item_generator
from ..diffusion.samplers import Model
from ..diffusion.schedules import grid_sigmas
from ..evaluation.metrics import Evaluator, MiniEvaluator
from ..evaluation.samples import evaluation_samples
from ..evaluation.spaces import scenes_space
from ..methods.components import Components, VisionConfig
from ..models import mini, scenes
from ..models.backends.diffusers import DiffusersBackend
from ..models.denoiser import Backend, Cond, Denoiser, Guided
from ..models.mini import mini_backend, mini_conditioning
from ..models.pipelines import MiniSource, ModelConfig, ScenesSource
from ..models.shipped import images_of
from ..models.teachers import Teacher
from ..perceptual import load_metric
from .demo import DemoConfig, cache_teacher
from .entries import STUDENT, TEACHER
from .results import CLOTHES

SCENES = "scenes"
REAL_SCENES = 1_000_000  # added to a run's seed: none of the pictures that the model or its judges were trained on
BATCH = 250  # latents sampled at once

Pictures = tuple[list[Tensor], list[Cond]]  # latents [C, H, W], and a row of conditioning for each


@dataclass(frozen=True)
class Ground:
    """A model on which methods are compared.

    components: opens the model; its ``decode`` has gradients, for ADD.  captions: what is asked for, in words.
    conds: the same, a row each; item i of a dataset or an evaluation takes row i mod their number.  empty: the empty
    conditioning, one row.
    labels: of each word group the right class of each row of ``conds`` [rows]; all rows differ. The group's name is ""
    where there is one.  shape: of a latent [C, H, W].  guidance: of the teacher.  cache: how its dataset is made.
    evaluator: made with latents of the teacher's from other noises, for density and coverage.
    vision: what ADD's discriminator sees with.  distance: opens the perceptual distance of its latents, None without.
    photographs: makes (folder, how many, seed) real pictures, None without.  photographs_need: the files that this
    takes from the folder, in words; empty for none.  teacher_steps: step counts at which the teacher is scored; those
    of the last one are its own pictures, which students are set beside.  small: opens a smaller model of the same
    latents and conditionings, None without.
    """

    name: str
    components: Callable[[], Components]
    captions: Sequence[str]
    conds: Cond
    empty: Cond
    labels: dict[str, Tensor]
    shape: tuple[int, ...]
    guidance: float
    cache: CacheConfig
    evaluator: Callable[[Tensor], Evaluator]
    vision: VisionConfig
    distance: Callable[[], Any] | None = None
    photographs: Callable[[Path, int, int], Pictures] | None = None
    photographs_need: str = ""
    teacher_steps: tuple[int, ...] = (1, 2, 4, 25)
    small: Callable[[], DiffusersBackend] | None = None

    def sized(self, small: Sequence[str]) -> Components:
        """The components with the smaller model as the student, the teacher or both, as ``small`` names them."""
        components = self.components()
        if not {STUDENT, TEACHER} & set(small):
            return components
        assert self.small is not None  # `compare` has refused entries that need it
        models = {True: self.small(), False: components.backend}
        student, teacher = (models[role in small] for role in (STUDENT, TEACHER))
        other = None if teacher is student else Teacher(Denoiser(teacher, name="of another size"), teacher.digest())
        return replace(components, backend=student, teacher=other)

    def teacher(self, backend: Backend) -> Guided:
        """The guided teacher: two forwards a step."""
        return Guided(Denoiser(backend), self.empty, self.guidance)

    def samples(self, model: Model, steps: int, count: int, **options) -> Tensor:
        """``count`` latents from the evaluation's noises, on the model's own grid; options: of `evaluation_samples`."""
        grid = grid_sigmas(model.process, steps)
        return evaluation_samples(model, grid, self.conds, self.shape, count=count, size=BATCH, **options)

    def labels_of(self, count: int) -> dict[str, Tensor]:
        """The right classes [count] of an evaluation's items, by word group."""
        rows = torch.arange(count) % len(self.conds)
        return {group: classes[rows] for group, classes in self.labels.items()}

    def cache_dataset(self, seed: int, folder: Path, small: bool = False) -> None:
        """Latents of the model, or of the smaller one, with their paths."""
        cache = replace(self.cache, seed=seed)
        backend = self.sized([STUDENT, TEACHER] if small else []).backend
        cache_teacher(self.teacher(backend), self.conds, self.shape[0], cache, folder)

    def cache_photographs(self, data: Path, seed: int, folder: Path) -> None:
        """As many real pictures as the teacher's dataset has, in a dataset's form."""
        assert self.photographs is not None  # `compare` has refused entries that need them
        if any(folder.glob("shard-*")) and len(LatentDataset(folder)) == self.cache.count:
            return
        save_latents(*self.photographs(data, self.cache.count, seed), self.empty, folder)


def clothes() -> Ground:
    """The shipped mini model: ten kinds of clothes, after Fashion-MNIST."""
    classes, empty = mini_conditioning()

    def components() -> Components:
        source = MiniSource(ModelConfig())
        return Components(source.backend, source.decode_with_gradient, source.encoder)

    return Ground(
        CLOTHES,
        components,
        mini.CLASS_NAMES,
        classes,
        empty,
        {"": torch.arange(len(classes))},
        mini.LATENT_SHAPE,
        mini.GUIDANCE,
        DemoConfig().cache,
        lambda examples: MiniEvaluator(examples=examples),
        VisionConfig("encoder", 32),  # at the images' own 64 px it would cost four times as much
        load_metric,
        photographs_of_clothes,
        "the files of Fashion-MNIST: install Debian's dataset-fashion-mnist",
        small=partial(mini_backend, small=True),
    )


def photographs_of_clothes(data: Path, count: int, seed: int) -> Pictures:
    """Drawn from Fashion-MNIST's training images and encoded."""
    images, labels = read_split(data, "train")
    chosen = torch.randperm(len(images), generator=item_generator(seed, 0))[:count]
    encoder, (classes, _) = mini.load_autoencoder().encoder, mini_conditioning()
    with torch.no_grad():
        latents = torch.cat([encoder(upscale(part)) for part in images[chosen].split(64)])
    return list(latents), [classes[c : c + 1] for c in labels[chosen].tolist()]


def of_scenes() -> Ground:
    """The shipped scenes model: coloured objects on textured grounds, by prompts of a few words.

    Asked for are the combinations of words that the teacher was trained on. Its real pictures are drawn, so they need
    no files.
    """
    words = scenes.combinations()
    captions = [scenes.caption(row) for row in words.tolist()]
    conds = scenes.encode_text(captions)

    def components() -> Components:
        source = ScenesSource(ModelConfig(path="scenes"))
        return Components(source.backend, source.decode_with_gradient, source.encoder)

    def pictures(data: Path, count: int, seed: int) -> Pictures:
        rows = torch.arange(count) % len(words)
        encoder, latents = scenes.load_autoencoder().encoder, []
        with torch.no_grad():
            for part in torch.arange(count).split(64):
                images, _ = render(words[rows[part]], draw_rows(REAL_SCENES + seed, part.tolist()))
                latents += list(encoder(images.contiguous(memory_format=torch.channels_last)))
        return latents, [conds[row : row + 1] for row in rows.tolist()]

    def evaluator(examples: Tensor) -> Evaluator:
        decode = partial(images_of, scenes.load_autoencoder().decoder)
        return Evaluator([scenes_space("latent"), scenes_space("pixel")], decode, examples=examples)

    return Ground(
        SCENES,
        components,
        captions,
        conds,
        scenes.encode_text([""]),
        dict(zip(scenes.GROUPS, words.T, strict=True)),
        scenes.LATENT_SHAPE,
        scenes.GUIDANCE,
        replace(DemoConfig().cache, guidance=scenes.GUIDANCE, sizes=(scenes.LATENT_SHAPE[1:],)),
        evaluator,
        VisionConfig("encoder", 64),
        photographs=pictures,
    )


GROUNDS: dict[str, Callable[[], Ground]] = {CLOTHES: clothes, SCENES: of_scenes}

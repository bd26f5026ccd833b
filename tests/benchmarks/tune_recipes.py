"""The recipes of `tune_turbo`: ways to teach the mini turbo a style, each with its steps for one budget.

Steps are fixed, so that a run is the same again; they are those that took about `BUDGET` processor seconds, with
whatever a recipe needs beside its training: samples that it makes, a second training. What a run really took is told.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tune_ground import KEPT, Ground, Lora, joined, turbo_lora, with_loras

from distill_core.data.cache import CacheConfig, cache_latents
from distill_core.data.dataset import LatentDataset
from distill_core.data.kept import KeptConfig, cache_kept, kept_config
from distill_core.data.mix import new_mix, open_data
from distill_core.data.real import save_latents
from distill_core.digests import fingerprint
from distill_core.experiments.demo import LADD_SETTINGS, LEVELS, draw_samples
from distill_core.files import load_tensors, save_json, save_tensors
from distill_core.methods.components import Components
from distill_core.methods.config import MethodConfig
from distill_core.methods.ladd import LADDConfig
from distill_core.methods.tune import TuneConfig
from distill_core.models import mini
from distill_core.models.backends.diffusers import DiffusersBackend
from distill_core.models.denoiser import Denoiser, Guided
from distill_core.models.lora import LoraConfig
from distill_core.training.loop import Run, train
from distill_core.training.loop_config import TrainConfig
from distill_core.training.run import RunConfig, StudentConfig, new_run, student_of

BUDGET = 20  # processor seconds
RANK = 32
PARTS = (1 / 16, 1 / 4, 1)  # of a training, after which its student is judged
ADAPTER_SAMPLES, ADAPTER_STEPS = 256, 200
RELEARN_SAMPLES, RELEARN_TEACHER_STEPS = 96, 8
KEPT_SAMPLES, KEPT_SHARE = 100, KeptConfig().share
DENOISING = LADDConfig(terms={"denoising": 1.0})
ADAM = TrainConfig(batch_size=16, betas=(0.9, 0.99), warmup_steps=10)
TUNE, TUNE_TRAIN = TuneConfig(student_sigmas=LEVELS), replace(ADAM, steps=200, student_lr=3e-3)


class Clock:
    """Processor seconds of this process while it is entered."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self.started = time.process_time()

    def __exit__(self, *error) -> None:
        self.seconds += time.process_time() - self.started


@dataclass(frozen=True)
class Trial:
    """One run.  rate: of the student; 0 for the recipe's own."""

    recipe: str
    pictures: int
    change: str
    seed: int
    rate: float = 0.0

    @property
    def name(self) -> str:
        rate = f"-rate{self.rate:g}" if self.rate else ""
        return f"{self.recipe}-{self.change}-{self.pictures}-{self.seed}{rate}"


@dataclass(frozen=True)
class Work:
    """What a recipe works with.  own: the dataset of own pictures.  folder: of the run.  shared: of all runs."""

    trial: Trial
    ground: Ground
    own: LatentDataset
    folder: Path
    shared: Path
    clock: Clock


Students = Iterator[tuple[int, Lora]]  # after how many steps, and the LoRA to be laid over the turbo


def new_training(
    work: Work,
    backend: DiffusersBackend,
    method: MethodConfig,
    config: TrainConfig,
    data: LatentDataset,
    start: str = "",
    folder: Path | None = None,
) -> tuple[Run, RunConfig]:
    """The training of a LoRA on ``backend``, with the trial's seed and the turbo's sampler."""
    student = StudentConfig(RANK, sampler="ancestral", sampler_options={"eta": 1.0}, lora=LoraConfig(start_from=start))
    identities = {"base": fingerprint(backend.network), "dataset": data.digest()}
    config = replace(config, seed=work.trial.seed)
    described = RunConfig(method, config, student, identities, taps=tuple(backend.tap_names))
    return new_run(described, Components(backend), data, folder), described


def trained(work: Work, *args) -> Students:
    """A LoRA after parts of its training; the arguments are those of `new_training`."""
    with work.clock:
        run, described = new_training(work, *args)
        events, steps = train(run), run.config.steps
    marks = {max(1, round(part * steps)) for part in PARTS}
    while run.step < steps:
        with work.clock:
            next(events)
        if run.step in marks:
            yield run.step, student_of(run, described)[0]


def denoising(work: Work) -> Students:
    """Ordinary LoRA training on the turbo."""
    config = replace(ADAM, steps=200, student_lr=work.trial.rate or 1e-3)
    return trained(work, with_loras(turbo_lora()), DENOISING, config, work.own)


def adapter(work: Work) -> Students:
    """Ordinary LoRA training over a de-distil adapter, which is off when the result is sampled."""
    config = replace(ADAM, steps=200, student_lr=work.trial.rate or 1e-3)
    backend = with_loras(turbo_lora(), the_adapter(work))
    return trained(work, backend, DENOISING, config, work.own)


def the_adapter(work: Work) -> Lora:
    """A LoRA that makes the turbo an ordinary model again, by denoising its own samples; made once for all runs."""
    path = work.shared / "adapter.safetensors"
    if not path.exists():
        backend, clock, folder = with_loras(turbo_lora()), Clock(), work.shared / "adapter"
        classes, empty = mini.mini_conditioning()
        with clock:
            samples = draw_samples(
                Denoiser(backend), 4, "ancestral", 0, ADAPTER_SAMPLES, classes, purpose="samples for the adapter"
            )
            conds = [classes[[i % len(classes)]] for i in range(ADAPTER_SAMPLES)]
            save_latents(list(samples), conds, empty, folder)
        making = replace(work, trial=replace(work.trial, seed=0), clock=clock)
        config = replace(ADAM, steps=ADAPTER_STEPS, student_lr=1e-3)
        *_, (_, lora) = trained(making, backend, DENOISING, config, LatentDataset(folder))
        save_json(work.shared / "adapter.json", {"cpu_s": round(clock.seconds, 1)})
        save_tensors(path, lora)
    return load_tensors(path)[0]


def stacked(work: Work) -> Students:
    """A LoRA trained on the base model, sampled together with the turbo LoRA."""
    config = replace(ADAM, steps=200, student_lr=work.trial.rate or 1e-3)
    return trained(work, mini.mini_backend(), DENOISING, config, work.own)


def relearned(work: Work) -> Students:
    """A LoRA on the base model; that model's guided samples of all classes; LADD + pairs from the turbo LoRA on."""
    config = replace(ADAM, steps=50, student_lr=work.trial.rate or 1e-3)
    *_, (_, base) = trained(work, mini.mini_backend(), DENOISING, config, work.own)
    teacher, start = with_loras(base), work.folder / "turbo.safetensors"
    cache = CacheConfig(
        count=RELEARN_SAMPLES,
        steps=RELEARN_TEACHER_STEPS,
        guidance=mini.GUIDANCE,
        sizes=(mini.LATENT_SHAPE[1:],),
        state_sigmas=LEVELS,
        shard_size=64,
        seed=work.trial.seed,
    )
    classes, empty = mini.mini_conditioning()
    with work.clock:
        made_from = {"base": fingerprint(teacher.network)}
        for _ in cache_latents(
            Guided(Denoiser(teacher), empty, mini.GUIDANCE),
            classes,
            mini.LATENT_SHAPE[0],
            cache,
            work.folder / "data",
            made_from,
        ):
            pass
    save_tensors(start, turbo_lora())
    method = replace(LADD_SETTINGS, terms={"adversarial": 0.25, "pairs": 1.0}, warmup_steps=0)
    again = TrainConfig(steps=50, batch_size=16, student_lr=4e-4, discriminator_lr=4e-3)
    for step, lora in trained(work, teacher, method, again, LatentDataset(work.folder / "data"), str(start)):
        yield step, joined(base, lora, without=turbo_lora())


def own_and_kept(work: Work, backend: DiffusersBackend, kept: tuple[int, ...] = KEPT) -> LatentDataset:
    """Own pictures, mixed with the turbo's samples of the classes to keep."""
    folder, (classes, empty) = work.folder / "kept", mini.mini_conditioning()
    cache = kept_config(LEVELS, KEPT_SAMPLES, mini.LATENT_SHAPE[1:], seed=work.trial.seed)
    for _ in cache_kept(
        Guided(Denoiser(backend), empty, 1.0),
        classes[list(kept)],
        mini.LATENT_SHAPE[0],
        cache,
        folder,
        sampler="ancestral",
        sampler_options={"eta": 1.0},
        description={"base": fingerprint(backend.network)},
    ):
        pass
    return open_data(new_mix({work.own.folder: 1 - KEPT_SHARE, folder: KEPT_SHARE}))


def prior(work: Work) -> Students:
    """Ordinary LoRA training on own pictures and, in turn, on the turbo's samples of what it is to keep."""
    backend = with_loras(turbo_lora())
    with work.clock:
        data = own_and_kept(work, backend)
    return trained(work, backend, DENOISING, replace(ADAM, steps=200, student_lr=work.trial.rate or 1e-3), data)


def tune(work: Work, kept: tuple[int, ...] = KEPT) -> Students:
    """Tune Turbo as it is by default, but for the mini model's rate."""
    backend = with_loras(turbo_lora())
    with work.clock:
        data = own_and_kept(work, backend, kept)
    return trained(work, backend, TUNE, TUNE_TRAIN, data)


RECIPES: dict[str, Callable[[Work], Students]] = {
    "denoising": denoising,
    "adapter": adapter,
    "stacked": stacked,
    "relearned": relearned,
    "prior": prior,
    "tune": tune,
}
TITLES = {
    "denoising": "denoising on the turbo",
    "adapter": "over a de-distil adapter",
    "stacked": "LoRA of the base, stacked",
    "relearned": "LoRA of the base, then LADD again",
    "prior": "denoising, with the turbo's samples",
    "tune": "Tune Turbo",
}

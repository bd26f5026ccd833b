"""The whole story on the shipped mini model: cache teacher latents, distil, evaluate, draw.

python -m distill_core demo --out DIR [--seed N]
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..data.cache import CacheConfig, cache_latents
from ..data.dataset import LatentDataset
from ..diffusion.samplers import sample_many
from ..diffusion.schedules import shifted_sigmas
from ..evaluation import plots
from ..evaluation.metrics import MiniEvaluator
from ..files import fingerprint, git_commit, save_json, save_lora
from ..methods.components import Components, DiscriminatorConfig
from ..methods.ladd import LADDConfig
from ..models import mini
from ..models.backends.diffusers import DiffusersBackend
from ..models.denoiser import Cond, Denoiser, Guided
from ..models.mini import mini_backend, mini_conditioning
from ..training.loop import Run, TrainConfig, train
from ..training.run import RunConfig, StudentConfig, new_run, student_of

STUDENT_STEPS = (1, 2, 4)
TEACHER_STEPS = (1, 2, 4, 25)
LEVELS = (1.0, 0.75, 0.5, 0.25)
EVALUATION_SEED = 1_000_000  # added to the seed, so that no evaluation noise was trained on


@dataclass(frozen=True)
class DemoRun:
    """One way to train a student: the method's settings and the loop's."""

    ladd: LADDConfig
    train: TrainConfig


LADD_SETTINGS = LADDConfig(
    probabilities=(0.4, 0.2, 0.2, 0.2), warmup_probabilities=(0.5, 0.5, 0.0, 0.0), warmup_steps=60, renoise_mean=0.0
)


@dataclass(frozen=True)
class DemoConfig:
    """Settings of the demo, tuned on seed 100 (docs/tuning.md); results are reported for other seeds.

    Both runs see the same number of items, and the pairs term costs no forward: their budgets are equal.
    """

    cache: CacheConfig = CacheConfig(
        count=2048,
        steps=16,
        guidance=mini.GUIDANCE,
        sizes=(mini.LATENT_SHAPE[1:],),
        state_sigmas=LEVELS,
        shard_size=512,
        batch_size=128,
    )
    mixed: DemoRun = DemoRun(
        replace(LADD_SETTINGS, terms={"adversarial": 0.25, "pairs": 1.0}),
        TrainConfig(steps=405, batch_size=32, student_lr=6e-4, discriminator_lr=4e-3),
    )
    # The regression is what allows the higher student rate above; pure LADD is worse with it.
    ladd_only: DemoRun = DemoRun(
        replace(LADD_SETTINGS, gan_loss="relativistic", renoise_mean=-0.5),
        TrainConfig(steps=270, batch_size=48, student_lr=3e-4, discriminator_lr=2e-3),
    )
    rank: int = 32
    head_width: int = 64
    images: int = 1000

    def seeded(self, seed: int) -> DemoConfig:
        """The same settings with every seed set."""
        mixed, ladd_only = (replace(run, train=replace(run.train, seed=seed)) for run in (self.mixed, self.ladd_only))
        return replace(self, cache=replace(self.cache, seed=seed), mixed=mixed, ladd_only=ladd_only)


def open_run(dataset: LatentDataset, config: DemoConfig, demo_run: DemoRun) -> tuple[Run, RunConfig]:
    """A run on the mini model. Its student is to be sampled with ancestral steps (`evaluate_student` says why)."""
    backend = mini_backend()
    run_config = RunConfig(
        demo_run.ladd,
        demo_run.train,
        StudentConfig(config.rank, sampler="ancestral", sampler_options={"eta": 1.0}),
        {"base": fingerprint(backend.network), "dataset": dataset.digest()},
        DiscriminatorConfig(width=config.head_width),
        taps=tuple(backend.tap_names),
    )
    return new_run(run_config, Components(backend), dataset), run_config


def draw_samples(model, steps: int, sampler: str, seed: int, count: int, conds: Cond, **options) -> Tensor:
    """``count`` latents from the same noises and classes whatever the model: item i has class i mod 10."""
    sigmas = shifted_sigmas(steps, shift_alpha=1.0)
    return sample_many(
        model, sigmas, conds, mini.LATENT_SHAPE, seed=seed, count=count, size=250, sampler=sampler, **options
    )


Trained = tuple[dict[str, Tensor], dict, list[dict]]  # a student's tensors, its description, the logs of all steps


def train_student(folder: Path, config: DemoConfig, demo_run: DemoRun, row: int = 0) -> Trained:
    """Train one student on the dataset in ``folder``; its progress bar takes the terminal's line ``row``."""
    run, run_config = open_run(LatentDataset(folder), config, demo_run)
    title, logs = demo_run.ladd.title_with_terms(), []
    with tqdm(total=demo_run.train.steps, desc=f"distil: {title}", position=row) as bar:
        for event in train(run):
            logs.append(event.logs)
            bar.set_postfix({k: f"{event.logs[k]:.3f}" for k in ("adversarial", "accuracy") if k in event.logs})
            bar.update()
    return *student_of(run, run_config), logs


def train_students(folder: Path, config: DemoConfig, runs: Sequence[DemoRun]) -> list[Trained]:
    """Train all runs side by side, each on one thread: matrices this small gain little from a second."""
    context = get_context("spawn")
    with ProcessPoolExecutor(len(runs), context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        jobs = [pool.submit(train_student, folder, config, demo_run, row) for row, demo_run in enumerate(runs)]
        return [job.result() for job in jobs]


def evaluate_student(
    backend: DiffusersBackend, lora: dict[str, Tensor], evaluator: MiniEvaluator, config: DemoConfig, seed: int
) -> tuple[dict, dict]:
    """Scores and latents of a student at each of its step counts.

    Students are sampled with ancestral steps, eta 1: re-noising in full narrows the samples from step to step, Euler
    (eta 0) widens them.
    """
    classes, _ = mini_conditioning()
    opened = backend.open_lora(lora)
    student = Denoiser(backend, opened)
    labels = torch.arange(config.images) % len(classes)
    scores, latents = {}, {}
    for steps in STUDENT_STEPS:
        latents[steps] = draw_samples(student, steps, "ancestral", seed, config.images, classes)
        scores[str(steps)] = evaluator(latents[steps], labels)
    opened.remove()
    return scores, latents


def cache_dataset(backend: DiffusersBackend, cache: CacheConfig, folder: Path) -> None:
    """The teacher's latents, with a progress bar."""
    classes, empty = mini_conditioning()
    teacher = Guided(Denoiser(backend), empty, cache.guidance)
    with tqdm(total=cache.count, desc="cache: teacher latents") as bar:
        made_from = {"base": fingerprint(backend.network)}
        for done, _, _ in cache_latents(teacher, classes, mini.LATENT_SHAPE[0], cache, folder, made_from):
            bar.update(done - bar.n)


def evaluate_teacher(
    backend: DiffusersBackend, evaluator: MiniEvaluator, config: DemoConfig, seed: int
) -> tuple[dict, dict]:
    """Scores and latents of the guided teacher under Euler at each of its step counts (it pays two forwards a step)."""
    classes, empty = mini_conditioning()
    teacher = Guided(Denoiser(backend), empty, mini.GUIDANCE)
    labels = torch.arange(config.images) % len(classes)
    scores, latents = {}, {}
    for steps in tqdm(TEACHER_STEPS, desc="evaluate: teacher"):
        latents[steps] = draw_samples(teacher, steps, "euler", seed, config.images, classes)
        scores[str(steps)] = evaluator(latents[steps], labels)
    return scores, latents


def demo(out: str | Path, seed: int = 0, config: DemoConfig = DemoConfig()) -> dict:
    """Run everything into the folder ``out`` and return the report.

    Writes report.json, samples.png, curves.png, student.safetensors and the cached dataset. ``seed`` decides the noises
    of the teacher's latents, of the training and of the evaluation.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    started = time.time()
    config = config.seeded(seed)
    backend, evaluator = mini_backend(), MiniEvaluator()
    folder = out / f"dataset-seed{seed}"
    cache_dataset(backend, config.cache, folder)
    runs = {"student": config.mixed, "ladd_only": config.ladd_only}
    trained = dict(zip(runs, train_students(folder, config, list(runs.values())), strict=True))
    save_lora(out / "student.safetensors", *trained["student"][:2])

    report: dict[str, Any] = {}
    latents, evaluation_seed = {}, seed + EVALUATION_SEED
    for key, (lora, _, _) in trained.items():
        report[key], latents[key] = evaluate_student(backend, lora, evaluator, config, evaluation_seed)
    report["teacher"], latents["teacher"] = evaluate_teacher(backend, evaluator, config, evaluation_seed)

    draw_rows(evaluator, latents, out / "samples.png")
    plots.training_curves(
        {runs[key].ladd.title_with_terms(): logs for key, (*_, logs) in trained.items()}, out / "curves.png"
    )
    report |= {
        "floor": mini.training_log()["floor"],
        "config": asdict(config),
        "seconds": round(time.time() - started, 1),
        "seed": seed,
        "commit": git_commit(),
        "machine": machine(),
    }
    save_json(out / "report.json", report)
    print(table(report))
    return report


def draw_rows(evaluator: MiniEvaluator, latents: dict[str, dict[int, Tensor]], path: Path) -> None:
    """One image of each class per row: teacher and student at their step counts, from the same noises."""
    count = len(mini.CLASS_NAMES)
    rows = [
        (f"teacher, {steps} step{'s' * (steps > 1)}\n({2 * steps} forwards)", latents["teacher"][steps])
        for steps in TEACHER_STEPS
    ]
    rows += [(f"student, {steps} step{'s' * (steps > 1)}", latents["student"][steps]) for steps in STUDENT_STEPS]
    pictures = [(label, evaluator.decode(x[:count])) for label, x in rows]
    plots.sample_grid(pictures, mini.CLASS_NAMES, path, "same noise and class in every column")


def machine() -> str:
    """What the numbers were made on."""
    return f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads"


def table(report: dict) -> str:
    """The report as text: Fréchet distance on latents and on pixels, and accuracy, per model and number of steps."""
    lines = [f"{'':22}{'fd':>8}{'fd px':>8}{'accuracy':>10}{'diversity':>11}"]
    for model in ("teacher", "student", "ladd_only"):
        for steps, score in report[model].items():
            lines.append(
                f"{model + ' ' + steps:22}{score['fd']:8.2f}{score['fd_pixels']:8.2f}{score['accuracy']:10.1%}"
                f"{score['diversity']:11.3f}"
            )
    floor = report["floor"]
    lines.append(f"{'real data (floor)':22}{floor['fd']:8.2f}{floor['fd_pixels']:8.2f}{floor['accuracy']:10.1%}")
    return "\n".join(lines)

"""The whole story on the shipped mini model: cache teacher latents, distil, evaluate, draw.

python -m distill_core demo --out DIR [--seed N]
"""

from __future__ import annotations

import subprocess
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from . import mini, plots
from .backends.diffusers import DiffusersBackend
from .checkpoint import fingerprint, save_json, save_lora
from .data import CacheConfig, LatentDataset, cache_latents
from .denoiser import Cond, Denoiser, Guided
from .discriminators import LatentDiscriminator
from .methods.ladd import LADD, LADDConfig
from .metrics import MiniEvaluator
from .process import FlowProcess
from .samplers import sample
from .schedules import shifted_sigmas
from .train import Run, TrainConfig, train

STUDENT_STEPS = (1, 2, 4)
TEACHER_STEPS = (1, 2, 4, 25)
LEVELS = (1.0, 0.75, 0.5, 0.25)


@dataclass(frozen=True)
class DemoConfig:
    """Settings of the demo; the numbers were tuned on seeds 100 and above, results are reported for others."""

    cache: CacheConfig = CacheConfig(
        count=3072, steps=16, guidance=mini.GUIDANCE, sizes=(mini.LATENT_SHAPE[1:],), state_sigmas=LEVELS,
        shard_size=512, batch_size=128,
    )  # fmt: skip
    train: TrainConfig = TrainConfig(steps=300, batch_size=48, student_lr=3e-4, discriminator_lr=2e-3)
    ladd: LADDConfig = LADDConfig(renoise_mean=0.0, warmup_steps=60, warmup_probabilities=(0.5, 0.5, 0.0, 0.0))
    mixed_terms: dict[str, float] = field(default_factory=lambda: {"adversarial": 1.0, "pairs": 1.0})
    rank: int = 32
    head_width: int = 64
    images: int = 1000


def mini_backend(gradient_checkpointing: bool = False) -> DiffusersBackend:
    """The shipped transformer as a backend (flow, no shift)."""
    return DiffusersBackend(mini.load_transformer(), FlowProcess(1000.0, shift_alpha=1.0), gradient_checkpointing)


def mini_conditioning() -> tuple[Cond, Cond]:
    """The ten class conditionings and the empty one (a row of its own)."""
    table = mini.load_conditioning()
    cond = Cond(table["context"], table["pooled"])
    return cond[: mini.NULL_CLASS], cond[mini.NULL_CLASS :]


def new_ladd(backend: DiffusersBackend, dataset: LatentDataset, config: DemoConfig, ladd: LADDConfig) -> LADD:
    """Teacher, LoRA student and discriminator on one backbone; every weight is initialised from the training seed."""
    torch.manual_seed(config.train.seed)
    student, teacher = Denoiser(backend, backend.new_path(config.rank)), Denoiser(backend)
    example = dataset.batch(0, 2, config.train.seed)
    discriminator = LatentDiscriminator.for_teacher(teacher, backend.tap_names, example, width=config.head_width)
    return LADD(student, teacher, discriminator, backend.tap_names, ladd, dataset.uncond(), config.cache.guidance)


def draw_samples(model, steps: int, sampler: str, seed: int, count: int, conds: Cond) -> Tensor:
    """``count`` latents from the same noises and classes whatever the model: item i has class i mod 10."""
    sigmas, parts = shifted_sigmas(steps, shift_alpha=1.0), []
    for start in range(0, count, 250):
        items = range(start, min(start + 250, count))
        cond = conds[[i % len(conds) for i in items]]
        parts.append(sample(model, model.process, sigmas, cond, mini.LATENT_SHAPE, seed, items, sampler))
    return torch.cat(parts)


def run_training(backend: DiffusersBackend, dataset: LatentDataset, ladd: LADDConfig, config: DemoConfig, name: str):
    """Train one student with a progress bar; returns its view, the finished `Run` and the logs of all steps."""
    method = new_ladd(backend, dataset, config, ladd)
    run = Run(method, dataset, config.train)
    logs = []
    with tqdm(total=config.train.steps, desc=f"distil: {name}") as bar:
        for event in train(run):
            logs.append(event.logs)
            bar.set_postfix({k: f"{event.logs[k]:.3f}" for k in ("adversarial", "accuracy") if k in event.logs})
            bar.update()
    return method.student, run, logs


def evaluate_student(
    student: Denoiser, run: Run, evaluator: MiniEvaluator, config: DemoConfig, seed: int
) -> tuple[dict, dict]:
    """Scores and latents of the averaged student at each of its step counts."""
    classes, _ = mini_conditioning()
    labels = torch.arange(config.images) % len(classes)
    scores, latents = {}, {}
    with run.ema_weights():
        for steps in STUDENT_STEPS:
            latents[steps] = draw_samples(student, steps, "renoise", seed, config.images, classes)
            scores[str(steps)] = evaluator(latents[steps], labels)
    return scores, latents


def git_commit() -> str:
    """The commit of this source tree, or "unknown" outside a checkout."""
    try:
        return subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def cache_dataset(backend: DiffusersBackend, cache: CacheConfig, folder: Path) -> LatentDataset:
    """The teacher's latents, with a progress bar."""
    classes, empty = mini_conditioning()
    teacher = Guided(Denoiser(backend), empty, cache.guidance)
    with tqdm(total=cache.count, desc="cache: teacher latents") as bar:
        for done, _, _ in cache_latents(teacher, classes, mini.LATENT_SHAPE[0], cache, folder):
            bar.update(done - bar.n)
    return LatentDataset(folder)


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


def describe(backend: DiffusersBackend, method: str, config: DemoConfig, ladd: LADDConfig) -> dict:
    """The metadata of the student's LoRA (DESIGN: files we write)."""
    return {
        "method": method, "sigmas": list(ladd.student_sigmas), "sampler": "renoise", "cfg": 1.0, "shift_alpha": "1.0",
        "prediction": "flow", "family": backend.family_name, "base": fingerprint(backend.network),
        "steps": config.train.steps, "config": {**asdict(ladd), **asdict(config.train)},
    }  # fmt: skip


def demo(out: str | Path, seed: int = 0, config: DemoConfig = DemoConfig()) -> dict:
    """Run everything into the folder ``out`` and return the report.

    Writes report.json, samples.png, curves.png, student.safetensors and the cached dataset. ``seed`` decides the noises
    of the teacher's latents, of the training and of the evaluation.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    started = time.time()
    config = replace(config, cache=replace(config.cache, seed=seed), train=replace(config.train, seed=seed))
    evaluation_seed = seed + 1_000_000
    backend, evaluator = mini_backend(), MiniEvaluator()
    dataset = cache_dataset(backend, config.cache, out / f"dataset-seed{seed}")

    mixed = replace(config.ladd, terms=config.mixed_terms)
    student, run, mixed_logs = run_training(backend, dataset, mixed, config, "LADD + " + _extras(mixed))
    student_scores, student_latents = evaluate_student(student, run, evaluator, config, evaluation_seed)
    with run.ema_weights():
        save_lora(out / "student.safetensors", student.path.export(), describe(backend, "ladd", config, mixed))
    student.path.remove()

    pure = replace(config.ladd, terms={"adversarial": 1.0})
    pure_student, pure_run, pure_logs = run_training(backend, dataset, pure, config, "LADD only")
    pure_scores, _ = evaluate_student(pure_student, pure_run, evaluator, config, evaluation_seed)
    pure_student.path.remove()

    teacher_scores, teacher_latents = evaluate_teacher(backend, evaluator, config, evaluation_seed)
    rows = [(f"teacher, {steps} x 2 forwards", teacher_latents[steps]) for steps in TEACHER_STEPS]
    rows += [(f"student, {steps} forward{'s' * (steps > 1)}", student_latents[steps]) for steps in STUDENT_STEPS]
    count = len(mini.CLASS_NAMES)
    pictures = [(label, evaluator.decode(latents[:count])) for label, latents in rows]
    plots.sample_grid(pictures, mini.CLASS_NAMES, out / "samples.png", "same noise and class in every column")
    plots.training_curves({"LADD + " + _extras(mixed): mixed_logs, "LADD only": pure_logs}, out / "curves.png")

    report = {
        "teacher": teacher_scores, "student": student_scores, "ladd_only": pure_scores,
        "floor": mini.training_log()["floor"], "config": asdict(config), "seconds": round(time.time() - started, 1),
        "seed": seed, "commit": git_commit(),
    }  # fmt: skip
    save_json(out / "report.json", report)
    print(table(report))
    return report


def _extras(config: LADDConfig) -> str:
    return " + ".join(name for name, weight in config.terms.items() if weight and name != "adversarial")


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

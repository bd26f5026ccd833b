"""The demo's student beside the teacher at 25 steps, on 10,000 common noises: what README says, with its intervals.

    python tests/benchmarks/student_beside_teacher.py --out DIR [--seeds 0 31] [--images 10000]

Seed 0 is the shipped student; of any other seed one is trained as the demo trains it. The evaluation's noises are the
same for all. About 15 minutes of one processor for the teacher, 4 for a student and 4 for its training; a stopped
command goes on. Prints a Markdown table: each figure, and the students' differences to the teacher.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from distill_core.evaluation.metrics import MiniEvaluator
from distill_core.evaluation.samples import REFERENCE
from distill_core.experiments.demo import DemoConfig, cache_dataset, draw_samples, machine, train_student
from distill_core.experiments.results import read_result, result_path, save_result
from distill_core.files import git_commit, load_tensors, save_tensors
from distill_core.lora_files import read_lora, save_lora
from distill_core.models import mini
from distill_core.models.denoiser import Denoiser, Guided
from distill_core.models.mini import mini_backend, mini_conditioning

STEPS, TEACHER_STEPS, REFERENCE_IMAGES, OWN_IMAGES = (1, 4), 25, 1000, 2000
SHOWN = ("fd", "fd_pixels", "accuracy", "diversity", "coverage", "detail_ratio", "coherence", "drift")


def student_file(out: Path, seed: int) -> Path:
    if seed == 0:
        return mini.ASSETS / "student.safetensors"
    path, config = out / f"student-{seed}.safetensors", DemoConfig().seeded(seed)
    if not path.exists():
        cache_dataset(mini_backend(), config.cache, out / f"dataset-{seed}")
        save_lora(path, *train_student(out / f"dataset-{seed}", config, config.mixed)[:2])
    return path


def latents_of(out: Path, name: str, *args, **options) -> torch.Tensor:
    """`draw_samples`, kept in a file."""
    path = out / "latents" / f"{name}.safetensors"
    if not path.exists():
        save_tensors(path, {"latents": draw_samples(*args, **options)})
    return load_tensors(path)[0]["latents"]


def score(out: Path, seeds: list[int], images: int) -> None:
    (classes, empty), backend = mini_conditioning(), mini_backend()
    labels = torch.arange(images) % len(classes)
    teacher = Guided(Denoiser(backend), empty, mini.GUIDANCE)
    walk = dict(sampler="euler", seed=0, conds=classes)
    own = latents_of(out, "teacher", teacher, TEACHER_STEPS, count=images, **walk)
    reference = latents_of(out, "reference", teacher, TEACHER_STEPS, count=REFERENCE_IMAGES, purpose=REFERENCE, **walk)
    evaluator, about = MiniEvaluator(examples=reference), {"images": images, "machine": machine()}
    if not (path := result_path(out, "teacher")).exists():
        scores = {str(TEACHER_STEPS): evaluator(own, labels, own[:OWN_IMAGES])}
        save_result(path, scores, entry="teacher", seed=None, commit=git_commit(), **about)
    for seed in seeds:
        if (path := result_path(out, "student", seed)).exists():
            continue
        lora = backend.open_lora(read_lora(student_file(out, seed))[0])
        scores = {}
        for steps in STEPS:
            options = dict(sampler="ancestral", seed=0, count=images, conds=classes)
            x = latents_of(out, f"student-{seed}-{steps}", Denoiser(backend, lora), steps, **options)
            scores[str(steps)] = evaluator(x, labels, own[:OWN_IMAGES])
        lora.remove()
        save_result(path, scores, entry="student", seed=seed, commit=git_commit(), **about)


def table(out: Path, seeds: list[int]) -> str:
    teacher = read_result(result_path(out, "teacher"))["scores"][str(TEACHER_STEPS)]
    rows = {f"teacher, {TEACHER_STEPS} steps": teacher}
    for seed in seeds:
        for steps, figures in read_result(result_path(out, "student", seed))["scores"].items():
            rows[f"student {seed}, {steps}"] = figures
            rows[f"less teacher ({seed}, {steps})"] = {name: f - teacher[name] for name, f in figures.items()}
    lines = [f"| model | {' | '.join(SHOWN)} |", "|---" * (len(SHOWN) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(f'{of[key]:.3f}' for key in SHOWN)} |" for name, of in rows.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 31])
    parser.add_argument("--images", type=int, default=10_000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    score(args.out, args.seeds, args.images)
    print(table(args.out, args.seeds))


if __name__ == "__main__":
    main()

"""What Seed Variety's aids do to the shipped mini student: diversity against quality.

    python tests/benchmarks/seed_variety.py [--seeds 6000001 6000002 6000003] [--count 1000] [--out FILE.json]

For each seed: the teacher (25 Euler steps, guided), and the student at 1, 2 and 4 steps without an aid, with each aid,
and with what was tried and left out. All entries have the same noises. diversity: mean spread within a class in the
latent classifier's features. gap: the part of the distance from the plain student's diversity to the teacher's that is
made up. The strengths were chosen on seed 5000001.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from distill_core.diffusion.noise import ItemNoise
from distill_core.diffusion.samplers import sample
from distill_core.diffusion.schedules import grid_sigmas
from distill_core.diffusion.variety import noised_prompt, stronger_noise
from distill_core.evaluation.metrics import mini_scores
from distill_core.files import git_commit, save_json
from distill_core.lora_files import read_lora
from distill_core.models import mini
from distill_core.models.denoiser import Cond, Denoiser, Guided
from distill_core.presets.recipe import student_levels

Change = Callable[[Tensor, Tensor, Cond, ItemNoise], tuple[Tensor, Tensor, Cond]]  # of the first call: x, sigma, cond
STEPS, SIZE = (1, 2, 4), 100


class FirstStep:
    """A model whose first call is changed."""

    def __init__(self, model, change: Change, noise: ItemNoise) -> None:
        self.model, self.process, self.change, self.noise = model, model.process, change, noise

    def __call__(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        return self.model(*(self.change(x, sigma, cond, self.noise) if sigma[0] > 0.99 else (x, sigma, cond)))


def prompt_noise(strength: float) -> Change:
    def change(x, sigma, cond, noise):
        varied = {
            name: noised_prompt(value, noise.named(name).normal_like(value), strength)
            for name, value in cond.tensors().items()
        }
        return x, sigma, Cond.from_tensors(varied)

    return change


def more_noise(strength: float) -> Change:
    return lambda x, sigma, cond, noise: (stronger_noise(x, strength), sigma, cond)


def weaker_prompt(share: float) -> Change:
    """The prompt scaled down: tried, not offered."""
    return lambda x, sigma, cond, noise: (x, sigma, cond.map(lambda value: (1 - share) * value))


def lower_time(share: float) -> Change:
    """The network told of less noise than there is: tried, not offered."""
    return lambda x, sigma, cond, noise: (x, (1 - share) * sigma, cond)


ENTRIES: dict[str, Change | None] = {
    "plain": None,
    "prompt noise .5": prompt_noise(0.5),
    "prompt noise 1": prompt_noise(1.0),
    "stronger noise .5": more_noise(0.5),
    "stronger noise 1": more_noise(1.0),
    "tried: prompt x .8": weaker_prompt(0.2),
    "tried: told .9 of the noise": lower_time(0.1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[6000001, 6000002, 6000003])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--out", type=Path, help="kept up to date after each entry, and gone on from")
    args = parser.parse_args()
    results = json.loads(args.out.read_text())["results"] if args.out and args.out.exists() else {}
    backend, evaluate = mini.mini_backend(), mini_scores
    conds, uncond = mini.mini_conditioning()
    state, description = read_lora(mini.ASSETS / "student.safetensors")
    teacher, student = Guided(Denoiser(backend), uncond, mini.GUIDANCE), Denoiser(backend, backend.open_lora(state))
    labels = torch.arange(args.count) % len(conds)

    def score(key: str, model, sigmas: Tensor, seed: int, change: Change | None, **sampler) -> None:
        if key in results:
            return
        latents = []
        for items in torch.arange(args.count).split(SIZE):
            noise = ItemNoise(seed, items.tolist(), "variety")
            walked = FirstStep(model, change, noise) if change else model
            cond = conds[[item % len(conds) for item in items.tolist()]]
            rows = dict(seed=seed, items=items.tolist())
            latents.append(sample(walked, backend.process, sigmas, cond, mini.LATENT_SHAPE, **rows, **sampler))
        results[key] = evaluate(torch.cat(latents), labels, pixels=False)
        print(key, results[key], flush=True)
        if args.out:
            save_json(args.out, {"count": args.count, "commit": git_commit(), "results": results})

    own = {"sampler": description["sampler"], **description.get("sampler_options", {})}
    for seed in args.seeds:
        score(f"{seed} teacher", teacher, grid_sigmas(backend.process, 25), seed, None, sampler="euler")
        for steps in STEPS:
            for name, change in ENTRIES.items():
                score(
                    f"{seed} {steps} {name}", student, student_levels(description["sigmas"], steps), seed, change, **own
                )
    print(table(results, args.seeds))


def table(results: dict, seeds: list[int]) -> str:
    """Medians over the seeds, with the worst one of the gap and of fd's ratio to the plain student."""
    lines = ["| steps | entry | fd | accuracy | diversity | gap made up (worst) | fd / plain (worst) |"]
    lines.append("|---|---|---|---|---|---|---|")
    for steps in STEPS:
        for name in ENTRIES:
            rows = [results[f"{seed} {steps} {name}"] for seed in seeds]
            plain = [results[f"{seed} {steps} plain"] for seed in seeds]
            aims = [results[f"{seed} teacher"]["diversity"] for seed in seeds]
            gaps = [
                (row["diversity"] - base["diversity"]) / (aim - base["diversity"])
                for row, base, aim in zip(rows, plain, aims, strict=True)
            ]
            ratios = [row["fd"] / base["fd"] for row, base in zip(rows, plain, strict=True)]
            middle = [statistics.median(row[key] for row in rows) for key in ("fd", "accuracy", "diversity")]
            behind = all(aim > base["diversity"] for aim, base in zip(aims, plain, strict=True))
            gap = f"{statistics.median(gaps):.0%} ({min(gaps):.0%})" if behind else "none to make up"
            figures = f"{middle[0]:.2f} | {middle[1]:.1%} | {middle[2]:.3f}"
            lines.append(
                f"| {steps} | {name} | {figures} | {gap} | {statistics.median(ratios):.2f} ({max(ratios):.2f}) |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""Five ways to teach a turbo model a style, at one budget: ``python tests/benchmarks/tune_turbo.py --out DIR``.

The mini turbo (shipped teacher and its four-step LoRA) learns five classes of Fashion-MNIST in a style that it does not
know, from 100, 30 or 10 pictures; the other five classes are what it is to keep. Every run writes its students and a
JSON file, and is left out where that is there. Then ``table.md``, ``curves.png`` and ``samples.png`` are made.

``--pictures`` is the folder with Fashion-MNIST's idx.gz files, those of Debian's package dataset-fashion-mnist.
``--only "tune-*-10-*"`` takes the runs whose names fit a pattern.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from fnmatch import fnmatch
from pathlib import Path

import torch
from tune_ground import KEPT, Ground, Lora, turbo_lora, with_loras
from tune_recipes import RECIPES, TUNE, TUNE_TRAIN, Clock, Trial, Work, new_training, own_and_kept, tune
from tune_results import (
    OURS,
    SEEDS,
    STEPS,
    Results,
    curves,
    few_pictures,
    other_rates,
    samples,
    score_beside_truth,
    table,
)

from distill_core.data.dataset import LatentDataset
from distill_core.data.fashion_mnist import DEBIAN_DATA
from distill_core.evaluation.retention_watch import retention_listeners
from distill_core.files import git_commit, load_tensors, save_json, save_tensors
from distill_core.lora_files import read_lora
from distill_core.training.run import train_to_end
from distill_core.training.run_folder import RunFolder

TUNING_SEED = 100
STRENGTHS = (0.15, 0.3)  # of finished LoRAs
RATES = {"denoising": (1e-4, 3e-4), "adapter": (1e-4,), "stacked": (1e-4,)}
TOO_HIGH, KEEP_AT_LEAST = 2e-2, 0.7  # rate and limit of the run that the stop rule ends
LOWER = [Trial(r, 100, "turned", TUNING_SEED, rate) for r, rates in RATES.items() for rate in rates]
TRIALS = [
    *(Trial(recipe, 100, "turned", seed) for seed in SEEDS for recipe in RECIPES),
    *(Trial("tune", 10, "turned", seed) for seed in SEEDS),
    *LOWER,
    *(Trial(recipe, 100, "inverted", seed) for seed in SEEDS for recipe in RECIPES),
    *(Trial("tune", 30, "turned", seed) for seed in SEEDS),
    *(Trial("denoising", 10, "turned", seed) for seed in SEEDS),
]


def run_trial(trial: Trial, ground: Ground, out: Path) -> None:
    """Train and judge what has not been yet."""
    folder, clock = out / trial.name, Clock()
    path = folder / "result.json"
    if path.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    ground.save_own(trial.pictures, trial.seed, folder / "own")
    work = Work(trial, ground, LatentDataset(folder / "own"), folder, out, clock)
    points = []
    for step, lora in RECIPES[trial.recipe](work):
        save_tensors(folder / f"step-{step}.safetensors", lora)
        points.append({"step": step, "cpu_s": round(clock.seconds, 1)})
    for point in points:
        last = point is points[-1]
        lora = load_tensors(folder / f"step-{point['step']}.safetensors")[0]
        point["figures"] = ground.judge(lora, STEPS if last else STEPS[-1:])
        point["retention"] = ground.retention(lora)
        print(trial.name, point, flush=True)
    save_json(path, {"trial": asdict(trial), "points": points, "images": ground.images, "commit": git_commit()})


def weaken(trial: Trial, ground: Ground, out: Path) -> None:
    """What the others do about lost steps without training: the finished LoRA at a lower strength."""
    folder = out / trial.name
    if trial.recipe == OURS or (folder / "strengths.json").exists():
        return
    last = json.loads((folder / "result.json").read_text())["points"][-1]["step"]
    lora, found = load_tensors(folder / f"step-{last}.safetensors")[0], {}
    for strength in STRENGTHS:
        weak = {name: strength * value if "lora_B" in name else value for name, value in lora.items()}
        found[f"{strength:g}"] = ground.judge(weak, STEPS[-1:])["4"]
        print(trial.name, strength, found[f"{strength:g}"], flush=True)
    save_json(folder / "strengths.json", found)


def look_for_copies(trial: Trial, ground: Ground, out: Path) -> None:
    """Whether few pictures have made the samples of ours alike, or copies."""
    path = out / trial.name / "variety.json"
    if trial.recipe != OURS or path.exists():
        return
    last = json.loads((path.parent / "result.json").read_text())["points"][-1]["step"]
    lora = load_tensors(path.parent / f"step-{last}.safetensors")[0]
    save_json(path, ground.variety(lora, ground.own_pictures(trial.pictures, trial.seed)))


def unnamed(ground: Ground, out: Path) -> None:
    """What becomes of two kept classes whose prompts are not among those to keep, beside one where they are."""
    path, seed = out / "unnamed.json", SEEDS[0]
    if path.exists():
        return
    trial, folder = Trial("three-named", 100, ground.change, seed), out / "three-named"
    folder.mkdir(exist_ok=True)
    ground.save_own(trial.pictures, seed, folder / "own")
    work = Work(trial, ground, LatentDataset(folder / "own"), folder, out, Clock())
    students: dict[str, Lora | None] = {"before": None}
    *_, (_, students["three of five named"]) = tune(work, KEPT[:3])
    results = Results(out, [Trial(recipe, 100, ground.change, seed) for recipe in (OURS, "denoising")])
    students |= {trial.recipe: results.student(trial) for trial in results.found}
    found = {name: ground.distance(lora, KEPT[3:]) for name, lora in students.items()}
    print("classes that are not named", found, flush=True)
    save_json(path, {"classes": KEPT[3:], "fd": found})


def stop_rule(ground: Ground, out: Path) -> None:
    """Ten pictures at a rate far too high, without the stop rule and with it."""
    path = out / "stop_rule.json"
    if path.exists():
        return
    found = {}
    for at_least in (0.0, KEEP_AT_LEAST):
        trial = Trial("tune", 10, ground.change, TUNING_SEED, TOO_HIGH)
        folder = out / f"stop-rule-{at_least:g}"
        folder.mkdir(exist_ok=True)
        ground.save_own(trial.pictures, trial.seed, folder / "own")
        backend = with_loras(turbo_lora())
        work = Work(trial, ground, LatentDataset(folder / "own"), folder, out, Clock())
        config = replace(TUNE_TRAIN, student_lr=TOO_HIGH, retention_every=10, keep_at_least=at_least)
        run, described = new_training(work, backend, TUNE, config, own_and_kept(work, backend), folder=folder)
        logs, student = RunFolder(folder), folder / "student.safetensors"
        ended = train_to_end(run, described, logs, student, listeners=retention_listeners(run, described))
        found[f"{at_least:g}"] = {
            "ended": ended or f"at its last step, {run.step}",
            "course": {e["step"]: round(e["retention"], 3) for e in logs.logs() if "retention" in e},
            "figures": ground.judge(read_lora(student)[0], STEPS[-1:])["4"],
        }
        print("stop rule", at_least, found[f"{at_least:g}"], flush=True)
    save_json(path, found)


def before(ground: Ground, out: Path) -> dict:
    """The turbo as it is, and held-out pictures, by the same measures."""
    path = out / f"before-{ground.change}.json"
    if not path.exists():
        save_json(path, {"figures": ground.judge(None, STEPS), "floor": ground.floor(), "images": ground.images})
    return json.loads(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for runs and what they show")
    parser.add_argument("--pictures", type=Path, default=Path(DEBIAN_DATA), help="folder with the idx.gz files")
    parser.add_argument("--images", type=int, default=200, help="samples of own and of kept classes in a judgement")
    parser.add_argument("--only", nargs="+", default=["*"], help="take the runs whose names fit one of these patterns")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    wanted = lambda name: any(fnmatch(name, pattern) for pattern in args.only)  # noqa: E731
    trials = [t for t in TRIALS if wanted(t.name)]
    grounds: dict[str, Ground] = {}
    for trial in trials:
        if trial.change not in grounds:
            grounds[trial.change] = Ground(args.pictures, args.out, trial.change, args.images)
            before(grounds[trial.change], args.out)
        run_trial(trial, grounds[trial.change], args.out)
        if trial in TRIALS[: len(SEEDS) * len(RECIPES)]:  # 100 pictures, turned
            weaken(trial, grounds[trial.change], args.out)
        look_for_copies(trial, grounds[trial.change], args.out)
    results = Results(args.out, TRIALS)
    text = "\n".join([table(results), few_pictures(results), other_rates(results), score_beside_truth(results)])
    (args.out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    curves(results, args.out / "curves.png")
    if wanted("unnamed"):
        unnamed(grounds.setdefault("turned", Ground(args.pictures, args.out, "turned", args.images)), args.out)
    if wanted("stop-rule"):
        stop_rule(grounds.setdefault("turned", Ground(args.pictures, args.out, "turned", args.images)), args.out)
    if "turned" in grounds:
        samples(results, grounds, args.out / "samples.png")


if __name__ == "__main__":
    main()

"""All methods on the mini model at one budget: ``python -m distill_core compare --out DIR``.

Every entry of `ENTRIES` is trained and evaluated for every seed, one after the other, on one thread; each run's result
is written when it is done, so the command can be stopped and started again, and the table so far is always there.
Budgets are equal in processor time: an entry's steps are those that took about `BUDGET` seconds on the machine the
table in docs/methods.md was made on. Teacher latents and their paths are cached before and not counted, for any method.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import mini, plots
from .build import Parts, VisionConfig, new_method
from .checkpoint import load_tensors, save_json, save_tensors
from .data import LatentDataset
from .demo import (
    EVALUATION_SEED,
    DemoConfig,
    cache_dataset,
    draw_samples,
    git_commit,
    machine,
    mini_backend,
    mini_conditioning,
)
from .denoiser import Denoiser, Guided
from .methods.add import ADDConfig
from .methods.diffusion2gan import Diffusion2GANConfig
from .methods.ladd import LADDConfig
from .methods.student import MethodConfig
from .metrics import MiniEvaluator
from .train import Run, TrainConfig, train

BUDGET = 70
IMAGES = 1000
RANK = 32
VISION_SIZE = 32  # px, for the encoder under ADD's heads; the images' own 64 px would cost four times as much
TEACHER_STEPS = (1, 2, 4, 25)
CACHE = DemoConfig().cache
DRIFT_IMAGES = 300


@dataclass(frozen=True)
class Entry:
    """One configuration: the method's settings, the loop's, and how the student is sampled.

    steps: the step counts it is evaluated at.  eta: of the ancestral sampler.  pretrained: whether the student starts
    as the teacher; else as a network of random weights, all of them trained.
    """

    method: MethodConfig
    train: TrainConfig
    steps: tuple[int, ...] = (1, 2, 4)
    eta: float = 1.0
    pretrained: bool = True


def settings(steps: int, batch_size: int = 32, student_lr: float = 6e-4, **more) -> TrainConfig:
    return TrainConfig(steps, batch_size, student_lr=student_lr, **{"discriminator_lr": 4e-3, **more})


def for_add(steps: int) -> TrainConfig:
    """Decoding is what costs, so the heads take four updates on each decoded batch."""
    return settings(steps, 16, 4e-4, discriminator_lr=1e-2, discriminator_updates=4)


LADD_SETTINGS = LADDConfig(
    probabilities=(0.4, 0.2, 0.2, 0.2), warmup_probabilities=(0.5, 0.5, 0.0, 0.0), warmup_steps=30, renoise_mean=0.0
)
ADD_SETTINGS = ADDConfig(probabilities=(0.55, 0.15, 0.15, 0.15))
PAIRS = Diffusion2GANConfig({"pairs": 1.0})
ONE_STEP = (1,)

# The methods, and with them what the claims of the papers need (docs/methods.md).
ENTRIES: dict[str, Entry] = {
    "Diffusion2GAN": Entry(Diffusion2GANConfig(), settings(106), ONE_STEP),
    "ADD": Entry(ADD_SETTINGS, for_add(76)),
    "LADD": Entry(LADD_SETTINGS, settings(175, student_lr=4e-4), eta=0.5),
    "pairs only": Entry(PAIRS, settings(420), ONE_STEP),
    "consistency only": Entry(replace(LADD_SETTINGS, terms={"consistency": 1.0}), settings(225)),
    "ADD, adversarial only": Entry(replace(ADD_SETTINGS, terms={"adversarial": 1.0}), for_add(86)),
    "LADD + pairs": Entry(replace(LADD_SETTINGS, terms={"adversarial": 1.0, "pairs": 1.0}), settings(175)),
    "ADD, distillation only": Entry(replace(ADD_SETTINGS, terms={"distillation": 2.5}), for_add(106)),
    "pairs only, mse": Entry(replace(PAIRS, regression="mse"), settings(420), ONE_STEP),
    "pairs only, random start": Entry(PAIRS, settings(420), ONE_STEP, pretrained=False),
    "Diffusion2GAN, LADD's discriminator": Entry(
        LADDConfig(
            {"pairs": 1.0, "adversarial": 0.1}, (1.0,), (1.0,), (1.0,), gan_loss="nonsaturating", renoise_mean=0.0
        ),
        settings(175), ONE_STEP,
    ),
    "Diffusion2GAN, plain discriminator": Entry(
        Diffusion2GANConfig(r1=0.0, mix_share=0.0, noise_condition=False, multi_scale=False), settings(110), ONE_STEP
    ),
}  # fmt: skip


def initial_student(entry: Entry, method) -> None:
    """Random weights for the student where the entry asks for them."""
    if entry.pretrained:
        return
    for module in method.student.backend.network.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


def prepare(entry: Entry, dataset: LatentDataset, seed: int, folder: Path | None = None) -> Run:
    """The entry's run on the mini model; every weight comes from the seed."""
    config = replace(entry.train, seed=seed)
    backend, autoencoder = mini_backend(), mini.load_autoencoder()

    def decode(latents: Tensor) -> Tensor:
        return autoencoder.decoder(latents.contiguous(memory_format=torch.channels_last))

    parts = Parts(backend, decode, autoencoder.encoder)
    torch.manual_seed(seed)
    rank = RANK if entry.pretrained else 0
    example, uncond = dataset.batch(0, 16, seed), dataset.uncond()
    method = new_method(
        entry.method, parts, example, rank, uncond, mini.GUIDANCE, taps=taps_of(entry, backend),
        vision=VisionConfig(size=VISION_SIZE),
    )  # fmt: skip
    initial_student(entry, method)
    return Run(method, dataset, config, folder, {"entry": asdict(entry)})


def taps_of(entry: Entry, backend) -> Sequence[str] | None:
    return backend.tap_names if isinstance(entry.method, LADDConfig) else None


class ForwardCount:
    """How many items have passed each network; hooks on whole networks, so that early exits count as one."""

    def __init__(self, **networks: nn.Module) -> None:
        self.items: dict[str, int] = dict.fromkeys(networks, 0)
        for name, network in networks.items():
            network.register_forward_pre_hook(self._hook(name), with_kwargs=True)

    def _hook(self, name: str):
        def count(module, args, kwargs):
            self.items[name] += len(args[0] if args else kwargs["hidden_states"])

        return count


def counted_networks(method) -> dict[str, nn.Module]:
    """Backbone and, where they exist, the student's or discriminator's own copies of it and the vision network."""
    networks = {"backbone": method.teacher.backend.network}
    if method.student.backend is not method.teacher.backend:
        networks["student copy"] = method.student.backend.network
    critic = getattr(method.discriminator, "critic", None)
    if critic is not None and critic.backend is not method.teacher.backend:
        networks["discriminator copy"] = critic.backend.network
    vision = getattr(method, "vision", None)
    if vision is not None:
        networks["vision"] = vision.network
    return networks


def train_entry(entry: Entry, dataset: LatentDataset, seed: int) -> tuple[Run, dict]:
    """Train; returns the run and what it cost: processor and wall seconds, and items through each network."""
    run = prepare(entry, dataset, seed)
    count = ForwardCount(**counted_networks(run.method))
    wall, cpu, logs = time.monotonic(), time.process_time(), []
    for event in train(run):
        logs.append(event.logs)
    cost = {"cpu_s": round(time.process_time() - cpu, 1), "wall_s": round(time.monotonic() - wall, 1)}
    return run, {**cost, "steps": run.step, "forwards": count.items, "last": averages(logs[-50:])}


def averages(logs: Sequence[dict[str, float]]) -> dict[str, float]:
    names = sorted({name for entry in logs for name in entry})
    values = {name: [entry[name] for entry in logs if name in entry] for name in names}
    return {name: round(sum(v) / len(v), 4) for name, v in values.items()}


@torch.no_grad()
def evaluate(model, entry_steps: Sequence[int], sampler: dict, evaluator, seed: int, own: Tensor | None) -> dict:
    """Scores at each step count; at one step also ``drift``: the relative RMS distance to ``own``, where the teacher's
    own paths from the same noises and classes end."""
    classes, _ = mini_conditioning()
    labels, scores = torch.arange(IMAGES) % len(classes), {}
    for steps in entry_steps:
        latents = draw_samples(model, steps, seed=seed + EVALUATION_SEED, count=IMAGES, conds=classes, **sampler)
        scores[str(steps)] = evaluator(latents, labels, pixels=steps == 1)
        if own is not None and steps == 1:
            distance = (latents[: len(own)] - own).square().mean() / own.var()
            scores["1"]["drift"] = round(distance.sqrt().item(), 4)
    return scores


def evaluate_teacher(evaluator: MiniEvaluator, seed: int, folder: Path) -> Tensor:
    """Score the guided teacher (two forwards a step) once a seed; returns the ends of its paths from the first noises,
    solved as the cached ones are."""
    path, ends = folder / f"teacher-{seed}.json", folder / f"teacher-{seed}.safetensors"
    classes, empty = mini_conditioning()
    teacher = Guided(Denoiser(mini_backend()), empty, mini.GUIDANCE)
    if not ends.exists():
        noises = seed + EVALUATION_SEED
        save_tensors(ends, {"latents": draw_samples(teacher, CACHE.steps, "euler", noises, DRIFT_IMAGES, classes)})
    if not path.exists():
        scores = evaluate(teacher, TEACHER_STEPS, {"sampler": "euler"}, evaluator, seed, None)
        save_json(path, {"entry": "teacher", "seed": seed, "scores": scores})
    return load_tensors(ends)[0]["latents"]


def result_path(folder: Path, name: str, seed: int) -> Path:
    return folder / f"{name.replace(' ', '_').replace(',', '')}-{seed}.json"


def compare(out: Path, seeds: Sequence[int], names: Sequence[str]) -> None:
    """Run what has no result yet, seed by seed; the table and the picture are renewed after every run."""
    unknown = sorted(set(names) - ENTRIES.keys())
    if unknown:
        raise ValueError(f"no entry {unknown}; known: {', '.join(ENTRIES)}")
    torch.set_num_threads(1)
    evaluator = MiniEvaluator()
    for seed in seeds:
        folder = out / f"dataset-{seed}"
        cache_dataset(mini_backend(), replace(CACHE, seed=seed), folder)
        own = evaluate_teacher(evaluator, seed, out)
        for name in tqdm(names, desc=f"seed {seed}"):
            path = result_path(out, name, seed)
            if path.exists():
                continue
            entry = ENTRIES[name]
            run, cost = train_entry(entry, LatentDataset(folder), seed)
            with run.ema_weights():
                sampler = {"sampler": "ancestral", "eta": entry.eta}
                scores = evaluate(run.method.student, entry.steps, sampler, evaluator, seed, own)
            save_json(path, {
                "entry": name, "seed": seed, "scores": scores, **cost, "settings": asdict(entry),
                "commit": git_commit(), "machine": machine(),
            })  # fmt: skip
            report(out)


def read_results(out: Path) -> dict[str, list[dict]]:
    """All results in a folder by entry, the teacher's first."""
    found: dict[str, list[dict]] = {name: [] for name in ("teacher", *ENTRIES)}
    for path in sorted(out.glob("*.json")):
        result = json.loads(path.read_text())
        found.setdefault(result["entry"], []).append(result)
    return {name: results for name, results in found.items() if results}


def spread(values: Sequence[float], form: str = "{:.2f}") -> str:
    """Median and, of several values, the smallest and largest."""
    text = form.format(median(values))
    return text if len(values) == 1 else f"{text} ({form.format(min(values))}-{form.format(max(values))})"


def table(results: dict[str, list[dict]]) -> str:
    """Markdown: medians over seeds with the range, an entry and step count a row; forwards are items through networks
    in training, backbone, copies and vision network together."""
    lines = ["| entry | steps | seeds | fd | fd pixels | accuracy | diversity | drift | cpu s | wall s | forwards |"]
    lines.append("|---" * 11 + "|")
    for name, runs in results.items():
        for steps in runs[0]["scores"]:
            scores = [run["scores"][steps] for run in runs]
            cells = [spread([s[key] for s in scores]) if key in scores[0] else "" for key in ("fd", "fd_pixels")]
            cells += [spread([100 * s["accuracy"] for s in scores], "{:.1f}")]
            cells += [spread([s["diversity"] for s in scores])]
            cells += [spread([s["drift"] for s in scores]) if "drift" in scores[0] else ""]
            first = steps == next(iter(runs[0]["scores"])) and "cpu_s" in runs[0]
            cells += [f"{median(run[key] for run in runs):.0f}" if first else "" for key in ("cpu_s", "wall_s")]
            cells += [str(sum(runs[0]["forwards"].values())) if first else ""]
            lines.append(f"| {name} | {steps} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(out: Path) -> str:
    """Write table.md and compare.png for what has been run."""
    results = read_results(out)
    text = table(results)
    (out / "table.md").write_text(text + "\n")
    fd = {name: {s: [r["scores"][s]["fd"] for r in runs] for s in runs[0]["scores"]} for name, runs in results.items()}
    plots.comparison(fd, out / "compare.png")
    return text


def add_compare_command(commands) -> None:
    sub = commands.add_parser(
        "compare", help="Train every method on the mini model at one budget, three seeds; table and picture (hours).",
        description=__doc__,
    )  # fmt: skip
    sub.add_argument("--out", type=Path, required=True, help="output folder; a stopped command goes on there")
    sub.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    sub.add_argument("--entries", nargs="+", default=list(ENTRIES), help=f"of {', '.join(ENTRIES)}")
    sub.set_defaults(command=run_compare)


def run_compare(args) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    compare(args.out, args.seeds, args.entries)
    print(report(args.out))

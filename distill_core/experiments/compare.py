"""All methods on the mini model at one budget: ``python -m distill_core compare --out DIR``.

Every entry of `entries.ENTRIES` is trained and evaluated for every seed, each run on one thread; a run's result is
written when it is done, so the command can be stopped and started again, and the results so far are always there:
``table.md``, ``claims.md`` and ``compare.png``. Budgets are equal in processor time. Teacher latents and their paths
are cached before and not counted, for any method.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ..data.dataset import LatentDataset
from ..data.fashion_mnist import DEBIAN_DATA, read_split, upscale
from ..data.real import save_latents
from ..diffusion.noise import item_generator
from ..evaluation.metrics import MiniEvaluator
from ..files import fingerprint, git_commit, load_tensors, save_json, save_tensors
from ..methods.components import Components
from ..models import mini
from ..models.denoiser import Denoiser, Guided
from ..models.mini import mini_backend, mini_conditioning
from ..models.pipelines import MiniSource, ModelConfig
from ..perceptual import load_metric
from ..training.loop import Run, copy_into, train
from ..training.run import RunConfig, StudentConfig, new_run
from .demo import EVALUATION_SEED, DemoConfig, cache_dataset, draw_samples, machine
from .entries import ENTRIES, VISION, Entry
from .tables import report

IMAGES = 1000
RANK = 32
TEACHER_STEPS = (1, 2, 4, 25)
CACHE = DemoConfig().cache
DRIFT_IMAGES = 300


def start_from_random_weights(run: Run, seed: int) -> None:
    """Random weights for a student all of whose weights are trained."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for module in run.method.student.backend.network.modules():
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
    copy_into(run.ema, run.student_parameters)


def prepare(entry: Entry, dataset: LatentDataset, seed: int, folder: Path | None = None) -> Run:
    """The entry's run on the mini model; every weight comes from the seed."""
    source = MiniSource(ModelConfig())
    backend = source.backend
    distance = load_metric() if entry.perceptual else None
    identities: dict[str, Any] = {"base": fingerprint(backend.network), "dataset": dataset.digest()}
    identities |= {"pretrained": entry.pretrained, "perceptual": distance and distance.identity()}
    config = RunConfig(
        entry.method,
        replace(entry.train, seed=seed),
        StudentConfig(RANK if entry.pretrained else 0, sampler="ancestral", sampler_options={"eta": entry.eta}),
        identities,
        vision=VISION,
        taps=tuple(backend.tap_names) if entry.every_block else (),
        guidance=mini.GUIDANCE,
    )
    components = Components(backend, source.decode_with_gradient, source.encoder)
    run = new_run(config, components, dataset, folder, distance=distance)
    if not entry.pretrained:
        start_from_random_weights(run, seed)
    return run


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
    backbone = getattr(method.discriminator, "backbone", None)
    if backbone is not None and backbone.backend is not method.teacher.backend:
        networks["discriminator copy"] = backbone.backend.network
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
    """Scores at each step count; at one step also `against_own_paths`, if ``own`` is given."""
    classes, _ = mini_conditioning()
    labels, scores = torch.arange(IMAGES) % len(classes), {}
    for steps in entry_steps:
        latents = draw_samples(model, steps, seed=seed + EVALUATION_SEED, count=IMAGES, conds=classes, **sampler)
        scores[str(steps)] = evaluator(latents, labels, pixels=steps == 1)
        if own is not None and steps == 1:
            scores["1"] |= against_own_paths(latents[: len(own)], own, evaluator)
    return scores


def against_own_paths(latents: Tensor, own: Tensor, evaluator: MiniEvaluator) -> dict[str, float]:
    """How a student differs from the ends ``own`` of the teacher's paths from the same noises and classes.

    drift: relative RMS distance of the latents.  detail_error: by how much the decoded images have another amount of
    fine detail, |log| of the ratio of their energies.
    """
    drift = ((latents - own).square().mean() / own.var()).sqrt()
    ratio = fine_detail(evaluator.decode(latents)) / fine_detail(evaluator.decode(own))
    return {"drift": round(drift.item(), 4), "detail_error": round(ratio.log().abs().item(), 4)}


def fine_detail(images: Tensor) -> Tensor:
    """Mean energy of what is lost when images [N, C, H, W] are halved and enlarged again."""
    coarse = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bilinear", align_corners=False)
    return (images - coarse).square().mean()


def teacher_scores(evaluator: MiniEvaluator, seed: int, folder: Path) -> None:
    """Score the guided teacher (two forwards a step) once a seed, and keep the ends of its paths from the first noises,
    solved as the cached ones are."""
    path, ends = folder / f"teacher-{seed}.json", folder / f"teacher-{seed}.safetensors"
    if path.exists() and ends.exists():
        return
    classes, empty = mini_conditioning()
    teacher = Guided(Denoiser(mini_backend()), empty, mini.GUIDANCE)
    if not ends.exists():
        noises = seed + EVALUATION_SEED
        save_tensors(ends, {"latents": draw_samples(teacher, CACHE.steps, "euler", noises, DRIFT_IMAGES, classes)})
    if not path.exists():
        scores = evaluate(teacher, TEACHER_STEPS, {"sampler": "euler"}, evaluator, seed, None)
        save_json(path, {"entry": "teacher", "seed": seed, "scores": scores})


def cache_photographs(data: Path, seed: int, folder: Path) -> None:
    """As many real images as the teacher's dataset has, drawn from Fashion-MNIST and encoded, in a dataset's form."""
    if any(folder.glob("shard-*")) and len(LatentDataset(folder)) == CACHE.count:
        return
    images, labels = read_split(data, "train")
    chosen = torch.randperm(len(images), generator=item_generator(seed, 0))[: CACHE.count]
    encoder, (classes, empty) = mini.load_autoencoder().encoder, mini_conditioning()
    with torch.no_grad():
        latents = torch.cat([encoder(upscale(part)) for part in images[chosen].split(64)])
    save_latents(list(latents), [classes[c : c + 1] for c in labels[chosen].tolist()], empty, folder)


def result_path(folder: Path, name: str, seed: int) -> Path:
    return folder / f"{name.replace(' ', '_').replace(',', '')}-{seed}.json"


def run_entry(out: Path, seed: int, name: str) -> None:
    """Train and score one entry with one seed, on one thread, and write its result."""
    torch.set_num_threads(1)
    entry = ENTRIES[name]
    run, cost = train_entry(entry, LatentDataset(out / f"{'photographs' if entry.real else 'dataset'}-{seed}"), seed)
    own = load_tensors(out / f"teacher-{seed}.safetensors")[0]["latents"]
    with run.ema_weights():
        sampler = {"sampler": "ancestral", "eta": entry.eta}
        scores = evaluate(run.method.student, entry.steps, sampler, MiniEvaluator(), seed, own)
    save_json(
        result_path(out, name, seed),
        {
            "entry": name,
            "seed": seed,
            "scores": scores,
            **cost,
            "settings": asdict(entry),
            "commit": git_commit(),
            "machine": machine(),
        },
    )


def compare(out: Path, seeds: Sequence[int], names: Sequence[str], workers: int = 1, photographs: Path | None = None):
    """Run what has no result yet, seed by seed, ``workers`` runs at once; tables and picture are renewed after each.

    photographs: folder of Fashion-MNIST's files, for the entries on real images. Raises ValueError for an unknown entry
    and for one whose images are missing.
    """
    unknown = sorted(set(names) - ENTRIES.keys())
    if unknown:
        raise ValueError(f"no entry {unknown}; known: {', '.join(ENTRIES)}")
    real = [name for name in names if ENTRIES[name].real]
    if real and not (photographs and photographs.is_dir()):
        raise ValueError(
            f"{real} need the files of Fashion-MNIST: install Debian's dataset-fashion-mnist, give --photographs DIR, "
            "or leave them out with --entries"
        )
    torch.set_num_threads(1)
    evaluator = MiniEvaluator()
    for seed in seeds:
        cache_dataset(mini_backend(), replace(CACHE, seed=seed), out / f"dataset-{seed}")
        teacher_scores(evaluator, seed, out)
        if real and photographs:
            cache_photographs(photographs, seed, out / f"photographs-{seed}")
    jobs = [(seed, name) for seed in seeds for name in names if not result_path(out, name, seed).exists()]
    for _ in tqdm(run_all(out, jobs, workers), total=len(jobs), desc="runs"):
        report(out)


def run_all(out: Path, jobs: Sequence[tuple[int, str]], workers: int) -> Iterator[tuple[int, str]]:
    """Yields each job when its run is done."""
    if workers == 1:
        for job in jobs:
            run_entry(out, *job)
            yield job
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        running = {pool.submit(run_entry, out, *job): job for job in jobs}
        for done in as_completed(running):
            done.result()
            yield running[done]


def add_compare_command(commands) -> None:
    sub = commands.add_parser(
        "compare",
        help="Train every method on the mini model at one budget, three seeds; table and picture (hours).",
        description=__doc__,
    )
    sub.add_argument("--out", type=Path, required=True, help="output folder; a stopped command goes on there")
    sub.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    sub.add_argument("--entries", nargs="+", default=list(ENTRIES), help=f"of {', '.join(ENTRIES)}")
    sub.add_argument("--workers", type=int, default=1, help="runs at once, each on one thread")
    sub.add_argument("--photographs", type=Path, default=Path(DEBIAN_DATA), help="folder of Fashion-MNIST's .gz files")
    sub.set_defaults(command=run_compare, resumes=True)


def run_compare(args) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    compare(args.out, args.seeds, args.entries, args.workers, args.photographs)
    print(report(args.out))

"""All methods on a small model at one budget: ``python -m distill_core compare --out DIR [--ground NAME]``.

Every entry of `entries.ENTRIES` is trained and evaluated for every seed, each run on one thread; a run's result is
written when it is done, so the command can be stopped and started again, and the results so far are always there:
``table.md``, ``claims.md`` and ``compare.png``. Budgets are equal in processor time. Teacher latents and their paths
are cached before and not counted, for any method. All entries, seeds and the teacher are scored on the same noises.
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
from tqdm import tqdm

from ..data.dataset import LatentDataset
from ..data.fashion_mnist import DEBIAN_DATA
from ..data.mix import Mix, mixed, open_data
from ..digests import fingerprint
from ..evaluation.metrics import Evaluator, Figures
from ..evaluation.samples import EVALUATION, REFERENCE
from ..files import git_commit, load_tensors, save_tensors
from ..training.loop import Run, copy_into, train
from ..training.run import RunConfig, StudentConfig, new_run
from .demo import machine
from .entries import DATA, ENTRIES, Entry
from .grounds import GROUNDS, Ground
from .pictures import draw_samples
from .results import (
    CLOTHES,
    Scores,
    Shown,
    check_budget,
    check_ground,
    check_images,
    of_another_ground,
    result_path,
    save_result,
)
from .tables import report

IMAGES = 10_000  # decoding 10,000 of the clothes takes about 80 processor seconds, sampling them 14 a step
OWN_IMAGES = 2000  # of them, at most, are set beside the teacher's own
REFERENCE_IMAGES = 2000  # at most, of the teacher from other noises, for density and coverage


def start_from_random_weights(run: Run, seed: int) -> None:
    """Random weights for a student all of whose weights are trained."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for module in run.method.student.backend.network.modules():
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
    copy_into(run.ema, run.student_parameters)


def prepare(ground: Ground, entry: Entry, dataset: LatentDataset, seed: int, folder: Path | None = None) -> Run:
    """The entry's run on the ground's model; every weight comes from the seed."""
    components = ground.sized(entry.small)
    backend, teacher = components.backend, components.backends[-1]
    distance = ground.distance() if entry.perceptual and ground.distance else None
    identities: dict[str, Any] = {"base": fingerprint(backend.network), "dataset": dataset.digest()}
    identities |= {"pretrained": entry.pretrained, "perceptual": distance and distance.identity()}
    identities |= {"small": list(entry.small)} if entry.small else {}
    config = RunConfig(
        entry.method,
        replace(entry.train, seed=seed),
        StudentConfig(entry.rank if entry.pretrained else 0, sampler="ancestral", sampler_options={"eta": entry.eta}),
        identities,
        vision=ground.vision,
        taps=tuple(teacher.tap_names) if entry.every_block else (),
        guidance=ground.guidance,
    )
    run = new_run(config, components, dataset, folder, distance=distance)
    if not entry.pretrained:
        start_from_random_weights(run, seed)
    return run


class ForwardCount:
    """Counts, while it is open, how many items pass each network; hooks on whole networks, so that early exits count as
    one. ``items`` is by the networks' names."""

    def __init__(self, **networks: nn.Module) -> None:
        self.items: dict[str, int] = dict.fromkeys(networks, 0)
        self.networks = networks

    def __enter__(self) -> ForwardCount:
        self.hooks = [
            network.register_forward_pre_hook(self._hook(name), with_kwargs=True)
            for name, network in self.networks.items()
        ]
        return self

    def __exit__(self, *error) -> None:
        for hook in self.hooks:
            hook.remove()

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


def train_entry(ground: Ground, entry: Entry, dataset: LatentDataset, seed: int) -> tuple[Run, dict]:
    """Train; returns the run and what it cost: processor and wall seconds, and items through each network."""
    run = prepare(ground, entry, dataset, seed)
    wall, cpu, logs = time.monotonic(), time.process_time(), []
    with ForwardCount(**counted_networks(run.method)) as count:
        for event in train(run):
            logs.append(event.logs)
    cost = {"cpu_s": round(time.process_time() - cpu, 1), "wall_s": round(time.monotonic() - wall, 1)}
    return run, {**cost, "steps": run.step, "forwards": dict(count.items), "last": averages(logs[-50:])}


def averages(logs: Sequence[dict[str, float]]) -> dict[str, float]:
    names = sorted({name for entry in logs for name in entry})
    values = {name: [entry[name] for entry in logs if name in entry] for name in names}
    return {name: round(sum(v) / len(v), 4) for name, v in values.items()}


def score(ground: Ground, latents: Tensor, evaluator: Evaluator, own: Tensor) -> Figures:
    return evaluator(latents, ground.labels_of(len(latents)), own[:OWN_IMAGES])


def evaluate(
    ground: Ground, model, all_steps: Sequence[int], sampler: dict, evaluator: Evaluator, images: int, own: Tensor
) -> tuple[Scores, Shown]:
    """The figures at each number of steps, on the same noises and conditionings whatever the model, and the latents of
    the first item of each conditioning."""
    scores, shown = {}, {}
    for steps in all_steps:
        latents = ground.samples(model, steps, images, **sampler)
        scores[str(steps)] = score(ground, latents, evaluator, own)
        shown[str(steps)] = latents[: len(ground.conds)].clone()
    return scores, shown


def teachers_own(ground: Ground, folder: Path, images: int) -> dict[str, Tensor]:
    """Latents of the guided teacher: "own" from the noises of the evaluation, "reference" from other ones. Made once a
    folder. Raises ValueError when they are another ground's."""
    path = folder / "teachers_own.safetensors"
    if not path.exists():
        teacher, steps = ground.teacher(ground.components().backend), ground.teacher_steps[-1]
        counts = {"own": images, "reference": min(images, REFERENCE_IMAGES)}
        purposes = {"own": EVALUATION, "reference": REFERENCE}
        latents = {
            name: ground.samples(teacher, steps, count, sampler="euler", purpose=purposes[name])
            for name, count in counts.items()
        }
        save_tensors(path, latents, {"ground": ground.name})
    latents, metadata = load_tensors(path)
    if metadata.get("ground", CLOTHES) != ground.name:
        raise of_another_ground(path, metadata.get("ground", CLOTHES), ground.name)
    return latents


def score_teacher(ground: Ground, folder: Path, images: int) -> None:
    """The guided teacher's result, once a folder: neither its weights nor the noises depend on a seed."""
    path, latents = result_path(folder, "teacher"), teachers_own(ground, folder, images)
    if path.exists():
        return
    teacher, evaluator = ground.teacher(ground.components().backend), ground.evaluator(latents["reference"])
    *few, most = ground.teacher_steps
    scores, shown = evaluate(ground, teacher, few, {"sampler": "euler"}, evaluator, images, latents["own"])
    scores[str(most)] = score(ground, latents["own"], evaluator, latents["own"])
    shown[str(most)] = latents["own"][: len(ground.conds)].clone()
    about = {"ground": ground.name, "images": images, "commit": git_commit(), "machine": machine()}
    save_result(path, scores, shown, entry="teacher", seed=None, **about)


def teachers_data(folder: Path, seed: int, small: bool) -> Path:
    return folder / f"dataset-{seed}{'-small' if small else ''}"


def data_of(entry: Entry, folder: Path, seed: int) -> Path | Mix:
    """What an entry learns from: the teacher's latents, photographs, or a mix of them."""
    teachers, photographs = teachers_data(folder, seed, DATA in entry.small), folder / f"photographs-{seed}"
    whole = {0.0: teachers, 1.0: photographs}
    return whole.get(entry.real) or mixed(teachers, photographs, entry.real)


def run_entry(out: Path, seed: int, name: str, images: int, ground_name: str = CLOTHES, budget: float = 1.0) -> None:
    """Train and score one entry with one seed, on one thread, and write its result."""
    torch.set_num_threads(1)
    entry, ground = ENTRIES[name].longer(budget), GROUNDS[ground_name]()
    run, cost = train_entry(ground, entry, open_data(data_of(entry, out, seed)), seed)
    latents = teachers_own(ground, out, images)
    with run.ema_weights():
        sampler = {"sampler": "ancestral", "eta": entry.eta}
        evaluator = ground.evaluator(latents["reference"])
        scores, shown = evaluate(ground, run.method.student, entry.steps, sampler, evaluator, images, latents["own"])
    about = {"ground": ground_name, "images": images, "budget": budget, **cost, "settings": asdict(entry)}
    about |= {"commit": git_commit(), "machine": machine()}
    save_result(result_path(out, name, seed), scores, shown, entry=name, seed=seed, **about)


def compare(
    out: Path,
    seeds: Sequence[int],
    names: Sequence[str],
    workers: int = 1,
    photographs: Path | None = None,
    images: int = IMAGES,
    ground_name: str = CLOTHES,
    budget: float = 1.0,
) -> None:
    """Run what has no result yet, seed by seed, ``workers`` runs at once; tables and picture are renewed after each.

    photographs: folder of the ground's files, for the entries on real images.  images: that every model is scored
    on.  ground_name: of `grounds.GROUNDS`.  budget: factor on every entry's steps. Raises ValueError for an unknown
    entry, for one that the ground has no images or no perceptual distance for, and when the folder has results of
    another ground, budget or number of images.
    """
    unknown = sorted(set(names) - ENTRIES.keys())
    if unknown:
        raise ValueError(f"no entry {unknown}; known: {', '.join(ENTRIES)}")
    ground = GROUNDS[ground_name]()
    real = check_entries(ground, names, photographs)
    if images < 2 * len(ground.conds):
        raise ValueError(
            f"--images must be at least {2 * len(ground.conds)}, two of each of the {len(ground.conds)} "
            f"conditionings of the ground {ground.name!r}, not {images}"
        )
    paths = {(seed, name): result_path(out, name, seed) for seed in seeds for name in names}
    check_ground(out, ground.name)
    check_images([result_path(out, "teacher"), *paths.values()], images)
    check_budget(list(paths.values()), budget)
    torch.set_num_threads(1)
    score_teacher(ground, out, images)
    for seed in seeds:
        for small in {DATA in ENTRIES[name].small for name in names}:
            ground.cache_dataset(seed, teachers_data(out, seed, small), small)
        if real:
            ground.cache_photographs(photographs or Path(), seed, out / f"photographs-{seed}")
    jobs = [(*job, images, ground_name, budget) for job, path in paths.items() if not path.exists()]
    for _ in tqdm(run_all(out, jobs, workers), total=len(jobs), desc="runs"):
        report(out)


def lacking(ground: Ground, entry: Entry) -> str:
    """What an entry needs and the ground has not, empty for nothing."""
    if entry.real and ground.photographs is None:
        return "photographs"
    if entry.small and ground.small is None:
        return "smaller model"
    return "perceptual distance" if entry.perceptual and ground.distance is None else ""


def possible_entries(ground: Ground) -> list[str]:
    """The entries that the ground has everything for."""
    return [name for name, entry in ENTRIES.items() if not lacking(ground, entry)]


def check_entries(ground: Ground, names: Sequence[str], photographs: Path | None) -> list[str]:
    """The entries that learn from real images. Raises ValueError for those that the ground has nothing for."""
    for name in names:
        if what := lacking(ground, ENTRIES[name]):
            raise ValueError(f"the ground {ground.name!r} has no {what} for {name!r}: leave it out with --entries")
    real = [name for name in names if ENTRIES[name].real]
    if real and ground.photographs_need and not (photographs and photographs.is_dir()):
        raise ValueError(
            f"{real} need {ground.photographs_need}, give --photographs DIR, or leave them out with --entries"
        )
    return real


Job = tuple[int, str, int, str, float]  # seed, entry, images, ground, budget


def run_all(out: Path, jobs: Sequence[Job], workers: int) -> Iterator[Job]:
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
        help="Train every method on a small model at one budget, three seeds; table and picture (hours).",
        description=__doc__,
    )
    sub.add_argument("--out", type=Path, required=True, help="output folder; a stopped command goes on there")
    sub.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    sub.add_argument("--entries", nargs="+", help=f"of {', '.join(ENTRIES)}; default: all that the ground can do")
    sub.add_argument("--ground", choices=GROUNDS, default=CLOTHES, help="the model and how it is judged (%(default)s)")
    sub.add_argument("--budget", type=float, default=1.0, help="factor on the steps of every entry (%(default)s)")
    sub.add_argument("--workers", type=int, default=1, help="runs at once, each on one thread")
    sub.add_argument("--images", type=int, default=IMAGES, help="that each model is scored on (default 10000)")
    sub.add_argument("--photographs", type=Path, default=Path(DEBIAN_DATA), help="folder of Fashion-MNIST's .gz files")
    sub.add_argument("--picture", type=Path, help="draw samples of the teacher and of --entries there, from one seed")
    sub.set_defaults(command=run_compare, resumes=True)


def run_compare(args) -> None:
    for folder in (args.out, *(() if args.picture is None else (args.picture.parent,))):
        folder.mkdir(parents=True, exist_ok=True)
    names = args.entries or possible_entries(GROUNDS[args.ground]())
    compare(args.out, args.seeds, names, args.workers, args.photographs, args.images, args.ground, args.budget)
    print(report(args.out))
    if args.picture:
        draw_samples(GROUNDS[args.ground](), args.out, args.seeds[0], names, args.picture)

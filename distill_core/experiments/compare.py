"""All methods on the mini model at one budget: ``python -m distill_core compare --out DIR``.

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
from ..data.fashion_mnist import DEBIAN_DATA, read_split, upscale
from ..data.real import save_latents
from ..diffusion.noise import item_generator
from ..digests import fingerprint
from ..evaluation.metrics import MiniEvaluator
from ..evaluation.samples import EVALUATION, REFERENCE
from ..files import git_commit, load_tensors, save_tensors
from ..methods.components import Components
from ..models import mini
from ..models.denoiser import Denoiser, Guided
from ..models.mini import mini_backend, mini_conditioning
from ..models.pipelines import MiniSource, ModelConfig
from ..perceptual import load_metric
from ..training.loop import Run, copy_into, train
from ..training.run import RunConfig, StudentConfig, new_run
from .demo import DemoConfig, cache_dataset, draw_samples, machine
from .entries import ENTRIES, VISION, Entry
from .results import Scores, check_images, result_path, save_result
from .tables import report

IMAGES = 10_000  # decoding 10,000 takes about 80 processor seconds, sampling them 14 a step
OWN_IMAGES = 2000  # of them are set beside the teacher's own
REFERENCE_IMAGES = 2000  # of the teacher from other noises, for density and coverage
RANK = 32
TEACHER_STEPS = (1, 2, 4, 25)  # the last are its own pictures that students are set beside
CACHE = DemoConfig().cache


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


def train_entry(entry: Entry, dataset: LatentDataset, seed: int) -> tuple[Run, dict]:
    """Train; returns the run and what it cost: processor and wall seconds, and items through each network."""
    run = prepare(entry, dataset, seed)
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


def evaluate(
    model, all_steps: Sequence[int], sampler: dict, evaluator: MiniEvaluator, images: int, own: Tensor | None
) -> Scores:
    """The figures at each number of steps, on the same noises and classes whatever the model."""
    classes, _ = mini_conditioning()
    labels, scores = torch.arange(images) % len(classes), {}
    for steps in all_steps:
        latents = draw_samples(model, steps, seed=0, count=images, conds=classes, **sampler)
        scores[str(steps)] = evaluator(latents, labels, own)
    return scores


def teachers_own(folder: Path, images: int) -> dict[str, Tensor]:
    """Latents of the guided teacher (two forwards a step): "own" from the first noises of the evaluation, "reference"
    from other ones. Made once a folder."""
    path = folder / "teachers_own.safetensors"
    if not path.exists():
        classes, empty = mini_conditioning()
        teacher = Guided(Denoiser(mini_backend()), empty, mini.GUIDANCE)
        steps, counts = TEACHER_STEPS[-1], {"own": OWN_IMAGES, "reference": REFERENCE_IMAGES}
        purposes = {"own": EVALUATION, "reference": REFERENCE}
        save_tensors(
            path,
            {
                name: draw_samples(teacher, steps, "euler", 0, count, classes, purpose=purposes[name])
                for name, count in counts.items()
            },
        )
    latents, _ = load_tensors(path)
    return {"own": latents["own"][:images], "reference": latents["reference"]}


def score_teacher(folder: Path, images: int) -> None:
    """The guided teacher's result, once a folder: neither its weights nor the noises depend on a seed."""
    path, latents = result_path(folder, "teacher"), teachers_own(folder, images)
    if not path.exists():
        _, empty = mini_conditioning()
        teacher = Guided(Denoiser(mini_backend()), empty, mini.GUIDANCE)
        evaluator = MiniEvaluator(examples=latents["reference"])
        scores = evaluate(teacher, TEACHER_STEPS, {"sampler": "euler"}, evaluator, images, latents["own"])
        save_result(path, scores, entry="teacher", seed=None, images=images, commit=git_commit(), machine=machine())


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


def run_entry(out: Path, seed: int, name: str, images: int) -> None:
    """Train and score one entry with one seed, on one thread, and write its result."""
    torch.set_num_threads(1)
    entry = ENTRIES[name]
    run, cost = train_entry(entry, LatentDataset(out / f"{'photographs' if entry.real else 'dataset'}-{seed}"), seed)
    latents = teachers_own(out, images)
    with run.ema_weights():
        sampler = {"sampler": "ancestral", "eta": entry.eta}
        evaluator = MiniEvaluator(examples=latents["reference"])
        scores = evaluate(run.method.student, entry.steps, sampler, evaluator, images, latents["own"])
    about = {**cost, "settings": asdict(entry), "commit": git_commit(), "machine": machine()}
    save_result(result_path(out, name, seed), scores, entry=name, seed=seed, images=images, **about)


def compare(
    out: Path,
    seeds: Sequence[int],
    names: Sequence[str],
    workers: int = 1,
    photographs: Path | None = None,
    images: int = IMAGES,
) -> None:
    """Run what has no result yet, seed by seed, ``workers`` runs at once; tables and picture are renewed after each.

    photographs: folder of Fashion-MNIST's files, for the entries on real images.  images: that every model is scored
    on. Raises ValueError for an unknown entry, for one whose images are missing, and when the folder has results of
    another number of images.
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
    if images < 2 * len(mini.CLASS_NAMES):
        raise ValueError(f"--images must be at least {2 * len(mini.CLASS_NAMES)}, two of each class, not {images}")
    paths = {(seed, name): result_path(out, name, seed) for seed in seeds for name in names}
    check_images([result_path(out, "teacher"), *paths.values()], images)
    torch.set_num_threads(1)
    score_teacher(out, images)
    for seed in seeds:
        cache_dataset(mini_backend(), replace(CACHE, seed=seed), out / f"dataset-{seed}")
        if real and photographs:
            cache_photographs(photographs, seed, out / f"photographs-{seed}")
    jobs = [(*job, images) for job, path in paths.items() if not path.exists()]
    for _ in tqdm(run_all(out, jobs, workers), total=len(jobs), desc="runs"):
        report(out)


Job = tuple[int, str, int]  # seed, entry, images


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
        help="Train every method on the mini model at one budget, three seeds; table and picture (hours).",
        description=__doc__,
    )
    sub.add_argument("--out", type=Path, required=True, help="output folder; a stopped command goes on there")
    sub.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    sub.add_argument("--entries", nargs="+", default=list(ENTRIES), help=f"of {', '.join(ENTRIES)}")
    sub.add_argument("--workers", type=int, default=1, help="runs at once, each on one thread")
    sub.add_argument("--images", type=int, default=IMAGES, help="that each model is scored on (default 10000)")
    sub.add_argument("--photographs", type=Path, default=Path(DEBIAN_DATA), help="folder of Fashion-MNIST's .gz files")
    sub.set_defaults(command=run_compare, resumes=True)


def run_compare(args) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    compare(args.out, args.seeds, args.entries, args.workers, args.photographs, args.images)
    print(report(args.out))

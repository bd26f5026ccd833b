"""What number formats do to the outcome: ``python tests/benchmarks/number_formats.py [--steps N] [--seeds 0 1 2]``.

The mini model with LADD and a LoRA, trained for a few steps on the same teacher latents and draws: in float32, with the
networks in bfloat16, and with the LoRA itself in bfloat16, whose updates are rounded at random. The figure is the
Fréchet distance of 500 latents of the averaged student, at 1 and at 4 steps, to the mini model's data.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))

from distill_core.data.cache import CacheConfig  # noqa: E402
from distill_core.data.dataset import LatentDataset  # noqa: E402
from distill_core.evaluation.metrics import MiniEvaluator  # noqa: E402
from distill_core.experiments.demo import DemoConfig, cache_dataset, draw_samples  # noqa: E402
from distill_core.methods.components import Components, DiscriminatorConfig  # noqa: E402
from distill_core.models import mini  # noqa: E402
from distill_core.models.lora import LoraConfig  # noqa: E402
from distill_core.training.loop import train  # noqa: E402
from distill_core.training.run import RunConfig, StudentConfig, new_run  # noqa: E402

KINDS = {
    "float32": {},
    "networks in bfloat16": {"precision": "bfloat16"},
    "LoRA in bfloat16": {"lora_dtype": "bfloat16"},
}
IMAGES, SAMPLED = 500, (1, 4)
CACHE = CacheConfig(
    count=256,
    steps=8,
    guidance=mini.GUIDANCE,
    sizes=(mini.LATENT_SHAPE[1:],),
    state_sigmas=DemoConfig().cache.state_sigmas,
    shard_size=128,
    batch_size=64,
)


def outcome(dataset: LatentDataset, steps: int, seed: int, device: str = "cpu", **kind: str) -> dict[int, float]:
    """Fréchet distances by the number of sampling steps, of one short run."""
    demo, backend = DemoConfig(), mini.mini_backend()
    backend.network.to(device)
    precision, dtype = kind.get("precision", "float32"), kind.get("lora_dtype", "float32")
    settings = replace(demo.mixed.train, steps=steps, batch_size=16, seed=seed, precision=precision)
    student = StudentConfig(demo.rank, lora=LoraConfig(lora_dtype=dtype))
    identities = {"base": dataset.manifest()["base"], "dataset": dataset.digest()}
    heads = DiscriminatorConfig(width=demo.head_width)
    config = RunConfig(demo.mixed.ladd, settings, student, identities, heads, taps=tuple(backend.tap_names))
    run = new_run(config, Components(backend), dataset)
    for _ in train(run):
        pass
    classes, evaluator = mini.mini_conditioning()[0], MiniEvaluator(pixels=False, repeats=0)
    labels, found = torch.arange(IMAGES) % len(classes), {}
    with run.ema_weights():
        for count in SAMPLED:
            latents = draw_samples(run.method.student, count, "ancestral", seed, IMAGES, classes.to(device))
            found[count] = evaluator(latents.cpu(), labels)["fd"].value
    return found


def outcomes(steps: int, seeds: Sequence[int], device: str = "cpu", count: int = CACHE.count) -> dict[str, list]:
    """`outcome` of every kind and seed."""
    with tempfile.TemporaryDirectory() as folder:
        cache_dataset(mini.mini_backend(), replace(CACHE, count=count), Path(folder))
        dataset = LatentDataset(folder)
        found: dict[str, list] = {kind: [] for kind in KINDS}
        for seed in seeds:
            for kind, settings in KINDS.items():
                found[kind].append(outcome(dataset, steps, seed, device, **settings))
                print(seed, kind, found[kind][-1], file=sys.stderr, flush=True)
    return found


def in_words(found: Sequence[dict[int, float]]) -> str:
    """Median and worst of the seeds, at each number of sampling steps."""
    values = {count: [one[count] for one in found] for count in found[0]}
    said = (f"{statistics.median(v):.1f} (worst {max(v):.1f}) at {count}" for count, v in values.items())
    return ", ".join(said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    for kind, found in outcomes(args.steps, args.seeds).items():
        print(f"{kind}: {in_words(found)}")


if __name__ == "__main__":
    main()

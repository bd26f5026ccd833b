"""Peak memory of a training step by the number of micro-batches it accumulates.

``python tests/benchmarks/accumulation_memory.py [--method ladd|add|diffusion2gan] [--updates N]`` trains the mini model
for two steps at accumulation 1, 2, 4 and 8 and prints the largest sum of live tensor bytes in the second step, beyond
what was there before it. From the second micro-batch on that includes the gradients that are being summed up.
CPU, float32; every storage that an operation makes is counted until it is freed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import weakref
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.append(str(Path(__file__).resolve().parents[2]))

from distill_core.data.cache import CacheConfig, cache_latents
from distill_core.data.dataset import LatentDataset
from distill_core.methods.components import Components, DiscriminatorConfig
from distill_core.methods.registry import METHODS, new_method
from distill_core.models.denoiser import Denoiser, Guided
from distill_core.models.pipelines import ModelConfig, open_source
from distill_core.training.loop import Run, TrainConfig, training_step


class LiveBytes(TorchDispatchMode):
    """Counts bytes of storages made inside it, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._note(value.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.known:
            return
        self.known.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key, storage.nbytes())

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def peak_of(method: str, dataset: LatentDataset, accumulation: int, updates: int, batch: int) -> tuple[float, float]:
    """MiB of the second step, and of the gradients that wait for the next micro-batch from accumulation 2 on."""
    source = open_source(ModelConfig())
    components = Components(source.backend, source.decode_with_gradient, source.encoder)
    settings = TrainConfig(
        steps=2, batch_size=batch, accumulation=accumulation, discriminator_updates=updates, precision="float32"
    )
    torch.manual_seed(0)
    built = new_method(
        METHODS[method](),
        components,
        dataset.batch(0, batch, 0),
        16,
        uncond=dataset.uncond(),
        guidance=1.5,
        discriminator=DiscriminatorConfig(width=32),
    )
    run = Run(built, dataset, settings)
    training_step(run)
    run.step = 1
    with LiveBytes() as live:
        training_step(run)
    waiting = sum(weight.nbytes for player in run.players for weight in player.parameters.values())
    return live.peak / 2**20, waiting / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=METHODS, default="ladd")
    parser.add_argument("--updates", type=int, default=1, help="of the discriminator a step")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--accumulation", type=int, nargs="+", default=[1, 2, 4, 8])
    args = parser.parse_args()
    torch.set_num_threads(1)
    source = open_source(ModelConfig())
    conds, uncond = source.encode(source.default_prompts())
    config = CacheConfig(count=64, steps=2, guidance=1.5, sizes=((8, 8),), state_sigmas=(1.0,))
    with tempfile.TemporaryDirectory() as folder:
        for _ in cache_latents(Guided(Denoiser(source.backend), uncond, 1.5), conds, 16, config, folder):
            pass
        dataset, first = LatentDataset(folder), None
        for accumulation in args.accumulation:
            peak, waiting = peak_of(args.method, dataset, accumulation, args.updates, args.batch)
            waiting = waiting if accumulation > 1 else 0.0
            first = first or peak
            print(
                f"accumulation {accumulation}: {peak:7.1f} MiB, {100 * (peak / first - 1):+.1f} %, "
                f"{waiting:.1f} MiB of it gradients that wait",
                flush=True,
            )


if __name__ == "__main__":
    main()

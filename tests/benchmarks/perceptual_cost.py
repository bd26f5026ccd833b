"""Memory, time and operations of E-LatentLPIPS: ``python tests/benchmarks/perceptual_cost.py [--out FILE]``.

Beside ours stands the published formulation, written from its description: torchvision's layers one by one
(convolution, normalisation in eval mode, ReLU in place), both latents with the autograd graph on, features scaled and
compared by plain tensor operations. Weights are random; neither memory nor time depends on them. Peak memory is the
highest sum of the allocations and releases that torch's profiler reports during forward and backward, weights not
counted; time is CPU time of one thread, the variants in turns. Operations of the alternative, decoding with Stable
Diffusion's autoencoder and pixel LPIPS on VGG16 at 512 x 512, are counted on torch's meta device, with the gradient to
the latent.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(Path(__file__).resolve().parents[2]))

from distill_core.diffusion.noise import ItemNoise  # noqa: E402
from distill_core.perceptual import ELatentLPIPS  # noqa: E402
from distill_core.perceptual.metric import unit  # noqa: E402
from distill_core.perceptual.transforms import draw, transform  # noqa: E402
from distill_core.perceptual.trunk import DEPTHS, POOLED, FrozenTrunk, TrainableTrunk, TrunkConfig  # noqa: E402

SHAPES = ((1, 4, 64, 64), (1, 16, 128, 128))
PUBLISHED_MIB = (154, 643)  # measured on the published package with this method, in another session
MIB = 2**20


class Published(nn.Module):
    """The description taken literally; same transforms, so that only trunk and score differ."""

    def __init__(self, trunk: TrainableTrunk, heads: list[Tensor]) -> None:
        super().__init__()
        layers = list(zip(trunk.convs, trunk.norms, strict=True))
        self.slices = nn.ModuleList()
        for depth, pooled in zip(DEPTHS, POOLED, strict=True):
            parts = [m for conv, norm in layers[:depth] for m in (conv, norm, nn.ReLU(inplace=True))]
            self.slices.append(nn.Sequential(*parts, nn.MaxPool2d(2) if pooled else nn.Identity()))
            layers = layers[depth:]
        self.heads = heads
        self.eval().requires_grad_(False)

    def taps(self, x: Tensor) -> list[Tensor]:
        taps = []
        for part in self.slices:
            x = part(x)
            taps.append(x)
        return taps

    def forward(self, prediction: Tensor, target: Tensor, random: ItemNoise) -> Tensor:
        apply = transform(draw(random), "bg", *prediction.shape[-2:])
        pairs = zip(self.taps(apply(prediction)), self.taps(apply(target)), self.heads, strict=True)
        squares = [((unit(a) - unit(b)) ** 2, head) for a, b, head in pairs]
        return sum(F.conv2d(d, head.view(1, -1, 1, 1)).mean((1, 2, 3)) for d, head in squares)


def variants(channels: int) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    config = TrunkConfig(channels)
    trunk = TrainableTrunk(config).eval()
    heads = [torch.rand(width) for width in config.widths]
    ours = {name: ELatentLPIPS(FrozenTrunk(config, trunk.state_dict()), heads) for name in ("ours", "checkpointed")}
    ours["checkpointed"].trunk.checkpointing = True
    return {"published formulation": Published(trunk, heads), **ours}


def step(metric: Callable, prediction: Tensor, target: Tensor) -> Tensor:
    """Gradient of the distance; what a training step asks for."""
    prediction.grad = None
    metric(prediction, target, ItemNoise(0, range(len(target)))).sum().backward()
    return prediction.grad


def peak_mib(run: Callable) -> float:
    """Highest sum of allocations minus releases during a call (not the first one, which may prepare things)."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak / MIB


def seconds(runs: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Median CPU seconds of one call, the variants in turns."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.process_time()
            run()
            taken[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


def gflop(run: Callable) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e9


def decode_and_compare(device: str = "meta") -> Callable[[], None]:
    """SD's decoder at 512 x 512 and LPIPS-VGG16 on the images, gradient to the latent, target image given."""
    from diffusers import AutoencoderKL

    with torch.device(device):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            norm_num_groups=32,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        ).requires_grad_(False)
        plan = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512]
        layers, channels = [], 3
        for width in plan:
            layers += [nn.MaxPool2d(2)] if width == "M" else [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = channels if width == "M" else width
        vgg = nn.Sequential(*layers).requires_grad_(False)
        latent, image = torch.randn(1, 4, 64, 64, requires_grad=True), torch.randn(1, 3, 512, 512)

        def run() -> None:
            with torch.no_grad():
                vgg(image)
            latent.grad = None
            vgg(vae.decode(latent).sample).sum().backward()

        return run


def measure(rounds: int) -> dict:
    with torch.device("meta"):
        alternative = gflop(decode_and_compare())
    result: dict = {"decode + LPIPS at 512x512, GFLOP": round(alternative)}
    print(result)
    for shape, published in zip(SHAPES, PUBLISHED_MIB, strict=True):
        g = torch.Generator().manual_seed(0)
        prediction, target = torch.randn(shape, generator=g).requires_grad_(), torch.randn(shape, generator=g)
        runs = {
            name: lambda metric=metric: step(metric, prediction, target)  # noqa: B023  used in this round only
            for name, metric in variants(shape[1]).items()
        }
        entry: dict = {"published package MiB, measured before": published}
        for name, run in runs.items():
            entry[name] = {"GFLOP": round(gflop(run), 1)}
            peak = peak_mib(run)
            entry[name] |= {"peak MiB": round(peak, 1), "of published": round(peak / published, 3)}
            print(name, shape, entry[name], flush=True)
        for name, taken in seconds(runs, rounds).items():
            entry[name]["CPU s"] = round(taken, 3)
        result["x".join(map(str, shape))] = entry
    result["decode + LPIPS / ours"] = round(alternative / result["1x4x64x64"]["ours"]["GFLOP"], 1)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(args.rounds)
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

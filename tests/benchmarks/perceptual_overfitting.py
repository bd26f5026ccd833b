"""Does a free latent reach its target? ``python tests/benchmarks/perceptual_overfitting.py --images DIR --out DIR``.

Diffusion2GAN's experiment (arXiv 2405.05967, appendix B) at small scale: a latent from N(0, 1) is optimised by Adam to
be perceptually equal to a target, by the plain metric and by ensembled ones; the curve is the plain metric's, whatever
was optimised. Two latent spaces of Fashion-MNIST (--images: folder of its four .gz files): four channels, the first
four principal components of 8 x 8 pixel patches, with a small trunk trained here; and the mini model's sixteen channels
with the shipped metric. Both are 8 x 8 positions. Everything is seeded; the 4-channel metric and finished curves are
kept in --out, where the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[2]))

from distill_core.diffusion.noise import ItemNoise, item_generator  # noqa: E402
from distill_core.files import save_json  # noqa: E402
from distill_core.perceptual import ELatentLPIPS, load_metric  # noqa: E402
from distill_core.perceptual.autoencoders import open_autoencoder  # noqa: E402
from distill_core.perceptual.calibration import CalibrationConfig, train_metric  # noqa: E402
from distill_core.perceptual.images import Images, open_images  # noqa: E402
from distill_core.perceptual.pairs import Pairs, cached_pairs, make_pairs  # noqa: E402
from distill_core.perceptual.pixel import ImageNetDistance  # noqa: E402
from distill_core.perceptual.weights import LatentSpace, save_weights  # noqa: E402

SPACES = ("4 channels", "16 channels")
CONDITIONS = ("none", "b", "bg", "bgco")
PATCH = 8


class PatchComponents:
    """A linear autoencoder: the first principal components of grey patches, scaled to unit variance."""

    def __init__(self, images: Tensor, channels: int = 4) -> None:
        self.space = LatentSpace(channels, 1.0)
        patches = self._patches(images).movedim(1, -1).flatten(0, 2).double()
        self.mean = patches.mean(0).float()
        values, vectors = torch.linalg.eigh(patches.T.cov())
        self.basis = (vectors * values.clamp(min=1e-9).sqrt()).flip(1)[:, :channels].float()

    def _patches(self, images: Tensor) -> Tensor:
        return F.pixel_unshuffle(images.mean(1, keepdim=True), PATCH)

    def encode(self, images: Tensor) -> Tensor:
        centred = self._patches(images) - self.mean.view(1, -1, 1, 1)
        return torch.einsum("bphw,pc->bchw", centred, self.basis / self.basis.square().sum(0))

    def decode(self, latents: Tensor) -> Tensor:
        patches = torch.einsum("bchw,pc->bphw", latents, self.basis) + self.mean.view(1, -1, 1, 1)
        return F.pixel_shuffle(patches, PATCH).clamp(-1, 1).expand(-1, 3, -1, -1)


def four_channel_metric(train: Images, space: PatchComponents, args: argparse.Namespace) -> ELatentLPIPS:
    file, distance = args.out / "four_channels.safetensors", ImageNetDistance()
    if not file.is_file():
        make = lambda number: make_pairs(train, space, distance, args.seed, number, unseen=False)  # noqa: E731
        for found in tqdm(cached_pairs(args.out / "pairs", args.pairs, make), desc="pairs / 20", mininterval=5):
            pairs = found
        assert isinstance(pairs, Pairs)
        config = CalibrationConfig((24, 48, 64, 96, 96), args.training_steps, seed=args.seed)
        for _, _, trained in tqdm(train_metric(pairs, config, args.out), desc="metric", mininterval=5):
            learner = trained
        save_weights(file, learner.trunk.state_dict(), list(learner.heads), space.space, {})
    return load_metric(file)


def overfit(metric: ELatentLPIPS, target: Tensor, condition: str, args: argparse.Namespace) -> list[tuple[int, float]]:
    """(step, plain distance) while the metric under ``condition`` is optimised."""
    heads = [getattr(metric, f"head{i}") for i in range(5)]
    loss, plain = ELatentLPIPS(metric.trunk, heads, condition), ELatentLPIPS(metric.trunk, heads, "none")
    latent = torch.randn(target.shape, generator=item_generator(args.seed, 7)).requires_grad_()
    optimizer, curve = torch.optim.Adam([latent], lr=args.lr), []
    for step in range(args.steps + 1):
        if step % args.every == 0:
            with torch.no_grad():
                curve.append((step, plain(latent, target).mean().item()))
        items = range(step * len(target), (step + 1) * len(target))
        value = loss(latent, target, ItemNoise(args.seed, items)).mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return curve


def picture(curves: dict[str, dict[str, list]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(curves), squeeze=False)[0]
    for axis, (title, lines) in zip(axes, curves.items(), strict=True):
        for name in (c for c in CONDITIONS if c in lines):
            axis.plot(*zip(*lines[name], strict=True), label="plain" if name == "none" else name)
        axis.set(title=title, yscale="log", xlabel="step", ylabel="plain LatentLPIPS to the target")
        axis.legend()
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1200, help="of each optimisation")
    parser.add_argument("--every", type=int, default=50, help="steps between points of the curves")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--targets", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=600, help="for the 4-channel metric")
    parser.add_argument("--training-steps", type=int, default=100, help="of the 4-channel metric")
    parser.add_argument("--spaces", nargs="+", choices=SPACES, default=SPACES)
    parser.add_argument("--conditions", nargs="+", choices=CONDITIONS, default=CONDITIONS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    train, test = open_images(args.images, 64, args.seed)
    images, file, started = test.read(range(args.targets)), args.out / "overfitting.json", time.process_time()
    curves: dict[str, dict[str, list]] = json.loads(file.read_text()) if file.is_file() else {}
    for name in args.spaces:
        if name == "4 channels":
            space = PatchComponents(train.read(range(500)))
            metric = four_channel_metric(train, space, args)
        else:
            space, metric = open_autoencoder("mini"), load_metric()
        target, lines = space.encode(images), curves.setdefault(name, {})
        for condition in (c for c in args.conditions if c not in lines):
            lines[condition] = overfit(metric, target, condition, args)
            end, seconds = lines[condition][-1][1], time.process_time() - started
            print(f"{name}, {condition}: {end:.6f} ({seconds:.0f} CPU s)", flush=True)
            save_json(file, curves)
    picture(curves, args.out / "overfitting.png")


if __name__ == "__main__":
    main()

"""Train the latent trunk and its heads for any autoencoder, from images.

Diffusion2GAN (arXiv 2405.05967, section 3.2) trains the trunk to classify ImageNet latents and the heads on human
judgements (BAPPS). This recipe needs neither: the trunk learns the classes where the images have some and, with the
heads, the logarithm of a pixel network's perceptual distance over distorted pairs, half of them under the metric's own
random transforms. In the second half of the steps the batch normalisation is fixed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..diffusion.noise import ItemNoise, item_generator
from ..files import load_tensors, save_tensors
from ..settings import SEED_MAX, Checked, setting
from .metric import total, unit
from .pairs import Pairs
from .transforms import draw, transform
from .trunk import TrainableTrunk, TrunkConfig

FLOOR = 0.02  # added to both distances before the logarithm


@dataclass(frozen=True)
class CalibrationConfig(Checked):
    """How an E-LatentLPIPS metric is trained on a distance between images."""

    widths: tuple[int, ...] = setting(
        (64, 128, 256, 512, 512),
        "Channels of the metric's five feature maps, VGG16's by default; a small autoencoder needs less.",
        low=1,
        high=4096,
    )
    steps: int = setting(5000, "Steps of the AdamW optimiser.", low=1, high=10**7)
    batch_size: int = setting(32, "Pairs of images in one step.", low=1, high=4096)
    lr: float = setting(1e-3, "Learning rate of the AdamW optimiser.", above=0, high=100)
    class_weight: float = setting(
        0.3, "Weight of the classification loss beside the regression, where the images have classes.", low=0, high=1000
    )
    seed: int = setting(0, "Seed of the new weights and of the order of the pairs.", low=0, high=SEED_MAX)
    save_every: int = setting(100, "Steps between checkpoints.", decides=False, low=1, high=10**7)


class Learner(nn.Module):
    """What is trained: the trunk, five heads (kept at 0 or above) and a linear classifier on the last tap."""

    def __init__(self, channels: int, classes: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.trunk = TrainableTrunk(TrunkConfig(channels, widths))
        self.heads = nn.ParameterList(torch.full((width,), 1.0) for width in widths)
        self.classifier = nn.Linear(widths[-1], max(classes, 1))

    def forward(self, reference: Tensor, distorted: Tensor) -> tuple[Tensor, Tensor]:
        """Distances [B], class logits of the references [B, classes]."""
        taps = self.trunk(torch.cat([reference, distorted]))
        distances = []
        for tap, head in zip(taps, self.heads, strict=True):
            a, b = unit(tap).chunk(2)
            distances.append((head.view(1, -1, 1, 1) * (a - b).square()).sum(1).mean((1, 2)))
        return total(distances), self.classifier(taps[-1].chunk(2)[0].mean((2, 3)))


def train_metric(pairs: Pairs, config: CalibrationConfig, out: Path) -> Iterator[tuple[int, dict, Learner]]:
    """Yields (step, losses, learner) after each step; goes on from the checkpoint in ``out`` if there is one.

    Raises ValueError for a checkpoint of other settings.
    """
    torch.manual_seed(config.seed)
    classes = int(pairs.label.max()) + 1
    learner = Learner(pairs.reference.shape[1], classes, config.widths)
    learner.to("cuda" if torch.cuda.is_available() else "cpu")
    optimizer = torch.optim.AdamW(learner.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=0.01)
    file = out / "state.safetensors"
    done = _load(file, learner, optimizer, config) if file.is_file() else 0
    if done == config.steps:
        yield done, {}, learner
    for step in range(done, config.steps):
        learner.train()
        if step >= config.steps // 2:
            learner.trunk.norms.eval()
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / config.steps))
        losses = _losses(learner, pairs, config, step, classes)
        optimizer.zero_grad(set_to_none=True)
        total(losses.values()).backward()
        nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for head in learner.heads:
                head.clamp_(min=0)
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            _save(file, learner, optimizer, config, step + 1)
        yield step + 1, {name: value.item() for name, value in losses.items()}, learner


def _losses(learner: Learner, pairs: Pairs, config: CalibrationConfig, step: int, classes: int) -> dict[str, Tensor]:
    device = next(learner.parameters()).device
    picked = torch.randint(len(pairs), (config.batch_size,), generator=item_generator(config.seed, 2, step))
    reference, distorted = pairs.reference[picked], pairs.distorted[picked]
    if step % 2:
        items = range(step * config.batch_size, (step + 1) * config.batch_size)
        apply = transform(draw(ItemNoise(config.seed, items)), "bg", *reference.shape[-2:])
        reference, distorted = apply(reference), apply(distorted)
    distance, logits = learner(reference.to(device), distorted.to(device))
    target = pairs.distance[picked].to(device)
    error = (distance + FLOOR).log() - (target + FLOOR).log()
    losses = {"regression": error.square().mean()}
    if classes:
        losses["classes"] = config.class_weight * F.cross_entropy(logits, pairs.label[picked].to(device))
    return losses


def _save(file: Path, learner: Learner, optimizer: torch.optim.Optimizer, config: CalibrationConfig, step: int) -> None:
    state = {f"learner.{name}": value for name, value in learner.state_dict().items()}
    for i, moments in optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{i}.{name}": value for name, value in moments.items()}
    save_tensors(file, state, {"step": str(step), "config": repr(asdict(config))})


def _load(file: Path, learner: Learner, optimizer: torch.optim.Optimizer, config: CalibrationConfig) -> int:
    tensors, metadata = load_tensors(file)
    if metadata["config"] != repr(asdict(config)):
        raise ValueError(f"{file} was made with other settings; give another --out, or delete the file to start anew")
    learner.load_state_dict({k.removeprefix("learner."): v for k, v in tensors.items() if k.startswith("learner.")})
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, i, kind = name.split(".")
            moments.setdefault(int(i), {})[kind] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(metadata["step"])


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two sets of values [N] without ties."""
    ranks = [x.argsort().argsort().double() for x in (a, b)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()

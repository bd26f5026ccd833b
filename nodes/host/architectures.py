"""What differs between the host's networks for training, as data: blocks, LoRA layers, where the image tokens are.

An architecture is found by the class of the network (``model.model.diffusion_model``); which families have it is in
`distill_core.models.families`. Names are those of the network's modules.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

from torch import Tensor, nn

from ...distill_core.models.denoiser import Limits
from ...distill_core.models.families import FAMILIES
from ...distill_core.models.features import depth_scales
from ...distill_core.models.lora import linear_layers

# (length of a sequence, network, text tokens, image tokens) -> where the image is in it
Span = Callable[[int, nn.Module, int, int], slice]


def _first(length: int, network: nn.Module, text: int, image: int) -> slice:
    """References come after the image."""
    return slice(0, image)


def _after_text(length: int, network: nn.Module, text: int, image: int) -> slice:
    """Text, image, references."""
    return slice(text, text + image)


def _last(length: int, network: nn.Module, text: int, image: int) -> slice:
    """The image is the end of the sequence, filled up to a multiple."""
    end = length - -image % (network.pad_tokens_multiple or 1)
    return slice(end - image, end)


def _width_into(network: nn.Module, layer: str) -> int | None:
    """What the first layer with this end of a name takes; None where there is none."""
    layers = (module for name, module in network.named_modules() if layer and name.endswith(layer))
    return getattr(next(layers, None), "in_features", None)


def _blocks(*lists: str) -> Callable[[nn.Module], list[str]]:
    return lambda network: [f"{name}.{i}" for name in lists for i in range(len(getattr(network, name)))]


def _unet_parts(network: nn.Module) -> dict[str, nn.Module]:
    """The layers that a UNet calls one by one; it never calls the sequences they are in, so hooks there stay silent."""
    containers = ("input_blocks.", "middle_block.", "output_blocks.")
    wanted = ("ResBlock", "SpatialTransformer")
    modules = network.named_modules()
    return {n: m for n, m in modules if n.startswith(containers) and type(m).__name__ in wanted}


def _unet_taps(network: nn.Module) -> list[str]:
    """The last residual or attention layer of every block, in the order in which they run."""
    last = {}
    for name in _unet_parts(network):
        block = "middle" if name.startswith("middle") else name.rsplit(".", 1)[0]
        last[block] = name
    return list(last.values())


def _unet_scales(network: nn.Module) -> tuple[list[str], list[str]]:
    kinds = ("ResBlock", "SpatialTransformer", "Downsample", "Upsample")
    parts = [(name, type(part).__name__) for name, part in network.named_modules() if type(part).__name__ in kinds]
    reads = [name for (name, _), (_, following) in pairwise(parts) if following == "Upsample"]
    entries = [name for (_, before), (name, _) in pairwise(parts) if before == "Downsample"]
    return [*reads, parts[-1][0]], entries


@dataclass(frozen=True)
class Architecture:
    """How to train with one class of the host's networks.

    taps: blocks a discriminator can read, in the order in which they run.  lora_under: containers of the layers that
    get a LoRA.  image: where a sequence of image and text tokens has the image.  two_streams: the image's
    argument (keyword or position) and place in the output of blocks that keep image and text apart.
    checkpointed: modules that are recomputed one by one (the taps unless given).
    in_place: blocks add to their input in place, which breaks gradients (`features.OutOfPlace`).
    block_options: keywords every block is called with.  key_prefix: of LoRA keys that core and diffusers both read.
    foreign: endings of the host's LoRA keys that belong to another model of the same class.
    misplacing: values of a CONDITIONING that put other tokens where ``image`` expects the image.
    scales: read-outs and entries of a multi-scale discriminator, where the network has scales of its own.
    others: models with this network that no preset is for.
    modulation: the layer whose output [B, D] the timestep modulates the blocks by, of networks that edit pictures.
    text, pooled: layers that text tokens and pooled text go into, by the end of the name ("": they fit any width).
    """

    name: str
    taps: Callable[[nn.Module], list[str]]
    lora_under: tuple[str, ...]
    image: Span = _first
    two_streams: tuple[str | int, int] | None = None
    checkpointed: Callable[[nn.Module], list[str]] | None = None
    in_place: bool = False
    block_options: dict = field(default_factory=dict)
    patch_size: int = 2
    key_prefix: str = "transformer."
    foreign: tuple[str, ...] = ()
    misplacing: tuple[str, ...] = ()
    scales: Callable[[nn.Module], tuple[list[str], list[str]]] | None = None
    others: tuple[str, ...] = ()
    modulation: str = ""
    text: str = ""
    pooled: str = ""

    def checkpoints(self, network: nn.Module) -> list[str]:
        return (self.checkpointed or self.taps)(network)

    def lora_targets(self, network: nn.Module) -> list[str]:
        return linear_layers(network, self.lora_under)

    def multi_scale_taps(self, network: nn.Module, count: int) -> tuple[list[str], list[str]]:
        return self.scales(network) if self.scales else depth_scales(self.taps(network), count)

    def image_output(self, output, network: nn.Module, text: int, image: int) -> Tensor:
        """Image tokens [B, N, C], or a map [B, C, H, W], of what a tapped block gave."""
        if isinstance(output, tuple):
            return output[self.two_streams[1]][:, :image]
        return output if output.ndim == 4 else output[:, self.image(output.shape[1], network, text, image)]

    def image_input(
        self, args: tuple, kwargs: dict, network: nn.Module, text: int, image: int
    ) -> tuple[str | int, slice | None]:
        """The argument of a block that has the image, and where in its sequence (None: it is a map)."""
        where = self.two_streams[0] if self.two_streams else 0
        if where in kwargs or (isinstance(where, int) and where > 0):
            return where, slice(0, image)
        return 0, None if args[0].ndim == 4 else self.image(args[0].shape[1], network, text, image)

    def limits(self, network: nn.Module, channels: int) -> Limits:
        """What the network can take; latents have ``channels``."""
        positions = getattr(network, "pos_embed_max_size", None)
        side = positions and positions * self.patch_of(network)
        widths = _width_into(network, self.text), _width_into(network, self.pooled)
        return Limits(channels, *widths, side, token=self.patch_of(network))

    def patch_of(self, network: nn.Module) -> int:
        """Latent pixels a side of a token: what the network says, else what is usual."""
        said = getattr(network, "patch_size", None)
        return said if isinstance(said, int) else self.patch_size

    def token_grid(self, network: nn.Module, height: int, width: int) -> tuple[int, int]:
        patch = self.patch_of(network)
        return math.ceil(height / patch), math.ceil(width / patch)


_FLUX = dict(
    taps=_blocks("double_blocks", "single_blocks"),
    lora_under=("double_blocks", "single_blocks"),
    image=_after_text,
    two_streams=("img", 0),
    in_place=True,
    text="txt_in",
)
_FLUX1_ONLY = (".proj_mlp", ".proj_out", ".ff.net.0.proj", ".ff.net.2", ".ff_context.net.0.proj", ".ff_context.net.2")
_FLUX2_ONLY = (".linear_in", ".linear_out", ".to_qkv_mlp_proj", ".attn.to_out")

ARCHITECTURES = {
    # A JointBlock checkpoints itself unless told not to, and would recompute under whichever path is on then.
    "OpenAISignatureMMDITWrapper": Architecture(
        "sd3",
        _blocks("joint_blocks"),
        ("joint_blocks",),
        two_streams=(1, 1),
        block_options={"use_checkpoint": False},
        modulation="t_embedder",
        text="context_embedder",
        pooled="y_embedder.mlp.0",
    ),
    "Flux": Architecture("flux", foreign=_FLUX2_ONLY, modulation="time_in", **_FLUX),
    "Flux2": Architecture("flux2", foreign=_FLUX1_ONLY, patch_size=1, modulation="time_in", **_FLUX),
    "NextDiT": Architecture(
        "lumina",
        _blocks("layers"),
        ("layers", "noise_refiner", "context_refiner"),
        _last,
        checkpointed=_blocks("noise_refiner", "context_refiner", "layers"),
        others=("Lumina 2",),
        text="cap_embedder.1",
    ),
    "QwenImageTransformer2DModel": Architecture(
        "qwen-image",
        _blocks("transformer_blocks"),
        ("transformer_blocks",),
        two_streams=("hidden_states", 1),
        modulation="time_text_embed",
        text="txt_in",
    ),
    "WanModel": Architecture(
        "wan",
        _blocks("blocks"),
        ("blocks",),
        key_prefix="diffusion_model.",
        misplacing=("reference_latents",),
        text="text_embedding.0",
    ),
    "UNetModel": Architecture(
        "unet",
        _unet_taps,
        ("transformer_blocks", "proj_in", "proj_out"),
        patch_size=1,
        checkpointed=lambda network: list(_unet_parts(network)),
        key_prefix="lora_unet_",
        scales=_unet_scales,
        modulation="time_embed",
        text="attn2.to_k",
    ),
}


def architecture_of(network: nn.Module) -> Architecture:
    """Raises ValueError for a network that is not in the table."""
    name = type(network).__name__
    if name == "Flux" and network.params.global_modulation:
        name = "Flux2"
    if name not in ARCHITECTURES:
        known = [family.title for family in FAMILIES.values() if family.host_network in ARCHITECTURES]
        known += [title for architecture in ARCHITECTURES.values() for title in architecture.others]
        raise ValueError(f"models with a {name} network cannot be distilled yet; those that can: {', '.join(known)}")
    return ARCHITECTURES[name]

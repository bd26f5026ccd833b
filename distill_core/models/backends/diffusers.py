"""diffusers' SD3 and FLUX transformers and UNet2DConditionModel as backends.

What differs between the architectures is data (`ARCHITECTURES`) plus one function that calls the network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ...devices import like
from ...diffusion.process import DiscreteProcess, FlowProcess, NoiseProcess, cumulative_alphas
from ...digests import fingerprint
from ..compiled import INDUCTOR, check_compilable, compiled
from ..denoiser import Cond, Limits
from ..families import FAMILIES, family_of_network
from ..features import BlockInput, collect_taps, depth_scales, hidden_states_of, spread_taps, tokens_to_map
from ..items import ITEM_TENSORS, MASK, MASKED_IMAGE, PIXEL_MASK, REFERENCE, SOURCE_IMAGE, missing
from ..lora import Lora, LoraSwitch, add_differences, is_linear, linear_layers, weight_differences
from ..lora_stack import LoraFile, put_into_weights, read_lora_file
from ..lora_start import Parts, parts_by_name
from ..offload import Offload
from ..precision import check_in_full, on_device
from ..sharding import Sharding
from ..strengths import StrengthEmbedding, StrengthsConfig

Network = Any  # one of diffusers' classes: nn.Module declares none of their attributes


def _call_sd3(network: Network, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
    return network(
        hidden_states=x, timestep=timestep, encoder_hidden_states=cond.context, pooled_projections=cond.pooled
    ).sample


def has_embedded_guidance(config: Any) -> bool:
    """Whether a network of this diffusers config is told a guidance scale."""
    return bool(config.get("guidance_embeds", False))


def _call_flux(network: Network, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
    """FLUX takes 2x2 patches as tokens, positions as ids and a time in [0, 1]; a picture to go by is further tokens."""
    height, width = x.shape[2] // 2, x.shape[3] // 2
    tokens, img_ids = _flux_tokens(x, 0)
    if REFERENCE in cond.extra:
        more, their_ids = _flux_tokens(like(cond.extra[REFERENCE], x), 1)
        tokens, img_ids = torch.cat([tokens, more], dim=1), torch.cat([img_ids, their_ids])
    guidance = None if cond.guidance is None else like(cond.guidance, x)
    if has_embedded_guidance(network.config) and guidance is None:  # items stored before there was a setting
        guidance = x.new_ones(len(x))
    out = network(
        hidden_states=tokens,
        timestep=timestep,
        encoder_hidden_states=cond.context,
        pooled_projections=cond.pooled,
        guidance=guidance,
        img_ids=img_ids,
        txt_ids=img_ids.new_zeros(cond.context.shape[1], 3),
    ).sample
    out = out[:, : height * width]
    return rearrange(out, "b (h w) (c p q) -> b c (h p) (w q)", h=height, w=width, p=2, q=2)


def _flux_tokens(x: Tensor, picture: int) -> tuple[Tensor, Tensor]:
    """Latents [B, C, H, W] as tokens [B, N, 4 C], and the positions [N, 3] of these: picture, row, column."""
    sides = (torch.arange(side // 2, device=x.device) for side in x.shape[2:])
    rows, columns = torch.meshgrid(*sides, indexing="ij")
    ids = torch.stack([torch.full_like(rows, picture), rows, columns], dim=-1)
    return rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2), ids.reshape(-1, 3).to(x.dtype)


def _call_unet(network: Network, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
    added = None
    if network.config.addition_embed_type == "text_time":
        height, width = 8 * x.shape[2], 8 * x.shape[3]  # SDXL's size conditioning: original, crop, target, in pixels
        sizes = torch.tensor([height, width, 0, 0, height, width])
        time_ids = like(sizes, x).expand(len(x), 6)
        added = {"text_embeds": cond.pooled, "time_ids": time_ids}
    return network(x, timestep, encoder_hidden_states=cond.context, added_cond_kwargs=added).sample


def _transformer_taps(network: Network) -> list[str]:
    """Every block, in the order in which they run."""
    lists = [name for name in ("transformer_blocks", "single_transformer_blocks") if hasattr(network, name)]
    return [f"{name}.{i}" for name in lists for i in range(len(getattr(network, name)))]


def _unet_taps(network: Network) -> list[str]:
    return [*_unet_down(network), *_unet_decoder(network)]


def _unet_down(network: Network) -> list[str]:
    return [f"down_blocks.{i}" for i in range(len(network.down_blocks))]


def _unet_decoder(network: Network) -> list[str]:
    return ["mid_block", *(f"up_blocks.{i}" for i in range(len(network.up_blocks)))]


def _unet_scales(network: Network) -> tuple[list[str], list[str]]:
    """Read at each scale of the decoder, fed at each lower scale of the encoder."""
    return _unet_decoder(network), _unet_down(network)[1:]


def _unet_units(network: Network) -> list[str]:
    """What checkpointing computes again one by one, in running order; a middle block begins with a residual part."""
    names: list[str] = []
    for name in [*_unet_down(network), *_unet_decoder(network)]:
        block = network.get_submodule(name)
        residual = [[f"{name}.resnets.{i}"] for i in range(len(block.resnets))]
        attention = [
            [f"{name}.attentions.{i}.transformer_blocks.{j}" for j in range(len(part.transformer_blocks))]
            for i, part in enumerate(getattr(block, "attentions", None) or ())
        ]
        if len(residual) > len(attention) > 0:
            names += residual.pop(0)
        for one, several in zip_longest(residual, attention):
            names += [*(one or ()), *(several or ())]
    return names


def _latent_channels(config: Any) -> int:
    """Channels that come in and go out; what only comes in belongs to the item."""
    return min(config.in_channels, config.get("out_channels") or config.in_channels)


def _sd3_limits(config: Any) -> Limits:
    side = config.pos_embed_max_size and config.pos_embed_max_size * config.patch_size
    widths = config.joint_attention_dim, config.pooled_projection_dim
    return Limits(_latent_channels(config), *widths, side, patch=config.patch_size)


def _flux_limits(config: Any) -> Limits:
    return Limits(_latent_channels(config) // 4, config.joint_attention_dim, config.pooled_projection_dim, patch=2)


def _unet_limits(config: Any) -> Limits:
    width, pooled = config.cross_attention_dim, None
    if config.addition_embed_type == "text_time":  # SDXL: the pooled text and six numbers of sizes in one vector
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return Limits(_latent_channels(config), width if isinstance(width, int) else None, pooled)


@dataclass(frozen=True)
class Architecture:
    """How to work with one class of network.

    call: the network on (x, timestep, cond).  tap_names: blocks a discriminator can read, in running order.
    lora_under: containers of the layers that get a LoRA.
    default_process: where the model's folder has no scheduler.  lora_prefix: of LoRA keys, the pipeline's name for the
    network.  scales: read-outs and entries of a multi-scale discriminator, where the network has scales of its own.
    limits: what a network with this config can take.  units: what is offloaded piece by piece, the taps unless given.
    items: the per-item tensors that a network of more input channels takes after the latent, in their order: one of
    these, whichever has as many channels.  unscaled: those of them that it takes as the autoencoder gave them.
    values: of a latent's channel that are one channel of the network's input.  modulation: the module whose output
    [B, D] modulates the blocks.
    """

    name: str
    call: Callable[[Network, Tensor, Tensor, Cond], Tensor]
    tap_names: Callable[[Network], list[str]]
    lora_under: tuple[str, ...]
    default_process: Callable[[], NoiseProcess]
    lora_prefix: str = "transformer"
    scales: Callable[[Network], tuple[list[str], list[str]]] | None = None
    limits: Callable[[Any], Limits] = lambda config: Limits()
    units: Callable[[Network], list[str]] | None = None
    items: tuple[tuple[str, ...], ...] = ()
    unscaled: tuple[str, ...] = ()
    values: int = 1
    modulation: str = "time_text_embed"

    def items_of(self, config: Any) -> tuple[str, ...]:
        """Per-item tensors that a network with this config takes after the latent. Raises ValueError for an unknown
        number of channels."""
        latent = _latent_channels(config) // self.values
        more = config.in_channels // self.values - latent
        channels = {names: sum(ITEM_TENSORS[name].shape((latent, 1, 1))[0] for name in names) for names in self.items}
        for names in channels:
            if channels[names] == more:
                return names
        if more:
            known = "; ".join(f"{count} ({', '.join(names)})" for names, count in channels.items())
            raise ValueError(
                f"this network takes {more} channels beside the latent's {latent}, and what they are is not known; "
                f"known are {known}"
            )
        return ()


# Orders of diffusers' pipelines; FLUX.1 Fill's mask is of pixels.
INPAINTING, FILLING, EDITING = (MASK, MASKED_IMAGE), (MASKED_IMAGE, PIXEL_MASK), (SOURCE_IMAGE,)

ARCHITECTURES = {  # by diffusers' class of the network
    "SD3Transformer2DModel": Architecture(
        name="sd3",
        call=_call_sd3,
        tap_names=_transformer_taps,
        lora_under=("transformer_blocks",),
        default_process=lambda: FlowProcess(timestep_multiplier=1000.0, shift_alpha=3.0),
        limits=_sd3_limits,
        items=(INPAINTING, EDITING),
    ),
    "FluxTransformer2DModel": Architecture(
        name="flux",
        call=_call_flux,
        tap_names=_transformer_taps,
        lora_under=("transformer_blocks", "single_transformer_blocks"),
        default_process=lambda: FlowProcess(timestep_multiplier=1.0, shift_alpha=1.0),
        limits=_flux_limits,
        items=(FILLING, EDITING),
        values=4,
    ),
    "UNet2DConditionModel": Architecture(
        name="unet",
        call=_call_unet,
        tap_names=_unet_taps,
        lora_under=("attentions",),
        default_process=lambda: DiscreteProcess(cumulative_alphas(), "eps"),
        lora_prefix="unet",
        scales=_unet_scales,
        limits=_unet_limits,
        units=_unet_units,
        items=(INPAINTING, EDITING),
        unscaled=EDITING,  # InstructPix2Pix
        modulation="time_embedding",
    ),
}


class DiffusersBackend:
    """A frozen diffusers network with its noise process, tap names and path switch.

    network: one of the classes in `ARCHITECTURES`, in any precision.  process: default that of the architecture.
    gradient_checkpointing: recompute blocks in the backward; views stay correct (`LoraSwitch.checkpoint`).
    items: per-item tensors that it takes, None for those that its input channels tell; FLUX.1 Kontext's `REFERENCE` is
    further tokens, and nothing in the network says so.
    Raises ValueError for another class, or input channels that nobody knows.
    """

    def __init__(
        self,
        network: Network,
        process: NoiseProcess | None = None,
        gradient_checkpointing: bool = False,
        items: tuple[str, ...] | None = None,
    ) -> None:
        kind = type(network).__name__
        if kind not in ARCHITECTURES:
            raise ValueError(f"{kind} is not supported; known: {', '.join(ARCHITECTURES)}")
        self.architecture = ARCHITECTURES[kind]
        self.family_name = family_of_network(kind, network.config) or self.architecture.name
        self.items = self.architecture.items_of(network.config) if items is None else items
        self.tokens = 0  # of the image in the forward of `maps` that is running
        self.network: Network = network.eval().requires_grad_(False)
        self.process = process or self.architecture.default_process()
        self.switch = LoraSwitch()
        self.original: Network | None = None  # of a trainable copy: the network it was made of
        self.offloaded: Offload | None = None
        self.compiled_by = ""  # what has compiled the blocks, if they are
        self.sharding: Sharding | None = None  # how its weights are shared out among processes
        self.kept_digest = ""  # its fingerprint from before they were
        self.base = ""  # the fingerprint from before LoRAs were put into the weights
        self.below: list[LoraFile] = []  # these
        self.gradient_checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            network.enable_gradient_checkpointing(self.switch.checkpoint)

    def offload(self, device: torch.device | str, tier: str, folder: str | Path | None = None, copies=False) -> Offload:
        """Keep the blocks' frozen weights away from the device (`Offload`); the rest of the network moves there."""
        assert self.offloaded is None, "its blocks are wrapped already"
        blocks = [self.network.get_submodule(name) for name in self.units]
        self.offloaded = Offload(self.network, blocks, device, tier, folder, copies)
        for index, block in enumerate(blocks):
            block.forward = self.offloaded.around(index, block.forward)
        return self.offloaded

    def compile(self, backend: str = INDUCTOR) -> None:
        """Compile the blocks, those of copies that are made later, too. Raises ValueError where that cannot be."""
        check_compilable(self.network, next(self.network.parameters()).device, backend)
        self.compiled_by = backend
        for block in map(self.network.get_submodule, self.units):
            block.forward = compiled(block.forward, self.switch, backend)

    @property
    def units(self) -> list[str]:
        """What is offloaded or gathered piece by piece, in running order."""
        return (self.architecture.units or self.architecture.tap_names)(self.network)

    def share_out(self, sharding: Sharding) -> None:
        """Leave this process its part of the weights (`Sharding.share_out`), of a copy to train, too.

        Raises ValueError for quantized weights.
        """
        check_in_full(self.network)
        self.kept_digest = self.digest()
        self.base = self.base or self.kept_digest
        self.sharding = sharding
        sharding.share_out(self.network, self.units)

    def digest(self) -> str:
        """The fingerprint of the network as it is."""
        return self.kept_digest or fingerprint(self.network)

    @property
    def takes_guidance(self) -> bool:
        """Whether the network has an input for a guidance scale (guidance-distilled: FLUX.1 dev)."""
        return has_embedded_guidance(self.network.config)

    @property
    def tap_names(self) -> list[str]:
        """All blocks that can be tapped, in the order in which they run."""
        return self.architecture.tap_names(self.network)

    def default_taps(self, count: int = 6) -> list[str]:
        """About ``count`` blocks, evenly spread over the first three quarters of the network."""
        return spread_taps(self.tap_names, count)

    def multi_scale_taps(self, count: int = 3) -> tuple[list[str], list[str]]:
        """Blocks for a multi-scale discriminator: (read-outs, coarse to fine; blocks that smaller latents enter).

        A UNet is read at its decoder's scales and fed at each lower scale of its encoder. A transformer has one scale:
        it is read at ``count`` depths and fed before all but the first of those parts.
        """
        scales = self.architecture.scales
        return scales(self.network) if scales else depth_scales(self.tap_names, count)

    def block_input(self, args: tuple, kwargs: dict) -> BlockInput:
        hidden, put = hidden_states_of(args, kwargs)
        if REFERENCE not in self.items:
            return hidden, put
        return hidden[:, : self.tokens], lambda image: put(torch.cat([image, hidden[:, self.tokens :]], dim=1))

    def trainable_copy(self, dtype: torch.dtype = torch.float32) -> DiffusersBackend:
        """The same network once more, with weights to train; nothing that was hooked onto this one comes along.

        Where the weights are shared out among processes, so are those of the copy, and no process ever has it whole.
        Raises ValueError for quantized weights.
        """
        if self.sharding is None:
            check_in_full(self.network)
        with torch.random.fork_rng(), torch.device("meta") if self.sharding else nullcontext():
            network = type(self.network).from_config(self.network.config)
        if self.sharding is None:
            network.load_state_dict(self.network.state_dict())
            on_device(network, next(self.network.parameters()).device)
        if dtype != next(network.parameters()).dtype:
            network.to(dtype)
        copied = DiffusersBackend(network, self.process, self.gradient_checkpointing, self.items)
        copied.network.requires_grad_(True)
        if self.compiled_by:
            copied.compile(self.compiled_by)
        if self.sharding is not None:
            self.sharding.share_out(network, copied.units)
            self.sharding.fill(network, self.network)
            copied.sharding = self.sharding
        copied.original, copied.base, copied.below = self.network, self.base, self.below
        return copied

    def forward(self, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        if cond.mask is not None:
            raise ValueError("texts of different lengths in a batch: encode all, the empty one too, to one length")
        dtype = next(self.network.parameters()).dtype
        items = self._items_of(cond, x)
        shown = {name: items.pop(name) for name in (REFERENCE,) if name in items}
        x = torch.cat([x, *items.values()], dim=1)
        return self.architecture.call(self.network, x.to(dtype), timestep, replace(cond, extra=shown).to(dtype=dtype))

    def _items_of(self, cond: Cond, x: Tensor) -> dict[str, Tensor]:
        """Per-item tensors [B, ., H, W] that the network takes after the latent x [B, C, H, W]; noise scales none."""
        if lacking := missing(self.items, cond.extra):
            raise ValueError(
                f"this network takes {' and '.join(self.items)} of every picture beside its latent, and here is no "
                f"{lacking}: they belong to the items of a dataset (masks: [masks] source; pictures to edit: "
                "[pictures] sources)"
            )
        space = FAMILIES[self.family_name].space if self.family_name in FAMILIES else None
        found = {}
        for name in self.items:
            value = like(cond.extra[name], x)
            if space and name in self.architecture.unscaled:
                value = value / space.scale + space.shift
            found[name] = value
        return found

    def maps(self, x: Tensor, timestep: Tensor, cond: Cond, taps: Sequence[str], whole: bool = False) -> list[Tensor]:
        """Features of ``taps`` as maps; FLUX's single blocks and both kinds of transformer give image tokens only.

        whole: run to the end, and give the network's output behind them.
        """
        patch = self.limits().patch
        height, width = (side // patch for side in x.shape[2:])
        self.tokens = height * width
        outputs = collect_taps(self.network, taps, lambda: self.forward(x, timestep, cond), self.switch, whole=whole)
        return [out if out.ndim == 4 else tokens_to_map(out[:, : self.tokens], height, width) for out in outputs]

    def lora_targets(self) -> list[str]:
        """All linear layers of the blocks that a forward without extras runs."""
        return linear_layers(self.network, self.architecture.lora_under)

    def limits(self) -> Limits:
        """What the network's config says that it can take."""
        return replace(self.architecture.limits(self.network.config), items=self.items)

    def description(self) -> dict[str, Any]:
        """What a LoRA's metadata says of its base: prediction, shift factor, family, fingerprint, LoRAs in it."""
        return {
            "prediction": getattr(self.process, "prediction", "flow"),
            "shift_alpha": str(getattr(self.process, "shift_alpha", 1.0)),
            "family": self.family_name,
            "base": self.base or fingerprint(self.network),
            "base_layout": "diffusers",
            **({"below": [lora.below() for lora in self.below]} if self.below else {}),
        }

    def put_below(self, path: str) -> None:
        """Put a LoRA into the weights, which are then what a student is trained above. Raises ValueError for one that
        does not fit."""
        lora = self.read_lora(path)
        self.base = self.base or fingerprint(self.network)
        put_into_weights(self.network, lora)
        self.below.append(lora)

    def read_lora(self, path: str) -> LoraFile:
        """A LoRA file by the linear layers of this network. Raises ValueError for one that does not fit."""
        return read_lora_file(path, [name for name, layer in self.network.named_modules() if is_linear(layer)])

    def export(self, lora: Lora | None) -> dict[str, Tensor]:
        """A LoRA's tensors, under the names that diffusers and ComfyUI read.

        None: how far the weights of a `trainable_copy` are from those it was made of, float32, ``PREFIX.LAYER.diff``
        (``.diff_b`` for a bias): what the graph writes, too, under the host's own names.
        """
        if lora is not None:
            return lora.export(self.architecture.lora_prefix)
        if self.original is None:
            raise ValueError("only a trainable copy has differences to export; this is the model itself")
        return weight_differences(self.network, self.original, self.architecture.lora_prefix)

    def open_lora(self, state: dict[str, Tensor]) -> Lora:
        """The LoRA of an `export` on this backbone. Raises ValueError when it does not fit."""
        prefix, end = f"{self.architecture.lora_prefix}.", ".lora_A.weight"
        targets = [key.removeprefix(prefix).removesuffix(end) for key in state if key.endswith(end)]
        if not targets or any(value.ndim != 2 or not value.numel() for value in state.values()):
            raise ValueError("this LoRA does not fit the model: it has no matrices A and B of a layer, or empty ones")
        rank = max(len(state[f"{prefix}{name}{end}"]) for name in targets)
        lora = self.new_lora(rank, targets)
        lora.load_export(state, self.architecture.lora_prefix)
        return lora

    def lora_parts(self, state: dict[str, Tensor]) -> tuple[Parts, list[str]]:
        """A LoRA file by the layers of this network (`lora_start.parts_by_name`)."""
        return parts_by_name(state, self.lora_targets())

    def add_differences(self, state: dict[str, Tensor]) -> None:
        """Make this network what a full fine-tuning made of it. Raises ValueError for differences of another model."""
        add_differences(self.network, state, self.architecture.lora_prefix)

    def new_strengths(self, config: StrengthsConfig) -> StrengthEmbedding:
        """A fresh embedding of strengths (output 0) in what modulates the blocks."""
        module = self.network.get_submodule(self.architecture.modulation)
        return StrengthEmbedding(module, [m for m in module.modules() if is_linear(m)][-1].out_features, config)

    def new_lora(self, rank: int, targets: Sequence[str] | None = None) -> Lora:
        """A fresh LoRA (output 0) on this backbone."""
        return Lora(self.network, targets or self.lora_targets(), rank, self.switch)

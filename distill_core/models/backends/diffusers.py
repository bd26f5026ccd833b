"""diffusers' SD3 and FLUX transformers and UNet2DConditionModel as backends.

What differs between the architectures is data (`ARCHITECTURES`) plus one function that calls the network.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ...diffusion.process import DiscreteProcess, FlowProcess, NoiseProcess, cumulative_alphas, zero_terminal_snr
from ...files import fingerprint
from ..denoiser import Cond
from ..families import family_of_network
from ..features import BlockInput, collect_taps, depth_scales, hidden_states_of, spread_taps, tokens_to_map
from ..lora import Lora, LoraSwitch, add_differences, linear_layers, weight_differences

Network = Any  # one of diffusers' classes: nn.Module declares none of their attributes


def _call_sd3(network: Network, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
    return network(
        hidden_states=x, timestep=timestep, encoder_hidden_states=cond.context, pooled_projections=cond.pooled
    ).sample


def _call_flux(network: Network, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
    """FLUX takes 2x2 patches as tokens, positions as ids and a time in [0, 1]."""
    height, width = x.shape[2] // 2, x.shape[3] // 2
    tokens = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    img_ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).to(x)
    guidance = cond.guidance
    if network.config.guidance_embeds and guidance is None:
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
    return rearrange(out, "b (h w) (c p q) -> b c (h p) (w q)", h=height, w=width, p=2, q=2)


def _call_unet(network: Network, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
    added = None
    if network.config.addition_embed_type == "text_time":
        height, width = 8 * x.shape[2], 8 * x.shape[3]  # SDXL's size conditioning: original, crop, target, in pixels
        time_ids = x.new_tensor([height, width, 0, 0, height, width]).expand(len(x), 6)
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


@dataclass(frozen=True)
class Architecture:
    """How to work with one class of network.

    call: the network on (x, timestep, cond).  tap_names: blocks a discriminator can read, in running order.
    lora_under: containers of the layers that get a LoRA.  patch_size: latent pixels a side of a token.
    default_process: where the model's folder has no scheduler.  lora_prefix: of LoRA keys, the pipeline's name for the
    network.  scales: read-outs and entries of a multi-scale discriminator, where the network has scales of its own.
    """

    name: str
    call: Callable[[Network, Tensor, Tensor, Cond], Tensor]
    tap_names: Callable[[Network], list[str]]
    lora_under: tuple[str, ...]
    patch_size: int
    default_process: Callable[[], NoiseProcess]
    lora_prefix: str = "transformer"
    scales: Callable[[Network], tuple[list[str], list[str]]] | None = None


ARCHITECTURES = {  # by diffusers' class of the network
    "SD3Transformer2DModel": Architecture(
        name="sd3",
        call=_call_sd3,
        tap_names=_transformer_taps,
        lora_under=("transformer_blocks",),
        patch_size=2,
        default_process=lambda: FlowProcess(timestep_multiplier=1000.0, shift_alpha=3.0),
    ),
    "FluxTransformer2DModel": Architecture(
        name="flux",
        call=_call_flux,
        tap_names=_transformer_taps,
        lora_under=("transformer_blocks", "single_transformer_blocks"),
        patch_size=2,
        default_process=lambda: FlowProcess(timestep_multiplier=1.0, shift_alpha=1.0),
    ),
    "UNet2DConditionModel": Architecture(
        name="unet",
        call=_call_unet,
        tap_names=_unet_taps,
        lora_under=("attentions",),
        patch_size=1,
        default_process=lambda: DiscreteProcess(cumulative_alphas(), "eps"),
        lora_prefix="unet",
        scales=_unet_scales,
    ),
}


class DiffusersBackend:
    """A frozen diffusers network with its noise process, tap names and path switch.

    network: one of the classes in `ARCHITECTURES`, in any precision.  process: default that of the architecture.
    gradient_checkpointing: recompute blocks in the backward; views stay correct (`LoraSwitch.checkpoint`).
    Raises ValueError for another class.
    """

    def __init__(
        self, network: Network, process: NoiseProcess | None = None, gradient_checkpointing: bool = False
    ) -> None:
        kind = type(network).__name__
        if kind not in ARCHITECTURES:
            raise ValueError(f"{kind} is not supported; known: {', '.join(ARCHITECTURES)}")
        self.architecture = ARCHITECTURES[kind]
        self.family_name = family_of_network(kind, network.config) or self.architecture.name
        self.network: Network = network.eval().requires_grad_(False)
        self.process = process or self.architecture.default_process()
        self.switch = LoraSwitch()
        self.original: Network | None = None  # of a trainable copy: the network it was made of
        self.gradient_checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            network.enable_gradient_checkpointing(self.switch.checkpoint)

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
        return hidden_states_of(args, kwargs)

    def trainable_copy(self, dtype: torch.dtype = torch.float32) -> DiffusersBackend:
        """The same network once more, with weights to train; nothing that was hooked onto this one comes along."""
        with torch.random.fork_rng():
            network = type(self.network).from_config(self.network.config)
        network.load_state_dict(self.network.state_dict())
        example = next(self.network.parameters())
        network.to(example.device)
        if dtype != next(network.parameters()).dtype:
            network.to(dtype)
        copied = DiffusersBackend(network, self.process, self.gradient_checkpointing)
        copied.network.requires_grad_(True)
        copied.original = self.network
        return copied

    def forward(self, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        if cond.mask is not None:
            raise ValueError("texts of different lengths in a batch: encode all, the empty one too, to one length")
        dtype = next(self.network.parameters()).dtype
        return self.architecture.call(self.network, x.to(dtype), timestep, cond.to(dtype))

    def maps(self, x: Tensor, timestep: Tensor, cond: Cond, taps: Sequence[str]) -> list[Tensor]:
        """Features of ``taps`` as maps; FLUX's single blocks and both kinds of transformer give image tokens only."""
        outputs = collect_taps(self.network, taps, lambda: self.forward(x, timestep, cond), self.switch)
        height, width = (side // self.architecture.patch_size for side in x.shape[2:])
        return [out if out.ndim == 4 else tokens_to_map(out, height, width) for out in outputs]

    def lora_targets(self) -> list[str]:
        """All linear layers of the blocks that a forward without extras runs."""
        return linear_layers(self.network, self.architecture.lora_under)

    def description(self) -> dict[str, str]:
        """What a LoRA's metadata says of its base: prediction, shift factor, family and fingerprint."""
        return {
            "prediction": getattr(self.process, "prediction", "flow"),
            "shift_alpha": str(getattr(self.process, "shift_alpha", 1.0)),
            "family": self.family_name,
            "base": fingerprint(self.network),
        }

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
        lora = self.new_lora(next(iter(state.values())).shape[0], targets)
        lora.load_export(state, self.architecture.lora_prefix)
        return lora

    def add_differences(self, state: dict[str, Tensor]) -> None:
        """Make this network what a full fine-tuning made of it. Raises ValueError for differences of another model."""
        add_differences(self.network, state, self.architecture.lora_prefix)

    def new_lora(self, rank: int, targets: Sequence[str] | None = None) -> Lora:
        """A fresh LoRA (output 0) on this backbone."""
        return Lora(self.network, targets or self.lora_targets(), rank, self.switch)


def load_backend(
    folder: str | Path, dtype: torch.dtype = torch.float32, gradient_checkpointing: bool = False
) -> DiffusersBackend:
    """A backend from a diffusers model folder on disk (``transformer`` or ``unet``, with ``scheduler`` beside it).

    The scheduler's config gives the prediction type, the alphas or the shift. Nothing is downloaded.
    Raises ValueError when there is no supported network in the folder.
    """
    import diffusers

    root = Path(folder)
    candidates = [root / name for name in ("transformer", "unet") if (root / name / "config.json").exists()]
    network_folder = candidates[0] if candidates else root
    if not (network_folder / "config.json").exists():
        raise ValueError(f"no diffusers model in {root}: expected transformer/config.json or unet/config.json")
    class_name = json.loads((network_folder / "config.json").read_text()).get("_class_name")
    if class_name not in ARCHITECTURES:
        raise ValueError(f"{network_folder} holds a {class_name}; known: {', '.join(ARCHITECTURES)}")
    network = getattr(diffusers, class_name).from_pretrained(network_folder, torch_dtype=dtype, local_files_only=True)
    scheduler = root / "scheduler" / "scheduler_config.json"
    process = process_from_scheduler(json.loads(scheduler.read_text()), class_name) if scheduler.exists() else None
    return DiffusersBackend(network, process, gradient_checkpointing)


def process_from_scheduler(config: dict, class_name: str = "") -> NoiseProcess:
    """The noise process that a diffusers scheduler config describes (flow, eps or v; zero terminal SNR)."""
    if "Flow" in config.get("_class_name", ""):
        usual = ARCHITECTURES[class_name].default_process() if class_name in ARCHITECTURES else FlowProcess()
        multiplier = getattr(usual, "timestep_multiplier", 1000.0)
        # With dynamic shifting `shift` is unused and mu grows with the resolution; max_shift is its value at 1024 px.
        dynamic = config.get("use_dynamic_shifting", False)
        return FlowProcess(multiplier, math.exp(config.get("max_shift", 1.15)) if dynamic else config.get("shift", 1.0))
    alphas = cumulative_alphas(
        config.get("beta_schedule", "scaled_linear"),
        config.get("beta_start", 0.00085),
        config.get("beta_end", 0.012),
        config.get("num_train_timesteps", 1000),
    )
    if config.get("rescale_betas_zero_snr"):
        alphas = zero_terminal_snr(alphas)
    prediction = {"epsilon": "eps", "v_prediction": "v"}.get(config.get("prediction_type", "epsilon"))
    if prediction is None:
        raise ValueError(f"prediction type {config['prediction_type']!r} is not supported; use epsilon or v_prediction")
    return DiscreteProcess(alphas, prediction)

"""diffusers' SD3 and FLUX transformers and UNet2DConditionModel as backends (`diffusers_architectures`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...diffusion.process import DiscreteProcess, FlowProcess, NoiseProcess, cumulative_alphas, zero_terminal_snr
from ...digests import fingerprint
from ...errors import opening
from ...files import read_json
from ..compiled import INDUCTOR, check_compilable, compiled
from ..denoiser import Cond, Limits
from ..families import family_of_network
from ..features import BlockInput, collect_taps, depth_scales, hidden_states_of, spread_taps, tokens_to_map
from ..lora import Lora, LoraSwitch, add_differences, is_linear, linear_layers, weight_differences
from ..lora_stack import LoraFile, put_into_weights, read_lora_file
from ..lora_start import Parts, parts_by_name
from ..offload import Offload
from ..precision import check_in_full, on_device
from ..sharding import Sharding
from .diffusers_architectures import ARCHITECTURES, Network, has_embedded_guidance

WEIGHT_NAMES = ("diffusion_pytorch_model", "model", "pytorch_model")  # files of diffusers and transformers


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
        return hidden_states_of(args, kwargs)

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
        copied = DiffusersBackend(network, self.process, self.gradient_checkpointing)
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
        return self.architecture.call(self.network, x.to(dtype), timestep, cond.to(dtype=dtype))

    def maps(self, x: Tensor, timestep: Tensor, cond: Cond, taps: Sequence[str]) -> list[Tensor]:
        """Features of ``taps`` as maps; FLUX's single blocks and both kinds of transformer give image tokens only."""
        outputs = collect_taps(self.network, taps, lambda: self.forward(x, timestep, cond), self.switch)
        height, width = (side // self.architecture.patch_size for side in x.shape[2:])
        return [out if out.ndim == 4 else tokens_to_map(out, height, width) for out in outputs]

    def lora_targets(self) -> list[str]:
        """All linear layers of the blocks that a forward without extras runs."""
        return linear_layers(self.network, self.architecture.lora_under)

    def limits(self) -> Limits:
        """What the network's config says that it can take."""
        return self.architecture.limits(self.network.config)

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
        lora = read_lora_file(path, [name for name, layer in self.network.named_modules() if is_linear(layer)])
        self.base = self.base or fingerprint(self.network)
        put_into_weights(self.network, lora)
        self.below.append(lora)

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
        lora = self.new_lora(next(iter(state.values())).shape[0], targets)
        lora.load_export(state, self.architecture.lora_prefix)
        return lora

    def lora_parts(self, state: dict[str, Tensor]) -> tuple[Parts, list[str]]:
        """A LoRA file by the layers of this network (`lora_start.parts_by_name`)."""
        return parts_by_name(state, self.lora_targets())

    def add_differences(self, state: dict[str, Tensor]) -> None:
        """Make this network what a full fine-tuning made of it. Raises ValueError for differences of another model."""
        add_differences(self.network, state, self.architecture.lora_prefix)

    def new_lora(self, rank: int, targets: Sequence[str] | None = None) -> Lora:
        """A fresh LoRA (output 0) on this backbone."""
        return Lora(self.network, targets or self.lora_targets(), rank, self.switch)


def load_backend(
    folder: str | Path, dtype: torch.dtype = torch.float32, gradient_checkpointing: bool = False, weights: bool = True
) -> DiffusersBackend:
    """A backend from a diffusers model folder on disk (``transformer`` or ``unet``, with ``scheduler`` beside it).

    The scheduler's config gives the prediction type, the alphas or the shift. Nothing is downloaded.
    weights False: only the network's config is read, and its weights are on the meta device.
    Raises ValueError when there is no supported network in the folder.
    """
    import diffusers

    root = Path(folder)
    candidates = [root / name for name in ("transformer", "unet") if (root / name / "config.json").exists()]
    network_folder = candidates[0] if candidates else root
    if not (network_folder / "config.json").exists():
        raise ValueError(f"no diffusers model in {root}: expected transformer/config.json or unet/config.json")
    class_name = read_json(network_folder / "config.json", "download the model again").get("_class_name")
    if class_name not in ARCHITECTURES:
        raise ValueError(f"{network_folder} holds a {class_name}; known: {', '.join(ARCHITECTURES)}")
    variant = only_variant([network_folder]) if weights else None
    options = {"torch_dtype": dtype, "local_files_only": True, "variant": variant}
    with opening(network_folder, f"a {class_name}"):
        kind = getattr(diffusers, class_name)
        network = kind.from_pretrained(network_folder, **options) if weights else unloaded(kind, network_folder)
    scheduler = root / "scheduler" / "scheduler_config.json"
    process = None
    if scheduler.exists():
        with opening(scheduler, "a scheduler's settings"):
            process = process_from_scheduler(read_json(scheduler), class_name)
    return DiffusersBackend(network, process, gradient_checkpointing)


def unloaded(kind: Any, folder: Path) -> Network:
    """A model of diffusers as its config describes it, its weights on the meta device."""
    with torch.device("meta"):
        return kind.from_config(kind.load_config(folder, local_files_only=True))


def only_variant(folders: Sequence[Path]) -> str | None:
    """The variant ("fp16") in which one of the folders has its weights, where it has no plain ones; None for none."""
    for folder in folders:
        names = [path.name.split(".") for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")]
        variants = {parts[1].split("-")[0] for parts in names if len(parts) > 2 and parts[0] in WEIGHT_NAMES}
        if variants and not any(parts[0].split("-")[0] in WEIGHT_NAMES and len(parts) == 2 for parts in names):
            return "fp16" if "fp16" in variants else min(variants)
    return None


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

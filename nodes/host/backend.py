"""A MODEL of ComfyUI as a `models.denoiser.Backend`: every quirk of the host that training meets is handled here.

* Nodes run under inference mode, in which loaded weights and conditionings are tensors that autograd refuses: training
  leaves the mode, has its own copy of the network, and clones what it is given.
* With ``in_training`` off some of the host's kernels (rope, fused norms) have no gradient.
* The attention it picks by default may cut its work differently in the recompute of a checkpointed block: SDPA then.
* On NVIDIA the host pages weights in and out per layer; the copy is a plain one that stays on the device.
* FLUX-type blocks add to their input in place: `features.OutOfPlace` runs inside every block, the recompute too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.samplers
import torch
from torch import Tensor, nn

from ...distill_core.devices import pick
from ...distill_core.models.compiled import INDUCTOR, check_compilable, compiled
from ...distill_core.models.denoiser import Cond, Limits
from ...distill_core.models.features import BlockInput, OutOfPlace, collect_taps, spread_taps, tokens_to_map
from ...distill_core.models.lora import Lora, LoraSwitch, is_linear
from ...distill_core.models.lora_start import Parts
from ...distill_core.models.offload import FILE, NONE, Offload
from ...distill_core.models.precision import halves_to_bfloat16
from ...distill_core.models.strengths import StrengthEmbedding, StrengthsConfig
from ...distill_core.training.loop_config import TrainConfig
from .architectures import Architecture, architecture_of
from .attention import training_attention
from .carried import check_teachable
from .conditioning import check_places, cond_of, host_conds
from .copies import can_share, forget, lie_with, own_copy, shared_copy, shared_weights, trainable_model
from .identity import LAYOUT, loras_below, weights_identity
from .items import IMAGE_VALUE, items_of, latents_out, takes_references
from .lora_keys import export_differences, export_lora, read_parts
from .model import family_of, prediction_of, shift_alpha_of, training_process_of
from .quantized import in_full, with_gradient


@contextmanager
def training_backend(
    model,
    checkpointing: bool = True,
    train: TrainConfig | None = None,
    folder: Path | None = None,
    beside: ComfyBackend | None = None,
) -> Iterator[ComfyBackend]:
    """MODEL as something that can be trained on, outside of inference mode; everything is as before on exit.

    The backend has its own copy of the weights with MODEL's LoRAs in them (the teacher is MODEL as it is) and its own
    patches, so nothing that is trained reaches the MODEL other nodes hold. checkpointing: recompute blocks in the
    backward, one at a time. train: where its offload says so, the blocks' weights are not on MODEL's device (in host
    memory, or mapped from ``folder``). beside: another one that is on the device at the same time. Raises ValueError
    for a model that cannot be distilled, or that carries what training would leave out (`carried`).
    """
    architecture, process = architecture_of(model.model.diffusion_model), training_process_of(model)
    check_teachable(model)
    with torch.inference_mode(False), in_training():
        away = train is not None and train.offload != NONE
        shared = away and train.offload == FILE and can_share(model)
        patcher = shared_copy(model) if shared else own_copy(model)
        backend = ComfyBackend(patcher, architecture, process, checkpointing)
        if beside is not None:
            backend.together = beside.together
            backend.together.append(patcher)
        if away:
            patcher.load_device = patcher.offload_device
        try:
            backend.to_device()
            backend.network.requires_grad_(False).eval()
            if away:
                if train.mixed(model.load_device):
                    halves_to_bfloat16(backend.network)
                names = shared_weights(model, backend.network) if shared else ()
                backend.offload(model.load_device, train.offload, folder)
                lie_with(model, backend.network, names)
                backend.to_device()
            yield backend
        finally:
            backend.release()
            backend.together.remove(patcher)
            forget(patcher)


class ComfyBackend:
    """The interface of `denoiser.Backend` over the host's network. Made by `training_backend`.

    Images only: latents are [B, C, H, W], also for the video models, which see one frame.
    """

    def __init__(self, patcher, architecture: Architecture, process, checkpointing: bool) -> None:
        self.patcher, self.model, self.architecture, self.process = patcher, patcher.model, architecture, process
        self.checkpointing, self.copies, self.original = checkpointing, [], None
        self.together = [patcher]  # what is on the device at the same time
        self.offloaded: Offload | None = None
        self.compiled_by = ""  # what has compiled the blocks, if they are
        self.processed: tuple[Cond, torch.Size, list] | None = None  # the last conditioning as the host wants it
        self.tokens: tuple[int, int] = 0, 0  # of text and of the image in the forward that is running
        self.network: nn.Module = patcher.model.diffusion_model
        self.family = family_of(patcher) or architecture.name
        self.switch = LoraSwitch()
        self.sampling = patcher.get_model_object("model_sampling")
        latent_format = patcher.get_model_object("latent_format")
        self.channels: int = latent_format.latent_channels
        self.video = latent_format.latent_dimensions == 3
        self.spacial_scale: int = latent_format.spacial_downscale_ratio
        self.options = _transformer_options(patcher)
        # The host's apply_model does everything around the network; what it does to x and sigma is the Denoiser's part.
        patcher.add_object_patch("model_sampling", _NetworkItself())
        self.wrapped = [self.network.get_submodule(name) for name in architecture.checkpoints(self.network)]
        self.stored_small = [module for module in self.network.modules() if is_linear(module) and in_full(module)]
        self.guard()

    def to_device(self) -> None:
        """Have the device for this network, and for one beside it, whatever else the host has on it."""
        if self.offloaded is None:
            comfy.model_management.load_models_gpu(self.together, memory_required=1e20, force_full_load=True)
        elif self.offloaded.device.type != "cpu":  # the host counts it as a model on the CPU, and leaves it as it is
            comfy.model_management.free_memory(1e30, self.offloaded.device)

    def offload(self, device: torch.device | str, tier: str, folder: Path | None = None, copies=False) -> Offload:
        """Keep the blocks' weights away from the device (`Offload`); the rest of the network moves there."""
        self.unguard()
        self.offloaded = Offload(self.network, self.wrapped, device, tier, folder, copies)
        self.guard()
        return self.offloaded

    def compile(self, backend: str = INDUCTOR) -> None:
        """Compile the blocks, those of copies that are made later, too. Raises ValueError where that cannot be."""
        if self.stored_small:
            raise ValueError(
                "compile: the model's weights are quantized or fp8, with kernels of their own; switch it off"
            )
        check_compilable(self.network, next(self.network.parameters()).device, backend)
        self.unguard()
        self.compiled_by = backend
        self.guard()

    @property
    def tap_names(self) -> list[str]:
        """All blocks that can be tapped, in the order in which they run."""
        return self.architecture.taps(self.network)

    def default_taps(self, count: int = 6) -> list[str]:
        """About ``count`` blocks, evenly spread over the first three quarters of the network."""
        return spread_taps(self.tap_names, count)

    def multi_scale_taps(self, count: int = 3) -> tuple[list[str], list[str]]:
        """Blocks for a multi-scale discriminator: (read-outs, coarse to fine; blocks that smaller latents enter).

        A UNet is read at the end of each scale of its decoder and fed at the start of each lower one of its encoder. A
        transformer has one scale: it is read at ``count`` depths and fed before all but the first of those parts.
        """
        return self.architecture.multi_scale_taps(self.network, count)

    def lora_targets(self) -> list[str]:
        """All linear layers of the family's blocks. Raises ValueError when none is an ordinary one."""
        targets = self.architecture.lora_targets(self.network)
        if not targets:
            raise ValueError(
                "this model's layers are quantized in a way that cannot be trained on: load a file in bfloat16, "
                "float16 or plain fp8"
            )
        return targets

    def new_lora(self, rank: int, targets: Sequence[str] | None = None) -> Lora:
        """A fresh LoRA (output 0) on this backbone."""
        return Lora(self.network, targets or self.lora_targets(), rank, self.switch)

    def new_strengths(self, config: StrengthsConfig) -> StrengthEmbedding:
        """A fresh embedding of strengths (output 0) in what modulates the blocks. Raises ValueError for a network that
        edits no picture."""
        if not self.architecture.modulation:
            raise ValueError("strengths are of models that edit a picture, and this one takes none: set told off")
        place = self.network.get_submodule(self.architecture.modulation)
        return StrengthEmbedding(place, [m for m in place.modules() if is_linear(m)][-1].out_features, config)

    def lora_parts(self, state: dict[str, Tensor]) -> tuple[Parts, list[str]]:
        """A LoRA file by the layers of this network, by the host's own reader (`lora_keys.read_parts`)."""
        return read_parts(state, self.model)

    def cond(self, conditioning: list) -> Cond:
        """A CONDITIONING of the host, one row an entry; see `host_conditioning.cond_of`."""
        return cond_of(conditioning)

    def latents_in(self, samples: Tensor) -> Tensor:
        """LATENT samples of the host [B, C, H, W] (or one frame [B, C, 1, H, W]) as the network wants them.

        Raises ValueError for a video or another number of channels.
        """
        if samples.shape[1] != self.channels:
            raise ValueError(
                f"the latents have {samples.shape[1]} channels, this model's have {self.channels}: encode the images "
                "with the model's own VAE"
            )
        if samples.ndim == 5 and samples.shape[2] > 1:
            raise ValueError(f"only images can be trained on, not videos of {samples.shape[2]} latent frames")
        return self._from_host(self.model.process_latent_in(self._to_host(self._from_host(samples.clone().float()))))

    def latents_out(self, latents: Tensor) -> Tensor:
        """The inverse of `latents_in`, in the host's layout (video models: one frame)."""
        return latents_out(self.model, latents)

    def forward(self, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
        """The network's output [B, C, H, W] for its scaled input, its time and conditioning."""
        groups = self._groups(x, cond)
        outputs = []
        for rows, conds in groups:
            with self.switch.dropping(self.switch.dropout and self.switch.dropout.of(rows)):
                outputs.append(self._from_host(self._apply(x, timestep, rows, conds)))
        return _in_order(outputs, [rows for rows, _ in groups])

    def maps(self, x: Tensor, timestep: Tensor, cond: Cond, taps: Sequence[str], whole: bool = False) -> list[Tensor]:
        """Features of ``taps`` as maps [B, C, H, W] of the image tokens; the forward stops after the last one.

        whole: it runs to the end, and the network's output comes behind them.
        Raises ValueError for a conditioning with which the image would not be where it is looked for.
        """
        check_places(cond, self.architecture)
        grid = self.architecture.token_grid(self.network, *x.shape[-2:])
        groups, path, inputs = self._groups(x, cond), self.switch.active, self.switch.inputs
        parts = []
        for rows, conds in groups:
            run = partial(self._apply, x, timestep, rows, conds)
            self.tokens = conds["c_crossattn"].shape[1], grid[0] * grid[1]
            with self.switch.on(path, inputs and (inputs[0], pick(inputs[1], rows))):
                outputs = collect_taps(self.network, taps, run, self.switch, lambda output: output, whole)
            ends = [self._from_host(out) for out in outputs[len(taps) :]]
            image = [self.architecture.image_output(out, self.network, *self.tokens) for out in outputs[: len(taps)]]
            parts.append([*(out if out.ndim == 4 else tokens_to_map(out, *grid) for out in image), *ends])
        order = [rows for rows, _ in groups]
        return [_in_order(list(tap), order) for tap in zip(*parts, strict=True)]

    def block_input(self, args: tuple, kwargs: dict) -> BlockInput:
        """The image entering a block in `maps`, as tokens [B, N, C] or a map, and what puts another one there."""
        where, span = self.architecture.image_input(args, kwargs, self.network, *self.tokens)
        hidden = kwargs[where] if isinstance(where, str) else args[where]

        def put(image: Tensor) -> tuple[tuple, dict]:
            if span is not None:
                image = torch.cat([hidden[:, : span.start], image, hidden[:, span.stop :]], dim=1)
            if isinstance(where, str):
                return args, {**kwargs, where: image}
            return (*args[:where], image, *args[where + 1 :]), kwargs

        return hidden if span is None else hidden[:, span], put

    def trainable_copy(self) -> ComfyBackend:
        """The same network once more, with weights of its own to train in float32; it ends with this backend.

        The patches of MODEL are in its weights as they are in the teacher's; what is frozen is shared. The host does
        not know of it, and so never moves it.
        """
        self.unguard()
        try:
            model = trainable_model(self.model)
        finally:
            self.guard()
        model.model_sampling = self.sampling
        if self.offloaded is not None:
            model.diffusion_model.to(self.offloaded.device)
        patcher = comfy.model_patcher.ModelPatcher(model, self.patcher.load_device, self.patcher.offload_device)
        patcher.model_options = {"transformer_options": self.options}
        copied = ComfyBackend(patcher, self.architecture, self.process, self.checkpointing)
        patcher.patch_model(load_weights=False)
        copied.network.requires_grad_(True).eval()
        if self.compiled_by:
            copied.compile(self.compiled_by)
        self.copies.append(copied)
        copied.original = self.network
        return copied

    def _groups(self, x: Tensor, cond: Cond) -> list[tuple[list[int], dict]]:
        """Rows that the host itself would run in one batch (texts of one length, say), with their processed conds.

        Those of the last conditioning are kept: student, teacher and features of a step ask for the same one.
        """
        given, shape, groups = self.processed or (None, None, [])
        if given is cond and shape == x.shape:
            return groups
        noise, groups = self._to_host(x.detach()), []
        for row in range(len(cond)):
            conds = host_conds(self.model, cond[row : row + 1], noise[row : row + 1], self.spacial_scale)
            for rows, members in groups:
                if comfy.samplers.cond_equal_size(members[0], conds):
                    rows.append(row)
                    members.append(conds)
                    break
            else:
                groups.append(([row], [conds]))
        joined = [(rows, comfy.samplers.cond_cat(members)) for rows, members in groups]
        self.processed = cond, x.shape, joined
        return joined

    def _apply(self, x: Tensor, timestep: Tensor, rows: list[int], conds: dict) -> Tensor:
        if len(rows) < len(x):
            x, timestep = pick(x, rows), pick(timestep, rows)
        options = {**comfy.model_patcher.create_model_options_clone(self.options), "cond_or_uncond": [0]}
        options["sigmas"] = self.process.sigma(timestep)  # some patches work at some noise levels only
        return self.model.apply_model(self._to_host(x), timestep, transformer_options=options, **conds)

    def _to_host(self, x: Tensor) -> Tensor:
        return x.unsqueeze(2) if self.video else x

    def _from_host(self, x: Tensor) -> Tensor:
        return x.squeeze(2) if x.ndim == 5 else x

    def limits(self) -> Limits:
        """What the network can take."""
        limits = self.architecture.limits(self.network, self.channels)
        told = {"items": items_of(self.model), "instead": IMAGE_VALUE, "references": takes_references(self.model)}
        return replace(limits, pixels=self.spacial_scale, **told)

    def description(self) -> dict[str, Any]:
        """What a LoRA's metadata says of its base: prediction, shift factor, family, the digest of the weights as they
        were loaded, and what was patched into them (`identity.loras_below`; left out where nothing was)."""
        below = loras_below(self.patcher)
        return {
            "prediction": prediction_of(self.sampling),
            "shift_alpha": str(shift_alpha_of(self.sampling) or 1.0),
            "family": self.family,
            "base": weights_identity(self.patcher),
            "base_layout": LAYOUT,
            **({"below": below} if below else {}),
        }

    def export(self, lora: Lora | None) -> dict[str, Tensor]:
        """A LoRA that core and diffusers load, also the host's LORA_MODEL; see `lora_keys.export_lora`.

        None: how far the weights of a copy are from those it was made of (`lora_keys.export_differences`).
        """
        if lora is not None:
            return export_lora(lora, self.model, self.architecture)
        return export_differences(self.network, self.original)

    def guard(self) -> None:
        """Give the blocks, and layers whose weights are not stored in full, forwards with right gradients."""
        for layer in self.stored_small:
            layer.forward = with_gradient(layer)
        for index, block in enumerate(self.wrapped):
            forward = block.forward if self.offloaded is None else self.offloaded.around(index, block.forward)
            if self.compiled_by:
                forward = compiled(forward, self.switch, self.compiled_by)
            block.forward = _guarded(forward, self.architecture, self.switch, self.checkpointing)

    def unguard(self) -> None:
        """Take them off; their references to each other would keep the network in memory."""
        for module in (*self.stored_small, *self.wrapped):
            module.__dict__.pop("forward", None)

    def release(self) -> None:
        """Undo what was done to this network and to its copies."""
        self.unguard()
        if self.offloaded is not None:
            self.offloaded.close()
        self.original = self.processed = None
        while self.copies:
            self.copies.pop().release()


class _NetworkItself(nn.Module):
    """In place of the copy's ``model_sampling``: what goes into the network and comes out of it, unchanged."""

    def calculate_input(self, sigma: Tensor, x: Tensor) -> Tensor:
        return x

    def timestep(self, sigma: Tensor) -> Tensor:
        return sigma

    def calculate_denoised(self, sigma: Tensor, model_output: Tensor, model_input: Tensor) -> Tensor:
        return model_output


def _guarded(forward: Callable, architecture: Architecture, switch: LoraSwitch, checkpointing: bool) -> Callable:
    """A block's forward with right gradients, recomputed in the backward if ``checkpointing``."""

    def out_of_place(*args, **kwargs):
        with OutOfPlace() if architecture.in_place else nullcontext():
            return forward(*args, **kwargs)

    def run(*args, **kwargs):
        # The host changes its options (block number, ...) while it walks the blocks; a recompute must see these.
        args = [dict(value) if isinstance(value, dict) else value for value in args]
        kwargs = {k: dict(value) if isinstance(value, dict) else value for k, value in kwargs.items()}
        kwargs |= architecture.block_options
        if checkpointing and torch.is_grad_enabled():
            return switch.checkpoint(out_of_place, *args, **kwargs)
        return out_of_place(*args, **kwargs)

    return run


def _in_order(parts: list[Tensor], rows: list[list[int]]) -> Tensor:
    """Parts of a batch, each with the rows it holds, as the batch."""
    if len(parts) == 1:
        return parts[0]
    places = [row for group in rows for row in group]
    return pick(torch.cat(parts), sorted(range(len(places)), key=places.__getitem__))


def _transformer_options(patcher) -> dict:
    """MODEL's own options and wrappers for the network, with attention that has a gradient and always the same cuts."""
    options = patcher.model_options["transformer_options"]
    # Also what the host's set_model_optimized_attention does, which ComfyUI before 0.32 does not have.
    options["optimized_attention_override"] = lambda own, *args, **kwargs: training_attention(*args, **kwargs)
    for kind in ("wrappers", "callbacks"):
        own = getattr(patcher, kind)
        comfy.patcher_extension.merge_nested_dicts(options.setdefault(kind, {}), own, copy_dict1=False)
    return options


@contextmanager
def in_training() -> Iterator[None]:
    before = comfy.model_management.in_training
    comfy.model_management.in_training = True
    try:
        yield
    finally:
        comfy.model_management.in_training = before

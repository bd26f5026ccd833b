"""A view of a backbone: ``denoised = denoiser(x, sigma, cond)``, and the block outputs a discriminator reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..devices import pick, upload
from ..diffusion.process import NoiseProcess, expand_like
from .features import BlockInput
from .items import EXTRA, conditions
from .lora import Lora, LoraSwitch
from .lora_start import Parts
from .offload import Offload
from .strengths import StrengthEmbedding, StrengthsConfig


@dataclass(frozen=True)
class Cond:
    """Conditioning of a batch of B rows, every tensor batch first.

    context: text tokens [B, T, D].  pooled: pooled text [B, P] or None.  guidance: FLUX's embedded scale [B] or None.
    mask: [B, T], 1 for a token and 0 where a shorter text is padded; None where no text is.
    extra: what else a backend's model takes, by name: per-item tensors (`items.ITEM_TENSORS`), and in ComfyUI what the
    host calls reference latents, inpainting masks, sizes.
    Numbers of a row ([B], and the mask) are always on the CPU: backends decide by them, and would wait for a device.
    """

    context: Tensor
    pooled: Tensor | None = None
    guidance: Tensor | None = None
    mask: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        own = {name: value.cpu() for name, value in self.tensors().items() if are_numbers(name, value)}
        for name in NAMES:
            if name in own:
                object.__setattr__(self, name, own[name])
        numbers = {name: own[EXTRA + name] for name in self.extra if EXTRA + name in own}
        object.__setattr__(self, "extra", {**self.extra, **numbers})

    @property
    def device(self) -> torch.device:
        return self.context.device

    def __len__(self) -> int:
        return len(self.context)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that are present, by flat names; `from_tensors` is the inverse."""
        values = {name: getattr(self, name) for name in NAMES} | {EXTRA + k: v for k, v in self.extra.items()}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Cond:
        extra = {name.removeprefix(EXTRA): value for name, value in tensors.items() if name.startswith(EXTRA)}
        foreign = [name for name in tensors if name not in NAMES and not name.startswith(EXTRA)]
        if foreign or "context" not in tensors:
            raise ValueError(f"these tensors are no conditioning: {foreign[0] if foreign else 'context is missing'}")
        return cls(**{name: value for name, value in tensors.items() if not name.startswith(EXTRA)}, extra=extra)

    def map(self, fn: Callable[[Tensor], Tensor]) -> Cond:
        """Apply ``fn`` to every tensor that is present."""
        return Cond.from_tensors({name: fn(value) for name, value in self.tensors().items()})

    def __getitem__(self, rows: slice | Sequence[int]) -> Cond:
        if isinstance(rows, slice):
            return self.map(lambda value: value[rows])
        return Cond.from_tensors(
            {n: v[rows] if are_numbers(n, v) else pick(v, rows) for n, v in self.tensors().items()}
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Cond:
        """On a device, without waiting for it, but for the numbers; in another number format."""
        tensors = self.tensors() if dtype is None else {name: v.to(dtype) for name, v in self.tensors().items()}
        if device is not None:
            tensors = {name: v if are_numbers(name, v) else upload(v, device) for name, v in tensors.items()}
        return Cond.from_tensors(tensors)

    def with_items(self, tensors: Mapping[str, Tensor]) -> Cond:
        """The same with per-item tensors (`items.ITEM_TENSORS`), one row of each for a row of the conditioning."""
        return replace(self, extra={**self.extra, **tensors})

    def rows_for(self, other: Cond) -> Cond:
        """This conditioning, of one row, for every row of ``other``, with the per-item tensors of those rows.

        So the empty conditioning leaves out the text, and not the picture that is filled or edited.
        """
        rows = self.map(lambda value: value.expand(len(other), *value.shape[1:]))
        return rows.with_items(conditions(other.extra))

    def padded(self, tokens: int) -> Cond:
        """The same with ``tokens`` rows of context, those that are added masked out."""
        missing = tokens - self.context.shape[1]
        if missing == 0:
            return self
        mask = self.context.new_ones(self.context.shape[:2]) if self.mask is None else self.mask
        context = nn.functional.pad(self.context, (0, 0, 0, missing))
        return replace(self, context=context, mask=nn.functional.pad(mask, (0, missing)))


NAMES = ("context", "pooled", "guidance", "mask")


def are_numbers(name: str, value: Tensor) -> bool:
    """Whether a tensor of a conditioning holds numbers of its rows."""
    return name == "mask" or value.ndim == 1


def cat_conds(conds: Sequence[Cond]) -> Cond:
    """Join batches of conditioning along the batch dimension; shorter texts are padded and masked.

    Raises ValueError when one has a tensor that another lacks.
    """
    tokens = max(cond.context.shape[1] for cond in conds)
    parts = [cond.padded(tokens).tensors() for cond in conds]
    if any("mask" in part for part in parts):
        parts = [{"mask": part["context"].new_ones(part["context"].shape[:2]), **part} for part in parts]
    names = set().union(*parts)
    lacking = sorted({name for part in parts for name in names - part.keys()})
    if lacking:
        raise ValueError(f"conditionings that cannot share a batch: only some of them have {', '.join(lacking)}")
    return Cond.from_tensors({name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def without_captions(cond: Cond, empty: Cond | None, dropped: Tensor) -> Cond:
    """The conditioning with the empty one (one row) in the rows that are ``dropped`` ([B], bool), all on the CPU.

    Per-item tensors stay. Where the two cannot share a batch (another number of tokens, say), all rows do as the first
    one does.
    """
    if empty is None or not dropped.any():
        return cond
    given, none = cond.tensors(), empty.rows_for(cond).map(Tensor.contiguous).tensors()
    alike = given.keys() == none.keys() and all(v.shape[1:] == none[k].shape[1:] for k, v in given.items())
    if not alike:
        return Cond.from_tensors(none) if dropped[0] else cond
    rows = [row if drop else len(cond) + row for row, drop in enumerate(dropped.tolist())]
    return Cond.from_tensors({k: torch.cat([none[k].to(v.dtype), v])[rows] for k, v in given.items()})


@dataclass(frozen=True)
class Limits:
    """What a network can take.

    channels: of latents.  context, pooled: widths of text tokens and pooled text.  side: the largest side of a latent.
    pixels: of a picture that one position of a latent stands for, along a side.  patch: positions along a side that
    the network takes as one; sides of a latent are multiples of it.
    items: names of the per-item tensors that it takes beside the latent (`items.ITEM_TENSORS`).  instead: of a tensor
    in a conditioning that brings them by another name, where the host's own nodes made it.  references: whether it can
    be shown pictures to go by, and need not be.
    token: positions along a side of a token, for a network that rounds other sides up; 0 for ``patch``.
    None where it is not known or takes anything, 0 where it takes none.
    """

    channels: int | None = None
    context: int | None = None
    pooled: int | None = None
    side: int | None = None
    pixels: int = 8
    patch: int = 1
    items: tuple[str, ...] = ()
    instead: str = ""
    references: bool = False
    token: int = 0

    @property
    def token_side(self) -> int:
        """Positions of a latent along a side of a token."""
        return self.token or self.patch

    def tokens(self, height: int, width: int) -> int:
        """How many the network makes of a latent of that size."""
        return math.ceil(height / self.token_side) * math.ceil(width / self.token_side)


class Backend(Protocol):
    """A frozen network of a model library, and all that is asked of it (backends/diffusers.py; nodes/host/backend.py).

    The first four serve a Denoiser, the others the methods and whoever writes a student's file.
    """

    network: nn.Module
    process: NoiseProcess
    switch: LoraSwitch
    offloaded: Offload | None

    def forward(self, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor: ...  # x [B, C, H, W] -> the same shape

    def maps(
        self, x: Tensor, timestep: Tensor, cond: Cond, taps: Sequence[str], whole: bool = False
    ) -> list[Tensor]: ...  # outputs of blocks; whole: and, last, the network's own

    def block_input(self, args: tuple, kwargs: dict) -> BlockInput: ...  # of a block that runs in `maps`

    def default_taps(self, count: int = 6) -> list[str]: ...

    def multi_scale_taps(self, count: int = 3) -> tuple[list[str], list[str]]: ...  # read-outs, and where to feed

    def lora_targets(self) -> list[str]: ...  # names of the linear layers that a LoRA may train

    def new_lora(self, rank: int, targets: Sequence[str] | None = None) -> Lora: ...

    def new_strengths(self, config: StrengthsConfig) -> StrengthEmbedding: ...  # of a student that edits

    def lora_parts(self, state: dict[str, Tensor]) -> tuple[Parts, list[str]]: ...  # of a file, by layer; what is left

    def offload(self, device: torch.device | str, tier: str, folder: Path | None = None, copies=False) -> Offload: ...

    def compile(self, backend: str = "inductor") -> None: ...  # the blocks; also those of copies that are made later

    def trainable_copy(self, dtype: torch.dtype = torch.float32) -> Backend: ...

    def export(self, lora: Lora | None) -> dict[str, Tensor]: ...  # as written to a file; None: of a trained copy

    def limits(self) -> Limits: ...  # what the network can take

    def description(self) -> dict[str, Any]: ...  # what the file says of the base model


class Denoiser:
    """The teacher (``lora=None``) or a student (its LoRA) on one shared backbone.

    Called with x [B, C, H, W], sigma [B] and a Cond of B rows it returns the denoised latent, computed in float32
    around a network of any precision. A fully fine-tuned student is ``Denoiser`` on a copy of the backbone.
    base: of such a student, the backend that its network is a copy of.  name: what files and messages call a teacher
    that is another than the model, empty for the model itself.  strengths: of a student that is told them.
    Raises ValueError when the batch sizes differ.
    """

    strengths: StrengthEmbedding | None = None

    def __init__(self, backend: Backend, lora: Lora | None = None, base: Backend | None = None, name: str = "") -> None:
        self.backend, self.lora, self.base, self.name = backend, lora, base or backend, name

    @property
    def process(self) -> NoiseProcess:
        return self.backend.process

    @property
    def together(self) -> bool:
        """Whether all processes must call it equally often: its weights are shared out among them."""
        return getattr(self.backend, "sharding", None) is not None

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters a student trains, by name: its LoRA or, without one, the whole network; its strengths."""
        told = self.strengths.named_parameters("strengths") if self.strengths else ()
        return {**dict((self.lora or self.backend.network).named_parameters()), **dict(told)}

    @contextmanager
    def _on(self, cond: Cond, inputs: tuple[object, Tensor] | None = None) -> Iterator[None]:
        """What makes this view, around a forward with ``cond``."""
        with self.backend.switch.on(self.lora, inputs), self.strengths.told(cond) if self.strengths else nullcontext():
            yield

    def _network_input(self, x: Tensor, sigma: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        if not len(x) == len(sigma) == len(cond):
            raise ValueError(f"batch sizes differ: {len(x)} latents, {len(sigma)} sigmas, {len(cond)} conditionings")
        return self.process.calculate_input(sigma, x), self.process.timestep(sigma)

    def __call__(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        model_input, timestep = self._network_input(x, sigma, cond)
        with self._on(cond):
            output = self.backend.forward(model_input, timestep, cond)
        return self.process.calculate_denoised(sigma, output.to(x.dtype), x)

    def features(
        self, x: Tensor, sigma: Tensor, cond: Cond, taps: Sequence[str], inputs: tuple[object, Tensor] | None = None
    ) -> list[Tensor]:
        """Outputs of the blocks ``taps`` as maps [B, C, H, W]; the forward stops after the last one.

        inputs: carried by the switch to whoever hooked the blocks (`discriminators.NetworkDiscriminator`).
        """
        model_input, timestep = self._network_input(x, sigma, cond)
        with self._on(cond, inputs):
            return self.backend.maps(model_input, timestep, cond, taps)

    def with_features(self, x: Tensor, sigma: Tensor, cond: Cond, taps: Sequence[str]) -> tuple[Tensor, list[Tensor]]:
        """The denoised latent and the `features`, both of one forward."""
        model_input, timestep = self._network_input(x, sigma, cond)
        with self._on(cond):
            *maps, output = self.backend.maps(model_input, timestep, cond, taps, whole=True)
        return self.process.calculate_denoised(sigma, output.to(x.dtype), x), maps


class Guided:
    """Classifier-free guidance around a denoiser: uncond + scale (cond - uncond), one doubled batch a step.

    ``uncond`` is a Cond of one row. Both branches are told the per-item tensors of ``cond``, so guidance is of the text
    alone. A scale of 1 runs the conditional branch alone. scales: of each item [B], in the place of ``scale``.
    """

    def __init__(self, denoiser: Denoiser, uncond: Cond, scale: float, scales: Tensor | None = None) -> None:
        self.denoiser, self.uncond, self.scale, self.scales = denoiser, uncond, scale, scales
        self.process = denoiser.process

    @property
    def plain(self) -> bool:
        """Whether it is the conditional branch alone."""
        return self.scales is None and self.scale == 1.0

    def __call__(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        if self.plain:
            return self.denoiser(x, sigma, cond)
        uncond = self.uncond.rows_for(cond)
        both = self.denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), cat_conds([cond, uncond]))
        with_text, without = both.chunk(2)
        return self._extrapolated(with_text, without)

    def around(self, with_text: Tensor, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        """The guided answer where the denoiser's own, with the text, is known; one forward, none for a scale of 1."""
        if self.plain:
            return with_text
        return self._extrapolated(with_text, self.denoiser(x, sigma, self.uncond.rows_for(cond)))

    def _extrapolated(self, with_text: Tensor, without: Tensor) -> Tensor:
        scale = self.scale if self.scales is None else expand_like(self.scales, with_text)
        return without + scale * (with_text - without)

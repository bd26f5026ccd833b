"""A student that is told the guidance strengths it is to edit at: an embedding beside its LoRA.

What InstructPix2Pix turns by two guidance scales, a student of few steps without guidance can be told as an input, much
as FLUX.1 dev is told one scale. LADD's authors name it as what their student lacks, and not how to do it: the embedding
is our choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..devices import like
from ..settings import Checked, setting
from .items import IMAGE_STRENGTH, TEXT_STRENGTH
from .precision import on_device

if TYPE_CHECKING:
    from .denoiser import Cond

NAMES = (TEXT_STRENGTH, IMAGE_STRENGTH)
IN_FILES = "lora_strengths."  # before its tensors beside a LoRA; diffusers refuses a file with a name without "lora"
FREQUENCIES = 16  # of each strength


@dataclass(frozen=True)
class StrengthsConfig(Checked):
    """Whether a student of a model that edits pictures is told the guidance strengths, and what it has without."""

    told: bool = setting(
        False,
        "Tell the student the text_strength and image_strength of each item, and the discriminator's heads, so that "
        "both can be turned when it samples. The dataset needs items at different strengths ([cache] text_strength, "
        "image_strength).",
        added=True,
    )
    text: float = setting(
        7.5,
        "The text strength that such a student has where it is told none, and in other programs.",
        low=0,
        high=100,
        added=True,
    )
    image: float = setting(1.5, "The image strength that it has there.", low=0, high=100, added=True)
    width: int = setting(256, "Width of the hidden layer that embeds the strengths.", low=8, high=4096, added=True)


def strengths_of(cond: Cond) -> Tensor | None:
    """The strengths of text and picture of each row, [B, 2], on the CPU; None where the rows have none."""
    if any(name not in cond.extra for name in NAMES):
        return None
    return torch.stack([cond.extra[name] for name in NAMES], dim=1)


def sinusoids(strengths: Tensor) -> Tensor:
    """Sines and cosines [B, 4 `FREQUENCIES`] of strengths [B, 2], with periods of 1.6 to 100."""
    exponents = torch.linspace(2, -4, FREQUENCIES, dtype=strengths.dtype, device=strengths.device)
    angles = strengths.unsqueeze(-1) * 2**exponents
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)


class StrengthEmbedding(nn.Module):
    """e(s) = W (h(s) - h(default)) [B, D] with h = silu(V sin(s) + b), added to the output of a module.

    module: of the network, its output [B, D] modulates the blocks (the embedding of the timestep); None for an
    embedding that is only asked.  W begins as 0, so it begins without effect, and e(default) is 0 whatever is learnt:
    who does not know of it has the student at the default strengths. Nothing is added but inside `told`.
    """

    added: Tensor | None = None

    def __init__(self, module: nn.Module | None, dim: int, config: StrengthsConfig) -> None:
        super().__init__()
        self.config = config
        self.hidden = nn.Linear(4 * FREQUENCIES, config.width)
        self.out = nn.Linear(config.width, dim, bias=False)
        nn.init.zeros_(self.out.weight)
        if module is not None:
            on_device(self, next(module.parameters()).device)
            self.handle = module.register_forward_hook(self._hook())

    def _hook(self) -> Callable:
        def add(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            if self.added is None:
                return None
            times = len(output) // len(self.added)  # twice where pictures to go by have a timestep of their own
            return output + self.added.to(output.dtype).repeat(times, 1)

        return add

    @property
    def default(self) -> tuple[float, float]:
        """The strengths of text and picture at which it adds nothing."""
        return self.config.text, self.config.image

    def forward(self, strengths: Tensor) -> Tensor:
        """[B, 2] -> [B, D], in the precision of its weights."""
        weight = self.out.weight
        default = torch.tensor([self.default], dtype=strengths.dtype, device=strengths.device)
        both = like(torch.cat([strengths, default]), weight)
        with torch.autocast(weight.device.type, enabled=False):
            hidden = nn.functional.silu(self.hidden(sinusoids(both)))
            added = self.out(hidden[:-1] - hidden[-1:])
        return torch.where((both[:-1] == both[-1:]).all(1, keepdim=True), 0.0, added)

    @contextmanager
    def told(self, cond: Cond) -> Iterator[None]:
        """Add the embedding of the rows' strengths, nothing where they have none or all are the default ones."""
        strengths, before = strengths_of(cond), self.added
        turned = strengths is not None and bool((strengths != torch.tensor(self.default)).any())
        self.added = self(strengths) if turned else None
        try:
            yield
        finally:
            self.added = before

    def export(self) -> dict[str, Tensor]:
        """Its tensors as a LoRA's file has them."""
        return {IN_FILES + name: value.detach().float().clone().cpu() for name, value in self.named_parameters()}

    @torch.no_grad()
    def load_export(self, state: Mapping[str, Tensor]) -> None:
        """Read an `export`. Raises ValueError where it is of another network."""
        mine = {IN_FILES + name: value for name, value in self.named_parameters()}
        wrong = sorted(mine.keys() ^ state.keys()) or [k for k in mine if mine[k].shape != state[k].shape]
        if wrong:
            raise ValueError(f"these strengths are of another model (first differing tensor: {wrong[0]})")
        for name, value in mine.items():
            value.copy_(state[name])


def split_strengths(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a student's file without those of a `StrengthEmbedding`, and these."""
    own = {name: value for name, value in state.items() if name.startswith(IN_FILES)}
    return {name: value for name, value in state.items() if name not in own}, own


def config_of_file(told: Mapping[str, Sequence[float]], state: Mapping[str, Tensor]) -> StrengthsConfig:
    """The settings of a student's embedding, by its file. told: of each strength the lowest, the default and the
    highest, as the file's description has them.  state: of `split_strengths`."""
    (_, text, _), (_, image, _) = (told[name] for name in NAMES)
    width = len(state.get(f"{IN_FILES}hidden.bias", ())) or StrengthsConfig.width
    return StrengthsConfig(True, text, image, width)


def chosen_strengths(
    told: Mapping[str, Sequence[float]], asked: Mapping[str, float], file: str, option: Callable[[str], str]
) -> tuple[float, float]:
    """The strengths of text and picture that a student is told: those asked for, else the defaults of its file.

    told: as in `config_of_file`.  option: what a strength is called where it is asked for. Raises ValueError for one
    beyond those that the student was trained at.
    """
    for name, value in asked.items():
        low, _, high = told[name]
        if not low <= value <= high:
            raise ValueError(
                f"{option(name)} must be from {low:g} to {high:g}, where {file} was trained, not {value:g}"
            )
    text, image = (asked.get(name, told[name][1]) for name in NAMES)
    return text, image


@torch.no_grad()
def added_at(
    told: Mapping[str, Sequence[float]], state: Mapping[str, Tensor], strengths: tuple[float, float]
) -> Tensor:
    """What the embedding in a student's file adds at strengths of text and picture, [1, D] in float32 on the CPU.

    told, state: as in `config_of_file`. Raises ValueError for tensors that are no such embedding.
    """
    dim = len(state.get(f"{IN_FILES}out.weight", ())) or 1
    embedding = StrengthEmbedding(None, dim, config_of_file(told, state))
    embedding.load_export(state)
    return embedding(torch.tensor([strengths]))

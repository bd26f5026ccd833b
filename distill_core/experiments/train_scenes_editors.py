"""Train the scenes models that are shown a picture: ``python -m distill_core.experiments.train_scenes_editors KIND``.

KIND is ``inpainting`` (33 input channels) or ``editing`` (32). Each begins as the scenes model with new input channels
of weight 0; pictures, masks and edits are drawn by programs (`data.scenes`, `data.random_masks`). A command that was
stopped goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import trange

from ..data.masks import for_latents, hidden
from ..data.random_masks import SHARES, random_masks
from ..data.scenes import draw_edits, draw_rows, draw_words, render
from ..models import scenes
from ..models.items import EXTRA, MASK, MASKED_IMAGE, SOURCE_IMAGE
from .fitting import Making, Stage, fit, half, makers_parser, noised

TRAINING = 2  # seed of the pictures; the scenes model saw those of 0
SIZE = (scenes.SIZE, scenes.SIZE)
Encode = Callable[[Tensor], Tensor]


def inpainting_items(seed: int, items: range, encode: Encode) -> dict[str, Tensor]:
    """Scenes with random masks, as datasets name their tensors; and ``words`` [B, 4]."""
    words = draw_words(seed, items, scenes.combinations())
    pictures, masks = render(words, draw_rows(seed, items))[0], random_masks(seed, items, SIZE, SHARES)
    return {
        "words": words,
        "latents": encode(pictures),
        EXTRA + MASK: for_latents(masks, scenes.PIXELS),
        EXTRA + MASKED_IMAGE: encode(hidden(pictures, masks)),
    }


def editing_items(seed: int, items: range, encode: Encode) -> dict[str, Tensor]:
    """Scenes of which one word was changed, and the latents of what they were before; and ``words`` [B, 4]."""
    before, after = draw_edits(seed, items)
    rows = draw_rows(seed, items)
    return {
        "words": after,
        "latents": encode(render(after, rows)[0]),
        EXTRA + SOURCE_IMAGE: encode(render(before, rows)[0]),
    }


ITEMS = {scenes.INPAINTING: inpainting_items, scenes.EDITING: editing_items}


@torch.inference_mode()
def draw(kind: str, seed: int, count: int, size: int = 100) -> dict[str, Tensor]:
    """Items 0 to ``count`` of a kind, all their tensors in one."""
    encode = scenes.load_autoencoder().encoder
    parts = []
    for start in trange(0, count, size, desc="pictures", mininterval=5):
        parts.append(ITEMS[kind](seed, range(start, min(start + size, count)), encode))
    return {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}


def widened(kind: str) -> Any:
    """The scenes model with input channels for what a kind is told, which have no effect yet."""
    net, state = scenes.new_transformer(kind), scenes.load_transformer().state_dict()
    first = "pos_embed.proj.weight"  # [width, channels, 1, 1]
    more = net.state_dict()[first].shape[1] - state[first].shape[1]
    state[first] = F.pad(state[first], (0, 0, 0, 0, 0, more))
    net.load_state_dict(state)
    return net.requires_grad_(True).train()


def left_out(kind: str, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which rows [B] lose their text, and which their picture.

    Inpainting: one text in ten. Editing: 5 % the text, 5 % the picture and 5 % both, as InstructPix2Pix's training
    does (Brooks et al. 2023, section 3.2.1).
    """
    u = torch.rand(rows, generator=generator)
    if kind == scenes.INPAINTING:
        return u < 0.1, torch.zeros(rows, dtype=torch.bool)
    return u < 0.1, (u >= 0.05) & (u < 0.15)


def train(kind: str, data: dict[str, Tensor], stage: Stage) -> tuple[dict[str, Tensor], dict]:
    """Rectified flow as the scenes model's, from its weights; returns (state, log)."""
    net = widened(kind)
    average = {name: value.detach().clone() for name, value in net.named_parameters()}
    texts = scenes.encode_text([scenes.caption(words) for words in data["words"].tolist()] + [""])
    told = [name for name in data if name.startswith(EXTRA)]

    def loss_fn(generator: torch.Generator) -> Tensor:
        pick = torch.randint(len(data["latents"]), (64,), generator=generator)
        silent, blind = left_out(kind, len(pick), generator)
        x, sigma, target = noised(data["latents"][pick].float(), generator)
        shown = [data[name][pick].float() * ~blind.view(-1, 1, 1, 1) for name in told]
        text = texts[torch.where(silent, len(texts) - 1, pick).tolist()]
        with torch.autocast("cpu", torch.bfloat16):
            velocity = net(
                hidden_states=torch.cat([x, *shown], 1),
                timestep=1000 * sigma,
                encoder_hidden_states=text.context,
                pooled_projections=text.pooled,
            ).sample
        return F.mse_loss(velocity.float(), target)

    log = fit(list(net.parameters()), loss_fn, 5e-4, f"{kind} model", stage, list(average.values()))
    return dict(net.state_dict()) | average, log


def main() -> None:
    parser = makers_parser(__doc__, scenes.ASSETS, "scenes-editors-work", "pictures' latents")
    parser.add_argument("kind", choices=sorted(ITEMS))
    parser.add_argument("--pictures", type=int, default=12_000)
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    args.work /= args.kind
    making = Making(args)
    path = args.work / "items.safetensors"
    if not path.exists():
        items = draw(args.kind, TRAINING, args.pictures)
        save_file({name: value if name == "words" else value.half() for name, value in items.items()}, path)
    state, entry = train(args.kind, load_file(path), making.stage(args.steps))
    save_file(half(state), args.out / f"{args.kind}.safetensors")
    making.record(args.kind, entry)


if __name__ == "__main__":
    main()

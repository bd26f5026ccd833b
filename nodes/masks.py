"""Picture Folder's widgets for masks, and the core's settings of them."""

from __future__ import annotations

import math

from comfy_api.latest import io

from ..distill_core.data.masks import FILES, RANDOM, MaskConfig
from ..distill_core.data.random_masks import KINDS, SHARES
from .common import setting_input
from .host.pictures import BESIDE, mask_folders, own_folder

WIDGETS = {"source": "masks", "each": "masks_each", "shares": "mask_shares", "seed": "mask_seed"}
SPELLED = ", ".join(f"{kind} {share:g}" for kind, share in SHARES.items())


def mask_inputs() -> list:
    """For inpainting models; without masks as default."""
    return [
        setting_input(
            io.Combo,
            MaskConfig,
            "source",
            "Only for inpainting models (SD 1.5, SDXL, FLUX.1 Fill).",
            widget=WIDGETS["source"],
            default="none",
        ),
        io.Combo.Input(
            "mask_folder",
            options=mask_folders(),
            default=BESIDE,
            optional=True,
            advanced=True,
            tooltip="With masks = files: where they are. In a folder of its own a mask has the picture's name, and may "
            "have another suffix.",
        ),
        setting_input(io.Int, MaskConfig, "each", widget=WIDGETS["each"], default=1),
        io.String.Input(
            WIDGETS["shares"],
            default=SPELLED,
            optional=True,
            advanced=True,
            tooltip="How often a random mask is of each kind; they need not sum to 1. full hides the whole picture.",
        ),
        setting_input(io.Int, MaskConfig, "seed", widget=WIDGETS["seed"], default=0, advanced=True),
    ]


def mask_config(
    masks: str = "none", mask_folder: str = BESIDE, masks_each: int = 1, mask_shares: str = SPELLED, mask_seed: int = 0
) -> MaskConfig:
    """What the widgets say. Raises ValueError, in their names, for what does not go together."""
    if mask_folder != BESIDE and masks != FILES:
        raise ValueError(f"mask_folder is for masks = files: choose files, or set it to {BESIDE!r}")
    if masks == RANDOM:
        return MaskConfig(RANDOM, each=masks_each, shares=read_shares(mask_shares), seed=mask_seed)
    if masks_each > 1:
        raise ValueError(
            f"masks_each {masks_each} needs masks = random: a picture has one mask of its own, or none; set it to 1"
        )
    return MaskConfig(masks, folder="" if mask_folder == BESIDE else str(own_folder(mask_folder, "masks")))


def read_shares(text: str) -> dict[str, float]:
    """ "strokes 0.5, full 0.1" -> the share of each kind that is named. Raises ValueError for anything else."""
    shares: dict[str, float] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        kind, _, share = part.replace("=", " ").partition(" ")
        try:
            value = float(share)
        except ValueError:
            value = math.nan
        if kind not in KINDS or kind in shares or not 0 <= value <= 1e6:
            raise ValueError(
                f"mask_shares: {part!r} is no kind of mask and its share; write it like {SPELLED!r}, each kind once"
            )
        shares[kind] = value
    if not any(shares.values()):
        raise ValueError(f"mask_shares: give one of {', '.join(KINDS)} a share above 0")
    return shares

"""Own pictures of a folder as a dataset, encoded with a VAE and a CLIP of the host; the same as the command's."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy_extras.nodes_qwen import TextEncodeQwenImageEdit, TextEncodeQwenImageEditPlus
from torch import Tensor

from ...distill_core.data import buckets
from ...distill_core.data.manifest import OtherDataset
from ...distill_core.data.masks import ALPHA, FILES, NONE, RANDOM, MaskConfig, with_own_masks
from ...distill_core.data.pictures import (
    Picture,
    PictureConfig,
    by_bucket,
    caption_file,
    find,
    mask_file,
    read_file_into,
    survey,
)
from ...distill_core.data.preference import with_rejected
from ...distill_core.data.random_masks import KINDS
from ...distill_core.data.real import cache_pictures
from ...distill_core.data.sources import with_sources
from ...distill_core.digests import weights_digest
from ...distill_core.models.denoiser import cat_conds
from ...distill_core.models.mini import ASSETS
from .datasets import CURE, WIDGETS, training_conditionings
from .folders import dataset_folder
from .items import check_makes
from .parts import autoencoder_of

EXAMPLES, REJECTED_EXAMPLES = "example pictures (shipped)", "rejected examples (shipped)"
PREFERRED_EXAMPLES = "preferred examples (shipped)"
EDITED_EXAMPLES, SOURCE_EXAMPLES = "edited scenes (shipped)", "scenes before they were edited (shipped)"
SHIPPED = {  # of the mini model's classes, in three shapes: inverted; lit from the left, and from the right
    EXAMPLES: ASSETS.parent / "pictures",
    PREFERRED_EXAMPLES: ASSETS.parent / "preferred",
    REJECTED_EXAMPLES: ASSETS.parent / "rejected",
    EDITED_EXAMPLES: ASSETS.parent / "edited",  # `scenes --edits --count 12 --seed 142`: after
    SOURCE_EXAMPLES: ASSETS.parent / "sources",  # before
}
BESIDE, NO_FOLDER = "beside the pictures", "none"
TEXT_ALONE = "text alone"
SEEN = {  # what shows a picture to a text encoder that sees, and the input that takes it
    "Qwen-Image-Edit": (TextEncodeQwenImageEdit, "image"),
    "Qwen-Image-Edit-2509": (TextEncodeQwenImageEditPlus, "image1"),
}
MASK_WIDGETS = {
    "masks": "masks",
    "masks.source": "masks",
    "masks.each": "masks_each",
    "masks.seed": "mask_seed",
    "masks.of": "model (another kind of inpainting)",
    **{f"masks.shares.{kind}": f"{kind} of mask_shares" for kind in KINDS},
}


def picture_folders() -> list[str]:
    """What the node offers: the shipped examples, and the folders in the host's input folder."""
    return [EXAMPLES, PREFERRED_EXAMPLES, EDITED_EXAMPLES, *sorted(folder_paths.get_input_subfolders())]


def mask_folders() -> list[str]:
    """Where masks may be: beside the pictures, or in a folder in the host's input folder."""
    return [BESIDE, *sorted(folder_paths.get_input_subfolders())]


def partner_folders(examples: str) -> list[str]:
    """Where other pictures of the same names may be: nowhere, the shipped examples, or in the host's input folder."""
    return [NO_FOLDER, examples, *sorted(folder_paths.get_input_subfolders())]


def folder_of(name: str, what: str = "pictures") -> Path:
    """The folder of an offered name. Raises ValueError for one that is not in the input folder."""
    return SHIPPED.get(name) or own_folder(name, what)


def own_folder(name: str, what: str = "pictures") -> Path:
    """A folder in the host's input folder. Raises ValueError for another one."""
    root = Path(folder_paths.get_input_directory())
    path = Path(os.path.normpath(root / name))
    if root not in path.parents or not path.is_dir():
        raise ValueError(f"there is no folder {name!r} in {root}: put your {what} into a folder there")
    return path


def state_of(name: str) -> tuple:
    """What changes when a picture, a caption or a mask does: names, dates and sizes."""
    try:
        found = find(folder_of(name)).items()
    except ValueError:
        return ()
    seen = []
    for file, path in found:
        for each in (path, caption_file(path), mask_file(path)):
            stat = each.stat() if each.exists() else None
            seen.append((file, stat and (stat.st_mtime_ns, stat.st_size)))
    return tuple(seen)


def make_picture_dataset(
    model,
    vae,
    folder: str,
    dataset_name: str,
    config: PictureConfig,
    masks: MaskConfig,
    say: Callable[[str], None],
    *,
    clip=None,
    positive: list | None = None,
    negative: list | None = None,
    embedded_guidance: float = 0.0,
    source_in_text: str = TEXT_ALONE,
) -> Path:
    """Encode the pictures of a folder and their captions; returns the dataset's folder.

    positive: one CONDITIONING for all, instead of a clip that encodes the captions.  negative: the empty one; without
    it the clip's of an empty text, or zeros.  masks: of an inpainting model's pictures.  say: shows the report of the
    sizes.  embedded_guidance: that a model with such an input is told, 0 for that of the conditionings.
    source_in_text: of `SEEN`, for a clip that is shown the source with its caption.
    Raises ValueError for pictures, settings or parts that cannot become a dataset.
    """
    layout, out = model.get_model_object("latent_format"), dataset_folder(dataset_name)
    scale = layout.spacial_downscale_ratio
    if (clip is None) == (positive is None):
        raise ValueError("connect clip, which encodes the captions, or positive, one conditioning for all: one of them")
    if config.step % (2 * scale):
        raise ValueError(f"step {config.step} must be a multiple of {2 * scale} for this model")
    if config.rejected and masks.source != NONE:
        raise ValueError(
            "pairs of a preferred and a rejected picture have no masks, so they are for models that take none: set "
            "masks or rejected_folder to none"
        )
    takes = check_makes(model.model, masks.source != NONE, bool(config.sources))
    if source_in_text != TEXT_ALONE:
        check_sees(clip, bool(config.sources))
    pictures, left_out = survey(folder_of(folder), config)
    if masks.source in (FILES, ALPHA):
        pictures, without = with_own_masks(pictures, masks, config)
        left_out |= without
    if config.sources:
        pictures, without = with_sources(pictures, config.sources)
        left_out |= without
    if config.rejected:
        pictures, without = with_rejected(pictures, config)
        left_out |= without
    say("\n".join([buckets.spell(buckets.report(pictures, left_out, config)), *spell_masks(masks, len(pictures))]))
    if clip is not None and negative is None:
        negative = encoded(clip, "")
    if source_in_text == TEXT_ALONE:
        captions = captions_of(pictures, clip, positive)
    else:
        captions = captions_with_sources(pictures, clip, source_in_text, config)
    if embedded_guidance:
        check_told_guidance(model)
        captions = [with_guidance(caption, embedded_guidance) for caption in captions]
        negative = with_guidance(negative, embedded_guidance) if negative is not None else None
    conds, uncond, description = training_conditionings(model, captions, negative)
    made_from = {"family": description["family"], "autoencoder": weights_digest(autoencoder_of(vae).state_dict())}
    made_from |= {"embedded_guidance": embedded_guidance} if embedded_guidance else {}
    made_from |= {"source_in_text": source_in_text} if source_in_text != TEXT_ALONE else {}
    bar = comfy.utils.ProgressBar(len(pictures) * masks.each)
    made = cache_pictures(
        pictures,
        left_out,
        lambda images: latents_of(vae, model, images),
        lambda items: cat_conds([conds[i] for i in items]),
        uncond,
        out,
        config,
        made_from | ({} if positive is None else {"caption": "positive"}),
        scale,
        [cond.context.shape[1] for cond in conds],
        masks,
        takes,
    )
    try:
        for done, total, _ in made:
            bar.update_absolute(done, total)
            comfy.model_management.throw_exception_if_processing_interrupted()
    except OtherDataset as error:
        words = WIDGETS | MASK_WIDGETS | {f"pictures.{name}": name for name in ("size", "step", "ratio", "background")}
        raise ValueError(error.said(words | {"autoencoder": "vae"}, CURE)) from None
    return out


def spell_masks(masks: MaskConfig, pictures: int) -> list[str]:
    """What is said of the masks; nothing where there are none."""
    if masks.source == NONE:
        return []
    if masks.source == RANDOM:
        return [f"random masks: {masks.each} for each picture, so {masks.each * pictures} items"]
    return ["masks: the transparent parts of the pictures" if masks.source == ALPHA else "masks: your own"]


def captions_of(pictures: list[Picture], clip, positive: list | None) -> list[list]:
    """A CONDITIONING for each picture; equal captions are encoded once."""
    if positive is not None:
        return [positive] * len(pictures)
    by_text = {text: encoded(clip, text) for text in dict.fromkeys(picture.caption for picture in pictures)}
    return [by_text[picture.caption] for picture in pictures]


def captions_with_sources(pictures: list[Picture], clip, kind: str, config: PictureConfig) -> list[list]:
    """A CONDITIONING for each picture, of its caption and its source, as the host's own node makes it."""
    encoder, image = SEEN[kind]
    buckets_of = {number: bucket for bucket, numbers in by_bucket(pictures, config).items() for number in numbers}
    bar, captions = comfy.utils.ProgressBar(len(pictures)), []
    for number, picture in enumerate(pictures):
        source = read_file_into(picture.source, buckets_of[number], config.background)
        shown = {image: (source.movedim(0, -1)[None] + 1) / 2}
        captions.append(encoder.execute(clip, picture.caption, **shown).result[0])
        bar.update_absolute(number + 1)
        comfy.model_management.throw_exception_if_processing_interrupted()
    return captions


def check_sees(clip, sourced: bool) -> None:
    """Raises ValueError for a clip that is shown no picture, and where there is none to show."""
    if not sourced:
        raise ValueError(
            "source_in_text shows the text encoder each picture before it is edited: choose source_folder, or set "
            f"source_in_text to {TEXT_ALONE!r}"
        )
    if clip is None or not hasattr(clip.tokenizer, "llama_template_images"):
        raise ValueError(
            "source_in_text is for a text encoder that sees, such as Qwen-Image-Edit's, as clip: set it to "
            f"{TEXT_ALONE!r}, or connect such a one"
        )


def check_told_guidance(model) -> None:
    """Raises ValueError for a model without an input for a guidance scale."""
    if not model.model.model_config.unet_config.get("guidance_embed", False):
        raise ValueError(
            "this model has no input for a guidance scale (FLUX.1 dev and those made from it have one): set "
            "embedded_guidance to 0, and teacher_cfg of the trainer"
        )


def with_guidance(conditioning: list, scale: float) -> list:
    """As core's FluxGuidance does."""
    return [[tokens, {**values, "guidance": scale}] for tokens, values in conditioning]


def encoded(clip, text: str) -> list:
    """As CLIP Text Encode does."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


@torch.no_grad()
def latents_of(vae, model, images: Tensor) -> Tensor:
    """[B, 3, H, W] in [-1, 1] -> latents of the model [B, C, H, W].

    They are encoded one by one, for a video VAE takes a batch as frames. Raises ValueError for a VAE of another model.
    """
    raw = torch.cat([vae.encode((image.movedim(0, -1)[None] + 1) / 2) for image in images]).float()
    wanted = model.get_model_object("latent_format").latent_channels
    if raw.shape[1] != wanted:
        raise ValueError(
            f"the VAE makes latents of {raw.shape[1]} channels, but this model's have {wanted}: connect the model's own"
        )
    latents = model.model.process_latent_in(raw)
    return latents[:, :, 0] if latents.ndim == 5 else latents

"""Picture Folder: own pictures as a dataset, with what inpainting and editing models take beside; the report of their
sizes is on the node."""

from __future__ import annotations

from comfy_api.latest import io

from ..distill_core.data.pictures import PictureConfig
from .common import first_of_each, setting_input
from .datasets import DatasetNode, name_input
from .fingerprints import Left
from .host.pictures import (
    BESIDE,
    NO_FOLDER,
    REJECTED_EXAMPLES,
    SEEN,
    SOURCE_EXAMPLES,
    TEXT_ALONE,
    folder_of,
    make_picture_dataset,
    partner_folders,
    picture_folders,
    state_of,
)
from .host.text import show_text
from .masks import mask_config, mask_inputs

PICTURES = Left(state_of)
FOLDERS = {"rejected": "rejected_folder", "sources": "source_folder"}  # settings of the core, and their widgets
OWN = ("size", "step", "ratio", "background", "caption", "dtype")  # widgets that are settings of the core


def partner_inputs() -> list[io.Combo.Input]:
    """The folders with a second picture for each: the one that was found worse, or what was edited."""

    def folder(name: str, examples: str, tooltip: str) -> io.Combo.Input:
        options = partner_folders(examples)
        return io.Combo.Input(name, options=options, default=NO_FOLDER, optional=True, advanced=True, tooltip=tooltip)

    return [
        folder(
            "rejected_folder",
            REJECTED_EXAMPLES,
            "For DPO Trainer: a folder inside ComfyUI's input folder with the pictures that were found worse. Each "
            "has the name of the picture in folder that was preferred to it (its suffix may differ), and its size. "
            "none: pictures alone, for other trainers.",
        ),
        folder(
            "source_folder",
            SOURCE_EXAMPLES,
            "For models that edit: a folder inside ComfyUI's input folder with the pictures before they were edited. "
            "Each has the name of its result in folder, and its size. none: for other models.",
        ),
    ]


def seen_input() -> io.Combo.Input:
    """For models whose text encoder sees."""
    return io.Combo.Input(
        "source_in_text",
        options=[TEXT_ALONE, *SEEN],
        default=TEXT_ALONE,
        optional=True,
        advanced=True,
        tooltip="For Qwen-Image-Edit, whose text encoder is shown the picture of source_folder with its caption: as "
        "core's TextEncodeQwenImageEdit does, or for versions from 2509 on TextEncodeQwenImageEditPlus. text alone: "
        "for other models.",
    )


def guidance_input() -> io.Float.Input:
    """For models that are told their guidance."""
    return io.Float.Input(
        "embedded_guidance",
        default=0.0,
        min=0.0,
        max=100.0,
        step=0.1,
        optional=True,
        advanced=True,
        tooltip="The guidance scale that a FLUX.1 model is told with every caption, as core's FluxGuidance does: "
        "usually 3.5, and 30 for FLUX.1 Fill. The student learns at it. 0: that of positive, or ComfyUI's 3.5. Other "
        "models have no such input.",
    )


class PictureFolder(DatasetNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls.schema(
            "PictureFolder",
            "Picture Folder",
            "Makes a dataset of your own pictures: captions from text files beside them, sizes in buckets, EXIF and "
            "transparency minded, masks for inpainting models, sources for models that edit, and pairs for preference "
            "tuning. Shows what was cropped, scaled up or left out.",
            aliases=[
                *("own images", "load images from folder", "image dataset", "captions", "buckets", "train lora"),
                *("inpainting", "masks", "fill", "outpainting", "preference", "pairs", "rejected", "edit"),
            ],
            more=[*mask_inputs(), *partner_inputs(), guidance_input(), seen_input()],
            inputs=[
                io.Model.Input("model", tooltip="The model to be trained; it defines how latents are scaled."),
                io.Vae.Input("vae", tooltip="The model's own VAE, which encodes the pictures."),
                io.Combo.Input(
                    "folder",
                    options=picture_folders(),
                    tooltip="A folder inside ComfyUI's input folder, with all folders in it.",
                ),
                name_input("my_pictures"),
                io.Clip.Input(
                    "clip", optional=True, tooltip="Encodes the captions, from the .txt beside each picture."
                ),
                io.Conditioning.Input(
                    "positive", optional=True, tooltip="One conditioning for all pictures, instead of clip."
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="The empty prompt. Not connected: an empty text by clip, or zeros.",
                ),
                setting_input(io.Int, PictureConfig, "size", default=1024, step=16),
                setting_input(io.String, PictureConfig, "caption", default="", advanced=True),
                setting_input(io.Int, PictureConfig, "step", default=64, step=16, advanced=True),
                setting_input(io.Float, PictureConfig, "ratio", default=2.0, step=0.1, advanced=True),
                setting_input(io.Combo, PictureConfig, "background", default="white", advanced=True),
            ],
        )

    @classmethod
    def fingerprint_inputs(
        cls, folder, mask_folder=(BESIDE,), rejected_folder=(NO_FOLDER,), source_folder=(NO_FOLDER,), **inputs
    ) -> str:
        """Changes with the dataset on disk, and with the pictures, captions, masks, rejected pictures and sources."""
        own = [name for (name, *_) in (folder, mask_folder, rejected_folder, source_folder)]
        dataset = super().fingerprint_inputs(**inputs)
        seen = (PICTURES.fingerprint(name) for name in own if name not in (BESIDE, NO_FOLDER))
        return " ".join(map(str, [dataset, *seen]))

    @classmethod
    def execute(cls, **inputs) -> io.NodeOutput:
        given = first_of_each(inputs)
        own = {name: given.pop(name) for name in OWN if name in given}
        masks = mask_config(**{name: given.pop(name) for name in list(given) if name.startswith("mask")})
        for setting, what in (("rejected", "rejected pictures"), ("sources", "pictures before they were edited")):
            chosen = given.pop(FOLDERS[setting], NO_FOLDER)
            if chosen != NO_FOLDER:
                own[setting] = str(folder_of(chosen, what))
        said: list[str] = []

        def say(text: str) -> None:
            said.append(text)
            show_text(cls, text)

        config = PictureConfig(**{"dtype": "bfloat16", **own})
        folder = make_picture_dataset(config=config, masks=masks, say=say, **given)
        return cls.made(given["dataset_name"], folder, "\n".join(said))


NODES = [PictureFolder]

"""The picture of a workflow in ComfyUI's Templates: what it does in a few large words, and what came out.

A card is shown at about 250 px, so letters are at least 26 px high in a picture of 512. Where a workflow ran its own
pictures are shown, two by two; for models that are not on this machine the steps are, which are read from the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIDE, EDGE, PANEL = 512, 24, 218  # pixels
BAND = 150  # the title's; Templates lays a badge over its upper half
PAPER, INK, GREY = "#fbf8f1", "#1d2733", "#5b6673"
TONES = {"distil": "#e4572e", "sample": "#2a7de1", "examine": "#1f9d6b"}


@dataclass(frozen=True)
class Card:
    """title: one or two lines.  kind: of `TONES`.  facts: the last line.  panels: caption -> beginning of the
    pictures' names.  steps: before and after, where there are no pictures; one number for a sampler."""

    title: str
    kind: str
    facts: str
    panels: tuple[tuple[str, str], ...] = ()
    steps: tuple[str, ...] = ()


def distilled(title: str, workflow: dict, facts: str, pictures: str = "") -> Card:
    """The card of a distillation, its steps from the graph."""
    teacher = f"{workflow['levels']['inputs']['steps']} steps"
    trained = workflow["train"]["inputs"]["target_steps"]
    student = f"{trained} step{'s' if trained > 1 else ''}"
    panels = ((f"teacher, {teacher}", f"{pictures}_teacher"), (f"student, {student}", f"{pictures}_student"))
    return Card(title, "distil", facts, panels if pictures else (), (teacher, student))


def cards(workflows: dict[str, dict]) -> dict[str, Card]:
    """The card of every workflow by its name."""
    w = workflows
    few = lambda title, steps, facts: Card(title, "sample", facts, steps=(steps,))  # noqa: E731
    few_tuned = lambda title, steps, facts: Card(title, "distil", facts, steps=(steps,))  # noqa: E731
    return {
        "distil_mini_ladd": distilled(
            "Distil the mini model", w["distil_mini_ladd"], "LADD, 2 minutes on a CPU", "distil_mini_ladd"
        ),
        "distil_mini_add": distilled("Distil with ADD", w["distil_mini_add"], "3 minutes on a CPU", "distil_mini_add"),
        "distil_mini_diffusion2gan": distilled(
            "Distil into one step",
            w["distil_mini_diffusion2gan"],
            "Diffusion2GAN, on a CPU",
            "distil_mini_diffusion2gan",
        ),
        "distil_mini_dmd2": distilled(
            "Distil with DMD2", w["distil_mini_dmd2"], "2 minutes on a CPU", "distil_mini_dmd2"
        ),
        "own_pictures": distilled("Your own pictures", w["own_pictures"], "LADD, mini model", "own_pictures"),
        "inpaint_scenes": distilled("Distil inpainting", w["inpaint_scenes"], "LADD, on a CPU", "inpaint_scenes"),
        "edit_scenes": Card(
            "Distil editing",
            "distil",
            "strengths to turn, on a CPU",
            (("before", "edit_scenes_picture"), ("1 step", "edit_scenes_student_strong")),
        ),
        "tune_mini_turbo": Card(
            "Tune a turbo",
            "distil",
            "your pictures, 4 steps kept",
            (("before", "tune_mini_turbo_turbo_own"), ("after", "tune_mini_turbo_tuned_own")),
        ),
        "prefer_mini": Card(
            "Train by preferences",
            "distil",
            "DPO, 12 pairs, on a CPU",
            (("before", "prefer_mini_turbo_paired"), ("after", "prefer_mini_tuned_paired")),
        ),
        "make_adapter": Card("Training adapter", "distil", "for any turbo, de-distilled", steps=("1 LoRA",)),
        "tune_z_image_turbo": few_tuned("Tune Z-Image Turbo", "8 steps", "your pictures, 1024 px"),
        "tune_flux1_schnell": few_tuned("Tune FLUX.1 schnell", "4 steps", "your pictures, 1024 px"),
        "tune_sdxl_turbo": few_tuned("Tune SDXL-Turbo", "4 steps", "your pictures, 512 px"),
        "distil_sdxl_fine_tune": distilled("Distil your SDXL", w["distil_sdxl_fine_tune"], "LADD, 1024 px"),
        "distil_sd3.5_medium": distilled("Distil SD3.5 medium", w["distil_sd3.5_medium"], "LADD, 1024 px"),
        "distil_flux1_dev": distilled("Distil FLUX.1 dev", w["distil_flux1_dev"], "LADD, 1024 px, 24 GB"),
        "distil_sdxl_add": distilled("Distil SDXL", w["distil_sdxl_add"], "ADD, 512 px"),
        "distil_sd1.5_diffusion2gan": distilled(
            "Distil SD 1.5", w["distil_sd1.5_diffusion2gan"], "Diffusion2GAN, 512 px"
        ),
        "distil_sd15_inpainting": distilled(
            "Distil an inpainting model", w["distil_sd15_inpainting"], "SD 1.5, LADD, 512 px"
        ),
        "distil_sdxl_inpainting": distilled("Distil SDXL inpainting", w["distil_sdxl_inpainting"], "LADD, 1024 px"),
        "distil_flux1_fill": distilled("Distil FLUX.1 Fill", w["distil_flux1_fill"], "LADD, 1024 px, 24 GB"),
        "distil_flux1_kontext": distilled(
            "Distil FLUX.1 Kontext", w["distil_flux1_kontext"], "editing, LADD, 1024 px, 24 GB"
        ),
        "distil_qwen_image_edit": distilled(
            "Distil Qwen-Image-Edit", w["distil_qwen_image_edit"], "editing, LADD, 1024 px, 24 GB"
        ),
        "sample_mini": Card("First pictures", "sample", "mini model, runs anywhere", (("4 steps", "sample_mini"),)),
        "sample_scenes": Card("Scenes from words", "sample", "runs anywhere", (("25 steps", "sample_scenes"),)),
        "lora_in_ksampler": Card("Your LoRA in KSampler", "sample", "mini model", (("4 steps", "lora_in_ksampler"),)),
        "schedule_doctor": Card(
            "Schedule Doctor",
            "examine",
            "finds wrong sampling",
            (("broken", "schedule_doctor_before"), ("mended", "schedule_doctor_after")),
        ),
        "seed_variety": Card(
            "Seed Variety",
            "examine",
            "more different pictures",
            (("without", "seed_variety_plain"), ("with", "seed_variety_varied")),
        ),
        "compare_teacher_student": Card(
            "Compare models", "examine", "same noise, with costs", steps=("25 steps", "4 steps")
        ),
        "compare_latents": Card(
            "Compare latents",
            "examine",
            "E-LatentLPIPS",
            (("2 steps", "compare_latents_few"), ("25 steps", "compare_latents_many")),
        ),
        "sdxl_turbo": few("SDXL-Turbo", "1 step", "512 px"),
        "sd_turbo": few("SD-Turbo", "2 steps", "512 px"),
        "flux1_schnell": few("FLUX.1 schnell", "4 steps", "1024 px"),
        "sd3.5_large_turbo": few("SD3.5 Large Turbo", "4 steps", "1024 px"),
        "z_image_turbo": few("Z-Image Turbo", "8 steps", "1024 px"),
        "qwen_image_lightning": few("Qwen-Image Lightning", "4 steps", "1328 px"),
        "sdxl_dmd2_lora": few("SDXL + DMD2 LoRA", "4 steps", "1024 px, SamplerCustom"),
        "image_to_image_2_steps": few("Image to image", "2 steps", "SDXL-Turbo, 512 px"),
        "inpainting_4_steps": few("Inpainting", "4 steps", "SDXL + DMD2 LoRA"),
    }


def draw_card(card: Card, pictures: Path, path: Path) -> None:
    """Write a card to ``path`` (JPEG). pictures: the folder where the run saved its own."""
    image = Image.new("RGB", (SIDE, SIDE), PAPER)
    pen = ImageDraw.Draw(image)
    tone = TONES[card.kind]
    pen.rectangle((0, 0, SIDE, BAND), fill=tone)
    _text(pen, card.title, (SIDE / 2, BAND - 46), 52, "white", SIDE - 2 * EDGE)
    found = [(caption, sorted(pictures.glob(f"{name}_0*.png"))[:4]) for caption, name in card.panels]
    if found and all(files for _, files in found):
        _panels(image, pen, found)
    elif card.steps:
        _steps(pen, card.steps, tone)
    else:
        raise FileNotFoundError(f"no pictures {[name for _, name in card.panels]} in {pictures}")
    _text(pen, card.facts, (SIDE / 2, SIDE - 34), 36, GREY, SIDE - 2 * EDGE)
    image.save(path, quality=88)


def _panels(image: Image.Image, pen: ImageDraw.ImageDraw, found: Sequence[tuple[str, list[Path]]]) -> None:
    """One or two squares of up to four pictures, each with its caption."""
    width, top = PANEL, BAND + 60
    gap = (SIDE - width * len(found)) // (len(found) + 1)
    for i, (caption, files) in enumerate(found):
        left = gap + i * (width + gap)
        _text(pen, caption, (left + width / 2, top - 28), 34, INK, width)
        across = 2 if len(files) > 1 else 1
        side = width // across
        for j, file in enumerate(files):
            small = Image.open(file).convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
            image.paste(small, (left + j % across * side, top + j // across * side))


def _steps(pen: ImageDraw.ImageDraw, steps: Sequence[str], tone: str) -> None:
    """The steps in large figures: before, an arrow, after."""
    middle = 298
    if len(steps) == 1:
        number, _, unit = steps[0].partition(" ")
        _text(pen, number, (SIDE / 2, middle - 30), 190, tone, SIDE)
        _text(pen, unit, (SIDE / 2, middle + 95), 60, INK, SIDE)
        return
    for text, x, colour in zip(steps, (125, SIDE - 125), (GREY, tone), strict=True):
        number, _, unit = text.partition(" ")
        _text(pen, number, (x, middle - 25), 150, colour, 230)
        _text(pen, unit, (x, middle + 70), 46, INK, 230)
    pen.line((218, middle - 20, 280, middle - 20), fill=INK, width=10)
    pen.polygon([(276, middle - 44), (276, middle + 4), (306, middle - 20)], fill=INK)
    for text, x in (("teacher", 125), ("student", SIDE - 125)):
        _text(pen, text, (x, middle + 125), 36, GREY, 230)


def _text(pen: ImageDraw.ImageDraw, text: str, centre: tuple[float, float], size: int, fill: str, width: float) -> None:
    """A line around ``centre``, smaller if it would be wider than ``width``."""
    font = ImageFont.load_default(size)
    while size > 26 and pen.textlength(text, font) > width:
        size -= 2
        font = ImageFont.load_default(size)
    pen.text(centre, text, fill, font, anchor="mm", stroke_width=size // 40, stroke_fill=fill)

"""Load E-LatentLPIPS and E-LatentLPIPS: how different two latents look, without decoding them."""

from __future__ import annotations

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..distill_core.diffusion.noise import ItemNoise
from ..distill_core.evaluation.heat import heat_colours
from ..distill_core.perceptual import ELatentLPIPS
from ..distill_core.perceptual.transforms import PRESETS
from .common import CATEGORY, SEED_MAX
from .host.perceptual import SHIPPED, load_perceptual, weight_files

Perceptual = io.Custom("TURBO_PERCEPTUAL")
PIXELS = 8  # of the heat map, for each position of the latent


class LoadELatentLPIPS(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurboDistillLoadPerceptual",
            display_name="Load E-LatentLPIPS",
            category=CATEGORY,
            description="A perceptual distance between latents, to compare them or as the loss of a distillation. "
            "Its weights work for the latents of one autoencoder only.",
            search_aliases=["lpips", "perceptual loss", "latent distance"],
            inputs=[
                io.Combo.Input(
                    "weights",
                    options=list(weight_files()),
                    default=SHIPPED,
                    tooltip="The mini model's weights, or a file in models/perceptual: trained by `python -m "
                    "distill_core perceptual train`, or converted from a published checkpoint by `perceptual convert`.",
                ),
                io.Combo.Input(
                    "transforms",
                    options=list(PRESETS),
                    default="bg",
                    tooltip="Random transforms applied to both latents before they are compared. b: flips, quarter "
                    "turns and shifts; g: general geometry; c: colour; o: cutout. none is plain LatentLPIPS.",
                ),
                io.Int.Input(
                    "draws",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="Number of random draws to average. Use 1 for training and 4 to 16 for comparing.",
                ),
                io.Float.Input(
                    "l1",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Weight of the latents' mean absolute difference, which is added to the distance.",
                ),
            ],
            outputs=[
                Perceptual.Output(display_name="perceptual", tooltip="For E-LatentLPIPS, or for a trainer as its loss.")
            ],
        )

    @classmethod
    def execute(cls, weights, transforms, draws, l1) -> io.NodeOutput:
        return io.NodeOutput(load_perceptual(weights, transforms, draws, l1))


class CompareLatents(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurboDistillPerceptualDistance",
            display_name="E-LatentLPIPS",
            category=CATEGORY,
            description="How different two latents look, for each item of the batch, and where. 0 means equal.",
            search_aliases=["lpips", "compare latents", "difference"],
            is_output_node=True,
            inputs=[
                Perceptual.Input("perceptual", tooltip="The metric, from Load E-LatentLPIPS."),
                io.Latent.Input("samples", tooltip="Latents to compare."),
                io.Latent.Input("reference", tooltip="Latents to compare them with: as many, or a single one for all."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=SEED_MAX,
                    control_after_generate=False,
                    tooltip="Seed of the random transforms; item i uses (seed, i).",
                ),
            ],
            outputs=[
                io.Float.Output(display_name="distance", is_output_list=True, tooltip="One number per item."),
                io.Image.Output(
                    display_name="heat_map",
                    tooltip="Where they differ, without transforms. Black: equal; white: largest difference in the "
                    "batch.",
                ),
            ],
        )

    @classmethod
    def execute(cls, perceptual: ELatentLPIPS, samples, reference, seed) -> io.NodeOutput:
        device = perceptual.head0.device
        a, b = (perceptual.from_autoencoder(x["samples"].float().to(device)) for x in (samples, reference))
        if len(b) == 1:
            b = b.expand_as(a) if b.shape[1:] == a.shape[1:] else b
        with torch.no_grad():
            distances = perceptual(a, b, ItemNoise(seed, range(len(a)))).tolist()
            heat = colours(perceptual.heat_map(a, b)).cpu()
        text = "\n".join(f"{i}: {value:.5f}" for i, value in enumerate(distances))
        return io.NodeOutput(distances, heat, ui=ui.PreviewText(text))


def colours(heat: Tensor) -> Tensor:
    """[B, 1, H, W] -> images [B, 8 H, 8 W, 3]: black, red, yellow, white up to the batch's largest value."""
    larger = torch.nn.functional.interpolate(heat / heat.amax().clamp(min=1e-12), scale_factor=PIXELS, mode="nearest")
    return heat_colours(larger[:, 0])


NODES = [LoadELatentLPIPS, CompareLatents]

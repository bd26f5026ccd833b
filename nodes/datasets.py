"""Teacher Latents, Latents Dataset and Prompt List: what the trainer learns from, as folders on disk."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import comfy.samplers
import comfy.utils
import torch
from comfy_api.latest import io

from ..distill_core.data.dataset import CacheConfig, LatentDataset, write_shards
from ..distill_core.data.real import save_latents
from ..distill_core.diffusion.schedules import check_sigmas, grid_sigmas, with_levels
from ..distill_core.files import DTYPES
from ..distill_core.methods.defaults import MOST_STEPS, levels_for
from ..distill_core.models.denoiser import Cond
from .common import CATEGORY, SEED_MAX
from .host.conditioning import check_places, cond_of
from .host.families import training_family
from .host.folders import dataset_folder
from .host.identity import family_name, identity
from .host.model import training_process_of
from .host.teacher import HostTeacher, one_entry

Dataset = io.Custom("TURBO_DISTILL_DATASET")  # the dataset's folder, as a Path
SIZES = re.compile(r"\s*(\d+)\s*[x×]\s*(\d+)\s*")


def name_input(default: str) -> io.String.Input:
    return io.String.Input(
        "dataset_name",
        default=default,
        tooltip="Folder under output/turbo_distill/datasets. A stopped run goes on there; a finished one is taken as "
        "it is. Other settings need another name.",
    )


def dtype_input() -> io.Combo.Input:
    return io.Combo.Input(
        "dtype",
        options=list(DTYPES),
        default="bfloat16",
        optional=True,
        advanced=True,
        tooltip="Precision of the files; bfloat16 takes half the disk space of float32.",
    )


def parse_sizes(text: str, scale: int) -> tuple[tuple[int, int], ...]:
    """ "1024x768, 512x512" (width x height, pixels) -> latent sizes [(H, W), ...].

    Raises ValueError for anything else, or sides that are no multiple of twice the scale (patches are 2 x 2).
    """
    sizes = []
    for part in text.split(","):
        match = SIZES.fullmatch(part)
        width, height = map(int, match.groups()) if match else (0, 0)
        if not width or not height or width % (2 * scale) or height % (2 * scale):
            raise ValueError(
                f"size {part.strip()!r}: write sizes like 1024x1024, 832x1216 in pixels, multiples of {2 * scale}"
            )
        sizes.append((height // scale, width // scale))
    return tuple(sizes)


def encode(model, positives: list, negative: list | None) -> tuple[list[Cond], Cond, dict]:
    """Conditionings as the trainer takes them: a row each, the empty one (zeros without a negative), and the base.

    Raises ValueError for conditionings that cannot be distilled.
    """
    conds = [cond_of([one_entry(conditioning)]).to("cpu") for conditioning in positives]
    uncond = cond_of([one_entry(negative, "negative")]).to("cpu") if negative else conds[0].map(torch.zeros_like)
    family = training_family(model.model.diffusion_model)
    for cond in (*conds, uncond):
        check_places(cond, family)
    return conds, uncond, {"family": family_name(model), "base": identity(model)}


class DatasetNode(io.ComfyNode):
    """A node that makes a dataset from lists, `define_schema` by `schema`."""

    @classmethod
    def schema(cls, name: str, display_name: str, description: str, aliases: list[str], inputs: list) -> io.Schema:
        return io.Schema(
            node_id=f"TurboDistill{name}",
            display_name=display_name,
            category=CATEGORY,
            description=description,
            search_aliases=aliases,
            is_input_list=True,
            inputs=[*inputs, dtype_input()],
            outputs=[Dataset.Output(display_name="dataset")],
        )

    @classmethod
    def fingerprint_inputs(cls, dataset_name, **inputs) -> str:
        """Changes when a dataset is deleted or grows, so that the host's cache does not outlive the files."""
        return str(len(list(dataset_folder(dataset_name[0]).glob("shard-*.safetensors"))))


class PromptList(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurboDistillPrompts",
            display_name="Prompt List",
            category=CATEGORY,
            description="A list of texts, one a line: connect it to CLIP Text Encode, which then gives a conditioning "
            "for each, and that to Teacher Latents.",
            search_aliases=["text list", "prompts from lines"],
            inputs=[
                io.String.Input(
                    "prompts", multiline=True, default="", tooltip="One prompt a line; empty lines do not count."
                )
            ],
            outputs=[io.String.Output(display_name="prompts", is_output_list=True)],
        )

    @classmethod
    def execute(cls, prompts) -> io.NodeOutput:
        lines = [line.strip() for line in prompts.splitlines() if line.strip()]
        if not lines:
            raise ValueError("the list has no prompts: write one a line")
        return io.NodeOutput(lines)


class TeacherLatents(DatasetNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls.schema(
            "TeacherLatents",
            "Teacher Latents",
            "Samples a model many times with its usual steps and guidance, and keeps the latents as the dataset a "
            "student learns from. Goes on where it was stopped.",
            ["distillation dataset", "synthetic data", "cache latents", "ode pairs"],
            [
                io.Model.Input("model", tooltip="The teacher: the many-step model, with any LoRAs and patches."),
                io.Conditioning.Input("positive", tooltip="One prompt, or a list; item i takes prompt i, in turn."),
                name_input("my_teacher"),
                io.Int.Input("count", default=2000, min=1, max=1 << 20, tooltip="Latents in all; thousands are usual."),
                io.String.Input(
                    "sizes",
                    default="1024x1024",
                    tooltip="Width x height in pixels; several, with commas between, are used in turn.",
                ),
                io.Int.Input("steps", default=25, min=1, max=1000, tooltip="Of the teacher; SIGMAS replace them."),
                io.Float.Input("cfg", default=5.0, min=1.0, max=30.0, step=0.1, tooltip="The teacher's guidance."),
                io.Conditioning.Input("negative", optional=True, tooltip="Needed if cfg is not 1."),
                io.Int.Input(
                    "pairs_for_steps",
                    default=0,
                    min=0,
                    max=MOST_STEPS,
                    optional=True,
                    tooltip="N: also keep the states of the teacher's path at the levels of an N-step student, for the "
                    "trainer's pairs term, which makes few steps much better. Costs N + 1 times the disk space. 0: no.",
                ),
                io.Sampler.Input("sampler", optional=True, tooltip="Instead of Euler; not with pairs, which need it."),
                io.Sigmas.Input("sigmas", optional=True, tooltip="Noise levels instead of the model's own grid."),
                io.Int.Input("batch_size", default=4, min=1, max=1024, optional=True, tooltip="Latents at once."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=SEED_MAX,
                    optional=True,
                    advanced=True,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Item i's noise is from it and i.",
                ),
            ],
        )

    @classmethod
    def execute(cls, positive, **inputs) -> io.NodeOutput:
        return io.NodeOutput(cls.make(positive, **{name: value[0] for name, value in inputs.items()}))

    @classmethod
    def make(
        cls,
        positive,
        model,
        dataset_name,
        count,
        sizes,
        steps,
        cfg,
        negative=None,
        pairs_for_steps=0,
        sampler=None,
        sigmas=None,
        batch_size=4,
        seed=0,
        dtype="bfloat16",
    ) -> Path:
        folder, process = dataset_folder(dataset_name), training_process_of(model)
        if pairs_for_steps and sampler is not None:
            raise ValueError("pairs need the node's own Euler sampler: disconnect SAMPLER, or set pairs_for_steps to 0")
        grid = grid_sigmas(process, steps) if sigmas is None else check_sigmas(sigmas.float().cpu())
        levels = levels_for(process, pairs_for_steps) if pairs_for_steps else ()
        grid = with_levels(grid, levels)
        scale = model.get_model_object("latent_format").spacial_downscale_ratio
        config = CacheConfig(
            count,
            len(grid) - 1,
            cfg,
            parse_sizes(sizes, scale),
            levels,
            batch_size=batch_size,
            seed=seed,
            dtype=dtype,
            shard_size=max(batch_size, min(256, count)),
        )
        conds, uncond, base = encode(model, positive, negative)
        bar, done = comfy.utils.ProgressBar(count), 0

        def show(share: float, preview) -> None:
            bar.update_absolute(min(count, done + share * batch_size), count, preview)

        teacher = HostTeacher(
            model,
            positive,
            conds,
            negative,
            cfg,
            sampler or comfy.samplers.ksampler("euler"),
            grid,
            config.sizes,
            seed,
            levels,
            show,
        )
        made_from = {
            **base,
            "prompts": digest_of(conds),
            "sigmas": grid.tolist(),
            "sampler": getattr(teacher.sampler.sampler_function, "__name__", "custom"),
        }
        for done, _, _ in write_shards(teacher, uncond, cfg, config, folder, made_from):
            bar.update_absolute(done)
        return folder


def digest_of(conds: list[Cond]) -> str:
    """A hash of the prompts' conditionings."""
    digest = hashlib.sha256()
    for cond in conds:
        for value in cond.tensors().values():
            digest.update(value.float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


class LatentsDataset(DatasetNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls.schema(
            "LatentsDataset",
            "Latents Dataset",
            "Latents of real images with their conditionings as a dataset for the trainer. Takes what core's Make "
            "Training Dataset and Load Training Dataset give.",
            ["real images", "training dataset"],
            [
                io.Model.Input("model", tooltip="The model that will be trained: it says how latents are scaled."),
                io.Latent.Input("latents", tooltip="A list, or a batch; encoded with the model's own VAE."),
                io.Conditioning.Input(
                    "positive", tooltip="A list: one for each image, or for each LATENT of the list; or one for all."
                ),
                name_input("my_images"),
                io.Conditioning.Input("negative", optional=True, tooltip="The empty prompt; zeros without it."),
            ],
        )

    @classmethod
    def execute(cls, model, latents, positive, dataset_name, negative=(None,), dtype=("bfloat16",)) -> io.NodeOutput:
        folder, model = dataset_folder(dataset_name[0]), model[0]
        layout = model.get_model_object("latent_format")
        items = [image for latent in latents for image in latent["samples"]]
        if len(positive) == len(latents):  # the conditioning of a latent is that of all images in its batch
            positive = [cond for cond, latent in zip(positive, latents, strict=True) for _ in latent["samples"]]
        wrong = {len(image) for image in items} - {layout.latent_channels}
        if wrong:
            raise ValueError(
                f"the latents have {sorted(wrong)[0]} channels, but this model's have {layout.latent_channels}: encode "
                "the images with this model's own VAE"
            )
        conds, uncond, base = encode(model, positive, negative[0])
        scaled = [model.model.process_latent_in(image.unsqueeze(0).float())[0].cpu() for image in items]
        images = [image[:, 0] if image.ndim == 4 and image.shape[1] == 1 else image for image in scaled]
        save_latents(images, conds, uncond, folder, base, dtype[0])
        return io.NodeOutput(folder)


def open_dataset(folder: Path, model, pairs: bool) -> LatentDataset:
    """The dataset in ``folder``, checked against the MODEL that is to be trained on it.

    Raises ValueError for one of another family or channel count and, with ``pairs``, one of another teacher.
    """
    dataset = LatentDataset(folder)
    made_by, made_for = dataset.manifest(), family_name(model)
    channels, wanted = dataset.shapes[0][0], model.get_model_object("latent_format").latent_channels
    if made_by.get("family") != made_for or channels != wanted:
        raise ValueError(
            f"the dataset {folder.name} was made for {made_by.get('family', 'another family')} ({channels} latent "
            f"channels), but the model is {made_for} ({wanted} channels): make the dataset with this model"
        )
    if pairs and dataset.state_sigmas and made_by.get("base") != identity(model):
        raise ValueError(
            f"the pairs in {folder.name} are paths of another model than the one connected (another checkpoint, or "
            "other LoRAs on it): connect the teacher that made them, make them again, or set pairs_weight to 0"
        )
    return dataset


NODES = [TeacherLatents, LatentsDataset, PromptList]

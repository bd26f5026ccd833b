"""Teacher Latents and Latents Dataset: what a trainer learns from, as folders on disk."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from comfy_api.latest import io

from ..distill_core.files import DTYPES
from ..distill_core.methods.defaults import MOST_STEPS
from .common import CATEGORY, first_of_each, seed_input
from .fingerprints import Left
from .host.datasets import make_image_dataset, make_teacher_latents, shard_count, sizes_of
from .host.text import show_text

Dataset = io.Custom("TURBO_DISTILL_DATASET")  # the dataset's folder, as a Path
DATASETS = Left(shard_count)


def name_input(default: str) -> io.String.Input:
    return io.String.Input(
        "dataset_name",
        default=default,
        tooltip="Folder under output/turbo_distill/datasets. An unfinished dataset is resumed and a finished one is "
        "reused; if you change the settings, choose another name.",
    )


def dtype_input() -> io.Combo.Input:
    return io.Combo.Input(
        "dtype",
        options=list(DTYPES),
        default="bfloat16",
        optional=True,
        advanced=True,
        tooltip="Precision of the stored tensors; bfloat16 takes half the disk space of float32.",
    )


class DatasetNode(io.ComfyNode):
    """A node that makes a dataset from lists; `define_schema` calls `schema`."""

    @classmethod
    def schema(
        cls, name: str, display_name: str, description: str, *, aliases: list[str], inputs: list, more: Sequence = ()
    ) -> io.Schema:
        """more: inputs that were added since, last for the sake of saved workflows."""
        return io.Schema(
            node_id=f"TurboDistill{name}",
            display_name=display_name,
            category=CATEGORY,
            description=description,
            search_aliases=aliases,
            is_output_node=True,
            is_input_list=True,
            hidden=[io.Hidden.unique_id],
            inputs=[*inputs, dtype_input(), *more],
            outputs=[Dataset.Output(display_name="dataset", tooltip="For a trainer.")],
        )

    @classmethod
    def fingerprint_inputs(cls, dataset_name, **inputs) -> float:
        """Changes when a dataset is deleted or grows, so that the host's cache does not outlive the files."""
        return DATASETS.fingerprint(dataset_name[0])

    @classmethod
    def made(cls, dataset_name: str, folder: Path, said: str = "") -> io.NodeOutput:
        """The node's output once its dataset is on disk, and what is to be said of it (else its sizes)."""
        DATASETS.note(dataset_name)
        return io.NodeOutput(folder, ui=show_text(cls, f"the dataset is in {folder}\n{said or sizes_of(folder)}"))


class TeacherLatents(DatasetNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls.schema(
            "TeacherLatents",
            "Teacher Latents",
            "Samples the model many times with its usual steps and guidance, and stores the latents as the dataset "
            "that a student is trained on. Resumes where it was stopped.",
            aliases=[
                "distillation dataset",
                "synthetic data",
                "cache latents",
                "ode pairs",
                "train lora",
                "generate dataset",
            ],
            inputs=[*teacher_inputs(), *sampling_inputs()],
        )

    @classmethod
    def execute(cls, positive, model, dataset_name, **inputs) -> io.NodeOutput:
        settings = first_of_each(inputs)
        settings["say"] = partial(show_text, cls)
        return cls.made(dataset_name[0], make_teacher_latents(model[0], positive, dataset_name[0], **settings))


def teacher_inputs() -> list:
    """What is sampled, and how often."""
    return [
        io.Model.Input("model", tooltip="Teacher: the many-step model, including its LoRAs and patches."),
        io.Conditioning.Input("positive", tooltip="One prompt, or a list of prompts that the items take in turn."),
        name_input("my_teacher"),
        io.Int.Input("count", default=2000, min=1, max=1 << 20, tooltip="Number of latents; thousands are usual."),
        io.String.Input(
            "sizes",
            default="1024x1024",
            tooltip="Image sizes as width x height in pixels. Several sizes, separated by commas, are used in turn.",
        ),
    ]


def sampling_inputs() -> list:
    """How the teacher samples."""
    return [
        io.Int.Input(
            "steps",
            default=25,
            min=1,
            max=1000,
            tooltip="The teacher's sampling steps; ignored if sigmas is connected.",
        ),
        io.Float.Input("cfg", default=5.0, min=1.0, max=30.0, step=0.1, tooltip="The teacher's guidance scale."),
        io.Conditioning.Input("negative", optional=True, tooltip="Negative prompt; needed unless cfg is 1."),
        io.Int.Input(
            "pairs_for_steps",
            default=0,
            min=0,
            max=MOST_STEPS,
            optional=True,
            tooltip="N > 0: also store the states of the teacher's path at the noise levels of an N-step student, for "
            "the trainers' pairs loss. It makes few-step students much better and takes N + 1 times the disk space.",
        ),
        io.Sampler.Input(
            "sampler", optional=True, tooltip="Sampler instead of Euler. Not available with pairs, which need Euler."
        ),
        io.Sigmas.Input("sigmas", optional=True, tooltip="Noise levels instead of the model's own schedule."),
        io.Int.Input(
            "batch_size", default=4, min=1, max=1024, optional=True, tooltip="Number of latents sampled at once."
        ),
        seed_input("Seed of the noise; item i uses (seed, i).", optional=True, advanced=True),
    ]


class LatentsDataset(DatasetNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls.schema(
            "LatentsDataset",
            "Latents Dataset",
            "Stores latents of real images and their conditionings as a dataset for a trainer. Takes the outputs of "
            "core's Make Training Dataset and Load Training Dataset.",
            aliases=["real images", "training dataset", "train lora", "save latents"],
            inputs=[
                io.Model.Input("model", tooltip="The model to be trained; it defines how latents are scaled."),
                io.Latent.Input("latents", tooltip="A list or a batch of latents, encoded with the model's own VAE."),
                io.Conditioning.Input(
                    "positive", tooltip="A list with one conditioning per image or per latent batch, or one for all."
                ),
                name_input("my_images"),
                io.Conditioning.Input("negative", optional=True, tooltip="The empty prompt; zeros if not connected."),
            ],
        )

    @classmethod
    def execute(cls, latents, positive, model, dataset_name, **inputs) -> io.NodeOutput:
        settings = first_of_each(inputs)
        return cls.made(dataset_name[0], make_image_dataset(model[0], latents, positive, dataset_name[0], **settings))


NODES = [TeacherLatents, LatentsDataset]

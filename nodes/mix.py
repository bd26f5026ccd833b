"""Mix Datasets: two datasets as one, each batch of one of them."""

from __future__ import annotations

from comfy_api.latest import io

from ..distill_core.data.mix import mixed
from .common import CATEGORY
from .datasets import Dataset


class MixDatasets(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TurboDistillMixDatasets",
            display_name="Mix Datasets",
            category=CATEGORY,
            description="Two datasets as one, for a trainer: for example own pictures and the teacher's samples, which "
            "keep the student what it was elsewhere. Each batch is of one of them.",
            search_aliases=["combine datasets", "regularisation images", "regularization", "prior pictures", "merge"],
            inputs=[
                Dataset.Input("dataset_a", tooltip="A dataset, or the output of another Mix Datasets."),
                Dataset.Input("dataset_b", tooltip="A dataset of the same model, or another mix."),
                io.Float.Input(
                    "share_of_b",
                    default=0.5,
                    min=0.01,
                    max=0.99,
                    step=0.01,
                    tooltip="Share of the batches that are of dataset_b: 0.25 is every fourth batch.",
                ),
            ],
            outputs=[Dataset.Output(display_name="dataset", tooltip="For a trainer.")],
        )

    @classmethod
    def execute(cls, dataset_a, dataset_b, share_of_b) -> io.NodeOutput:
        return io.NodeOutput(mixed(dataset_a, dataset_b, share_of_b))


NODES = [MixDatasets]

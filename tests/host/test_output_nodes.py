"""Nodes that write files end a graph; what the nodes are called and found by."""

from __future__ import annotations

import pytest
from graphs import mini_dataset, mini_training, node
from run_files import fails, lora_of

METHODS = ("LADD", "ADD", "Diffusion2GAN", "DMD2")


@pytest.mark.case("host D3", "a graph that ends in a trainer, Teacher Latents or Latents Dataset runs")
@pytest.mark.parametrize("method", METHODS)
def test_a_graph_may_end_in_a_trainer(host, method):
    graph = mini_training(f"ends_{method}", method=method, steps=2)
    del graph["save"]
    host.run(graph, 300)
    assert lora_of(host, f"ends_{method}").is_file()


@pytest.mark.case("host D3", "a graph that ends in a trainer, Teacher Latents or Latents Dataset runs")
def test_a_graph_may_end_in_a_dataset(host):
    host.run(mini_dataset("ends"), 120)
    datasets = host.base_dir / "output" / "turbo_distill" / "datasets"
    assert list((datasets / "ends").glob("shard-*.safetensors"))
    graph = mini_dataset("unused")
    graph["zeros"] = node("EmptySD3LatentImage", width=64, height=64, batch_size=2)
    graph["dataset"] = node(
        "TurboDistillLatentsDataset",
        model=["teacher", 0],
        latents=["zeros", 0],
        positive=["none", 0],
        dataset_name="ends_images",
    )
    host.run(graph, 120)
    assert list((datasets / "ends_images").glob("shard-*.safetensors"))


SEARCHES = {
    "TurboDistillLADDTrainer": ("train lora", "hyper", "z-image", "schnell", "lcm", "speed", "fast", "dmd2"),
    "TurboDistillADDTrainer": ("train lora", "hyper", "speed", "fast"),
    "TurboDistillDiffusion2GANTrainer": ("train lora", "hyper", "speed", "fast"),
    "TurboDistillDMD2Trainer": ("train lora", "hyper", "speed", "fast", "dmd2", "distribution matching"),
    "TurboDistillSampler": ("hyper", "z-image", "schnell", "lcm", "speed", "fast"),
    "TurboDistillPreset": ("hyper", "z-image", "schnell", "lcm", "speed", "fast"),
    "TurboDistillTeacherLatents": ("train lora",),
}


@pytest.mark.case("host search", "train lora, hyper, z-image, schnell, lcm, speed and fast find our nodes")
@pytest.mark.parametrize("name", SEARCHES)
def test_a_node_is_found_by_what_people_type(host, name):
    assert set(SEARCHES[name]) <= set(host.object_info()[name]["search_aliases"])


@pytest.mark.case("host D12", "names of outputs have underscores")
def test_no_output_has_a_space_in_its_name(host):
    info = host.object_info()
    ours = {name: node["output_name"] for name, node in info.items() if name.startswith("TurboDistill")}
    assert [(name, output) for name, outputs in ours.items() for output in outputs if " " in output] == []


def sampling(latent: dict, **sampler) -> dict:
    choice = dict(preset="auto", steps=1, denoise=1.0, denoise_mode="snap", seed=1, sampler="of the preset", cfg=0.0)
    return {
        "mini": node("TurboDistillLoadMiniModel", distilled=True),
        "class": node("TurboDistillMiniConditioning", class_name="bag"),
        "latent": latent,
        "sampler": node(
            "TurboDistillSampler",
            model=["mini", 0],
            positive=["class", 0],
            latent_image=["latent", 0],
            **(choice | sampler),
        ),
        "save": node("SaveLatent", samples=["sampler", 0], filename_prefix="unused"),
    }


@pytest.mark.case("host D12", "a latent of sound is called one")
def test_a_latent_of_sound_is_called_so(host):
    text = fails(host, sampling(node("EmptyLatentAudio", seconds=4.0, batch_size=1)))
    assert "the latent is sound" in text and "empty latent node of its family" in text


@pytest.mark.case("host D10", "denoise begins at 0.01, on the widget as in the run")
@pytest.mark.parametrize("name", ["TurboDistillSampler", "TurboDistillPreset"])
def test_denoise_begins_where_the_run_does(host, name):
    assert host.object_info()[name]["input"]["required"]["denoise"][1]["min"] == 0.01
    host.run(sampling(node("EmptySD3LatentImage", width=64, height=64, batch_size=1), denoise=0.01), 60)


@pytest.mark.case("host D9", "on auto without a turbo LoRA, Turbo Sampler says that it goes by the family alone")
def test_a_guess_by_the_family_is_said_on_the_node(host):
    """The mini model is of SD3's family and its teacher has no metadata of a turbo."""
    graph = sampling(node("EmptySD3LatentImage", width=64, height=64, batch_size=1), steps=0)
    for distilled in (False, True):
        graph["mini"]["inputs"]["distilled"] = distilled
        (text,) = host.run(graph, 60)["outputs"]["sampler"]["text"]
        assert ("nothing on this model says how it was distilled" in text) is not distilled

"""The scenes model through ComfyUI's own loaders and nodes: same numbers as headless, prompts by CLIP Text Encode."""

from __future__ import annotations

import pytest
import torch
from graphs import mini_training, node
from safetensors.torch import load_file
from shipped import host_and_ours

from distill_core.data.dataset import LatentDataset
from distill_core.models import scenes


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    """(the host's outputs, our outputs, what the host printed)."""
    cond = scenes.encode_text(["striped yellow ring on cobbles", "red star", ""])
    folder = tmp_path_factory.mktemp("probe")
    return host_and_ours(folder, "scenes", scenes.scenes_backend(), cond, scenes.load_autoencoder())


@pytest.mark.parametrize("name", ["denoised", "with_lora", "decoded", "encoded"])
def test_the_host_computes_the_same_scenes(probe, name):
    host, ours, _ = probe
    error = (host[name] - ours[name]).norm() / ours[name].norm()
    assert error < 1e-4


def test_the_host_knows_the_family_and_every_lora_key(probe):
    host, _, printed = probe
    assert "family: SD3" in printed
    assert "lora key not loaded" not in printed
    assert (host["with_lora"] - host["denoised"]).abs().max() > 1e-2


def sampled(conditioning: dict, positive: list, negative: list) -> dict:
    """25 Euler steps of the scenes model by core's own nodes."""
    return {
        "scenes": node("TurboDistillLoadScenesModel"),
        "shifted": node("ModelSamplingSD3", model=["scenes", 0], shift=1.0),
        **conditioning,
        "latent": node("EmptySD3LatentImage", width=64, height=64, batch_size=4),
        "sampler": node(
            "KSampler",
            model=["shifted", 0],
            positive=positive,
            negative=negative,
            latent_image=["latent", 0],
            seed=7,
            steps=25,
            cfg=scenes.GUIDANCE,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        ),
        "decoded": node("VAEDecode", samples=["sampler", 0], vae=["scenes", 1]),
        "images": node("SaveImage", images=["decoded", 0], filename_prefix="scenes"),
        "latents": node("SaveLatent", samples=["sampler", 0], filename_prefix="scenes"),
    }


def test_prompts_are_read_by_core_and_by_our_node_alike(host):
    """CLIP Text Encode and Scenes Conditioning give the same picture, and it shows what the words ask for."""
    text, clip = "plain red ring on waves", ["scenes", 2]
    by_core = {"yes": node("CLIPTextEncode", text=text, clip=clip), "no": node("CLIPTextEncode", text="", clip=clip)}
    ours = {
        name: node("TurboDistillScenesConditioning", prompts=prompts, all_prompts=False)
        for name, prompts in (("yes", text), ("no", ""))
    }
    latents = []
    for conditioning in (by_core, ours):
        entry = host.run(sampled(conditioning, ["yes", 0], ["no", 0]), 120)
        saved = entry["outputs"]["latents"]["latents"][0]
        latents.append(load_file(host.base_dir / "output" / saved["subfolder"] / saved["filename"])["latent_tensor"])
    assert torch.equal(*latents)
    classifier, _ = scenes.load_classifier("latent")
    said = {group: logits.argmax(1) for group, logits in scenes.by_group(classifier(latents[0])).items()}
    assert (said["colour"] == 0).float().mean() >= 0.75
    assert (said["ground"] == 1).float().mean() >= 0.75


def test_the_scenes_model_is_distilled_in_the_graph(host):
    """Teacher Latents of every prompt, a few steps of LADD, and the LoRA loads again."""
    graph = mini_training("on_scenes", "scenes", {"count": 108, "batch_size": 54}) | {
        "mini": node("TurboDistillLoadScenesModel"),
        "classes": node("TurboDistillScenesConditioning", prompts="", all_prompts=True),
        "none": node("TurboDistillScenesConditioning", prompts="", all_prompts=False),
    }
    before = len(host.log())
    host.run(graph, 180)
    (dataset,) = (host.base_dir / "output").glob("**/scenes/dataset.json")
    latents = LatentDataset(dataset.parent)
    (items,) = latents.buckets.values()
    contexts = {tuple(latents.read([item]).cond.context.flatten().tolist()) for item in items}
    assert len(items) == len(contexts) == 108
    (student,) = (host.base_dir / "output" / "loras").glob("on_scenes*.safetensors")
    assert "lora key not loaded" not in host.log()[before:]
    assert len(load_file(student)) > 30


def test_a_word_that_it_does_not_know_is_refused(host):
    cat = {"yes": node("TurboDistillScenesConditioning", prompts="a blue cat", all_prompts=False)}
    with pytest.raises(AssertionError, match="knows the words"):
        host.run(sampled(cat, ["yes", 0], ["yes", 0]))

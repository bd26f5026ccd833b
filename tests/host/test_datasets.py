"""Teacher Latents, Latents Dataset and Prompt List in the real server."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from graphs import mini_dataset, mini_training, node
from run_files import log_of
from safetensors.torch import load_file, save_file
from server import Host, failure_text

from distill_core.data.cache import CacheConfig, cache_latents
from distill_core.data.dataset import LatentDataset
from distill_core.files import load_tensors, save_tensors
from distill_core.models import mini
from distill_core.models.denoiser import Denoiser, Guided
from distill_core.models.mini import mini_backend, mini_conditioning

SCALE, SHIFT = 1.5305, 0.0609


def folder_of(host: Host, name: str) -> Path:
    return host.base_dir / "output" / "turbo_distill" / "datasets" / name


def only(dataset: dict) -> dict:
    """A dataset's graph with something that makes the host run it."""
    return dataset | {"show": node("PreviewAny", source=["dataset", 0])}


def fails(host: Host, graph: dict) -> str:
    entry = host.wait(host.queue(graph), 120)
    assert entry["status"]["status_str"] == "error", entry["status"]
    host.get("/system_stats")
    return failure_text(entry)


def everything(folder: Path):
    dataset = LatentDataset(folder)
    return dataset, dataset.read([place for places in dataset.buckets.values() for place in places])


@pytest.fixture(scope="module")
def cached(host) -> Path:
    host.run(only(mini_dataset("teacher", count=48, steps=6, pairs_for_steps=4, batch_size=20)), 120)
    return folder_of(host, "teacher")


def test_the_host_samples_what_the_headless_teacher_does(cached, tmp_path):
    """Latents, states of the path and conditionings of every item, sampled by the host's own guider and sampler."""
    classes, empty = mini_conditioning()
    config = CacheConfig(
        count=48, steps=6, guidance=1.5, sizes=((8, 8),), state_sigmas=(1.0, 0.75, 0.5, 0.25), shard_size=48
    )
    for _ in cache_latents(Guided(Denoiser(mini_backend()), empty, 1.5), classes, 16, config, tmp_path):
        pass
    (dataset, host), (_, ours) = everything(cached), everything(tmp_path)
    torch.testing.assert_close(host.latents, ours.latents, rtol=0, atol=1e-4)
    torch.testing.assert_close(host.states, ours.states, rtol=0, atol=1e-4)
    torch.testing.assert_close(host.states[:, 0], ours.states[:, 0], rtol=0, atol=1e-6)
    assert torch.equal(host.cond.context, ours.cond.context) and torch.equal(host.cond.pooled, ours.cond.pooled)
    assert dataset.state_sigmas == pytest.approx((1.0, 0.75, 0.5, 0.25))
    assert torch.equal(dataset.uncond().context, empty.context)
    assert dataset.manifest()["guidance"] == 1.5 and dataset.manifest()["family"] == "sd3"


def test_a_dataset_that_is_there_is_taken_as_it_is_and_another_is_refused(host, cached):
    before = {path.name: path.stat().st_mtime_ns for path in cached.glob("shard-*")}
    host.forget()
    host.run(only(mini_dataset("teacher", count=48, steps=6, pairs_for_steps=4, batch_size=20)), 120)
    assert {path.name: path.stat().st_mtime_ns for path in cached.glob("shard-*")} == before
    text = fails(host, only(mini_dataset("teacher", count=48, steps=7, pairs_for_steps=4, batch_size=20)))
    assert "holds a dataset made with other settings (steps is 7 now, was 6); choose another dataset_name" in text


@pytest.mark.case("host D5", "the refusal of a dataset names each setting that differs, with both values")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(cfg=2.0, seed=5), "cfg is 2 now, was 1.5; seed is 5 now, was 0"),
        (dict(pairs_for_steps=0), "pairs_for_steps is 0 now, was 4"),
        (dict(sizes="64x64, 80x48"), "sizes is 64x64, 80x48 now, was 64x64"),
        (dict(positive=["one", 0]), "positive is another one now"),
        (dict(negative=["one", 0]), "negative is another one now"),
        (dict(model=["mini", 0]), "sigmas .or the model's shift. is another one now"),
        (dict(model=["other", 0]), r"model .its weights, or the LoRAs on it. is another one now"),
    ],
)
def test_a_refusal_names_the_widgets_that_differ(host, cached, change, said):
    settings = dict(count=48, steps=6, pairs_for_steps=4, batch_size=20)
    lora = host.add_model("loras", mini.ASSETS / "student.safetensors", "mini-student.safetensors")
    graph = only(mini_dataset("teacher", **(settings | change)))
    graph["one"] = node("TurboDistillMiniConditioning", class_name="bag")
    graph["other"] = node("LoraLoaderModelOnly", model=["teacher", 0], lora_name=lora, strength_model=0.5)
    assert re.search(
        rf"holds a dataset made with other settings \({said}.*; choose another dataset_name", fails(host, graph)
    )


@pytest.mark.case("training D6", "Teacher Latents goes on with another batch_size and to a larger count")
def test_a_dataset_grows_to_what_is_made_at_once(host):
    settings = dict(steps=3, pairs_for_steps=1, sizes="64x64,48x80")
    for name, steps in (("grown", ((20, 8), (150, 4), (150, 9))), ("once", ((150, 4),))):
        for count, batch in steps:
            host.run(only(mini_dataset(name, count=count, batch_size=batch, **settings)), 120)
    grown, once = LatentDataset(folder_of(host, "grown")), LatentDataset(folder_of(host, "once"))
    assert len(grown) == 150 and sorted(grown.shapes) == [(16, 8, 8), (16, 10, 6)]
    for buckets in zip(grown.buckets.values(), once.buckets.values(), strict=True):
        a, b = grown.read(buckets[0]), once.read(buckets[1])
        torch.testing.assert_close(a.latents, b.latents, rtol=0, atol=1e-4)
        assert torch.equal(a.states[:, 0], b.states[:, 0]) and torch.equal(a.cond.context, b.cond.context)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset_name": "../../out"}, "ValueError: dataset name '../../out' cannot be a folder inside"),
        ({"sizes": "64"}, "size '64': write sizes like 1024x1024"),
        ({"sizes": "64x64, 60x64"}, "size '60x64'.*multiples of 16"),
        ({"sampler": ["sampler", 0]}, "disconnect SAMPLER, or set pairs_for_steps to 0"),
        ({"negative": None}, "cfg 1.5 needs a negative conditioning"),
        ({"positive": ["combined", 0]}, "a positive conditioning has 2 parts"),
    ],
)
def test_mistakes_are_explained(host, change, message):
    graph = only(mini_dataset("mistake", **change))
    graph["sampler"] = node("KSamplerSelect", sampler_name="dpmpp_2m")
    graph["one"] = node("TurboDistillMiniConditioning", class_name="bag")
    graph["combined"] = node("ConditioningCombine", conditioning_1=["one", 0], conditioning_2=["none", 0])
    text = fails(host, graph)
    assert re.search(message, text), text
    assert not folder_of(host, "mistake").exists()


def test_core_samplers_and_sigmas_make_a_dataset(host):
    graph = only(
        mini_dataset("core", pairs_for_steps=0, sampler=["sampler", 0], sigmas=["levels", 0], sizes="64x64,48x80")
    )
    graph["sampler"] = node("KSamplerSelect", sampler_name="dpmpp_2m")
    graph["levels"] = node("BasicScheduler", model=["teacher", 0], scheduler="normal", steps=5, denoise=1.0)
    said = "".join(host.run(graph, 120)["outputs"]["dataset"]["text"])
    assert "64 items in 2 sizes of latents: 32 of 8x8, 32 of 6x10" in said
    dataset = LatentDataset(folder_of(host, "core"))
    assert dataset.state_sigmas == () and dataset.manifest()["sampler"] == "sample_dpmpp_2m"
    assert len(dataset.manifest()["sigmas"]) == 6


# Real images


def real(host: Host, name: str, latents: list, positive: list, **more) -> dict:
    return {
        "mini": node("TurboDistillLoadMiniModel", distilled=False),
        "classes": node("TurboDistillMiniConditioning", class_name="all ten"),
        "one": node("TurboDistillMiniConditioning", class_name="bag"),
        "ten": node("EmptySD3LatentImage", width=64, height=64, batch_size=10),
        "sd15": node("EmptyLatentImage", width=64, height=64, batch_size=10),
        **more,
        "dataset": node(
            "TurboDistillLatentsDataset",
            model=["mini", 0],
            latents=latents,
            positive=positive,
            dataset_name=name,
            dtype="float32",
        ),
        "show": node("PreviewAny", source=["dataset", 0]),
    }


def test_images_encoded_by_core_are_stored_in_the_models_own_units(host):
    """LoadImage would do; here a decoded sample goes through core's VAEEncode, as Make Training Dataset encodes."""
    more = {
        "random": node(
            "TurboDistillSampler",
            model=["mini", 0],
            positive=["one", 0],
            latent_image=["ten", 0],
            preset="auto",
            steps=0,
            denoise=1.0,
            denoise_mode="snap",
            seed=1,
            sampler="euler",
            cfg=1.0,
            sigmas=["levels", 0],
        ),
        "levels": node("BasicScheduler", model=["mini", 0], scheduler="simple", steps=4, denoise=1.0),
        "image": node("VAEDecode", samples=["random", 0], vae=["mini", 1]),
        "encoded": node("VAEEncode", pixels=["image", 0], vae=["mini", 1]),
        "save": node("SaveLatent", samples=["encoded", 0], filename_prefix="encoded"),
    }
    outputs = host.run(real(host, "real", ["encoded", 0], ["classes", 0], **more), 120)["outputs"]
    saved = outputs["save"]["latents"][0]
    encoded = load_file(host.base_dir / "output" / saved["subfolder"] / saved["filename"])["latent_tensor"]
    dataset, batch = everything(folder_of(host, "real"))
    torch.testing.assert_close(batch.latents, (encoded - SHIFT) * SCALE, rtol=0, atol=1e-5)
    assert torch.equal(batch.cond.context, mini_conditioning()[0].context)
    graph = mini_training("on_real", steps=2)
    graph["dataset"] = real(host, "real", ["encoded", 0], ["classes", 0])["dataset"]
    graph |= {key: value for key, value in real(host, "real", [], []).items() if key in ("one", "ten")} | more
    host.run(graph, 120)


def test_a_count_mismatch_and_wrong_channels_are_explained(host):
    graph = real(host, "nine", ["ten", 0], ["classes", 0])
    graph["ten"]["inputs"]["batch_size"] = 9
    assert "9 latents but 10 conditionings" in fails(host, graph)
    assert "the latents have 4 channels, but this model's have 16" in fails(
        host, real(host, "four", ["sd15", 0], ["one", 0])
    )
    assert not folder_of(host, "nine").exists() and not folder_of(host, "four").exists()


def test_a_dataset_of_another_family_is_refused(host, tmp_path):
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    network = FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=128,
        num_attention_heads=1,
        joint_attention_dim=64,
        pooled_projection_dim=64,
    )
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, tmp_path / "flux.safetensors")
    name = host.add_model("diffusion_models", tmp_path / "flux.safetensors", "tiny-flux.safetensors")
    graph = mini_training("mixed")
    graph["flux"] = node("UNETLoader", unet_name=name, weight_dtype="default")
    graph["train"]["inputs"]["model"] = ["flux", 0]
    text = fails(host, graph)
    assert "was made for sd3 (16 latent channels), but the model is flux" in text
    assert not (host.base_dir / "output" / "turbo_distill" / "runs" / "mixed" / "checkpoint.safetensors").exists()


def test_pairs_of_another_teacher_are_refused(host):
    """The same checkpoint with a LoRA on it has other paths."""
    lora = host.add_model("loras", mini.ASSETS / "student.safetensors", "mini-student.safetensors")
    graph = mini_training("other_teacher")
    graph["other"] = node("LoraLoaderModelOnly", model=["teacher", 0], lora_name=lora, strength_model=0.5)
    graph["train"]["inputs"]["model"] = ["other", 0]
    assert "are paths of another model (its base is" in fails(host, graph)
    graph["train"]["inputs"]["pairs_weight"] = 0.0
    host.run(graph, 120)


def test_a_prompt_list_gives_a_text_a_line(host):
    graph = {
        "list": node("TurboDistillPrompts", prompts="a fox\n\n  a boat \n"),
        "show": node("PreviewAny", source=["list", 0]),
    }
    assert host.run(graph)["outputs"]["show"]["text"] == ["a fox", "a boat"]
    graph["list"]["inputs"]["prompts"] = " \n"
    assert "the list has no prompts" in fails(host, graph)


@pytest.mark.case("host limitation: prompts from a file", "Prompt List reads a .txt file; a set is shipped")
def test_a_prompt_list_reads_a_file_first(host):
    (host.base_dir / "input" / "mine.txt").write_text("\ufeffa ship\n\n a dog\n", encoding="utf-8")
    graph = {
        "list": node("TurboDistillPrompts", prompts="a fox", file="mine.txt"),
        "show": node("PreviewAny", source=["list", 0]),
    }
    assert host.run(graph)["outputs"]["show"]["text"] == ["a ship", "a dog", "a fox"]
    graph["list"]["inputs"] |= {"prompts": "", "file": "assorted (shipped)"}
    shipped = host.run(graph)["outputs"]["show"]["text"]
    assert len(shipped) == len(set(shipped)) == 124


@pytest.mark.case("training 5.2", "datasets mix with weights: own pictures and the teacher's samples")
def test_trainers_take_mixed_datasets(host):
    """The teacher's samples with pairs, and latents without: pairs are in the log of every second step."""
    pictures = real(host, "mixed_own", ["ten", 0], ["classes", 0])
    graph = mini_training("mixed", steps=4, pairs_weight=1.0) | {"ten": pictures["ten"]}
    graph["own"] = pictures["dataset"] | {"inputs": pictures["dataset"]["inputs"] | {"model": ["teacher", 0]}}
    graph["mix"] = node("TurboDistillMixDatasets", dataset_a=["dataset", 0], dataset_b=["own", 0], share_of_b=0.5)
    graph["train"]["inputs"]["dataset"] = ["mix", 0]
    graph["any"] = node("TurboDistillTrainingSettings", preflight=False)
    graph["train"]["inputs"]["settings"] = ["any", 0]
    host.run(graph, 120)
    assert ["pairs" in entry for entry in log_of(host, "mixed")] == [True, False, True, False]
    graph["mix"]["inputs"]["share_of_b"] = 0.2
    graph["train"]["inputs"]["steps"] = 5
    assert "other settings (dataset is another one now)" in fails(host, graph)


def test_items_that_have_masks_are_refused_by_a_model_without_an_input_for_them(host):
    """The host's network would be told nothing of the masks."""
    teacher = dict(count=16, steps=2, batch_size=16)
    host.run(only(mini_dataset("masked", **teacher)), 120)
    (shard,) = folder_of(host, "masked").glob("shard-*")
    tensors, metadata = load_tensors(shard)
    save_tensors(shard, {**tensors, "extra.inpaint_mask": torch.ones(16, 1, 8, 8)}, metadata)
    host.forget()
    said = fails(host, mini_training("masked", "masked", teacher))
    assert "have inpaint_mask (a mask, 1 where the picture is to be filled), and this model has no input for it" in said

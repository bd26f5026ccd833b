"""What a MODEL carries: refused, honoured, told in the student's file, and merged into one file (probe_identity.py)."""

from __future__ import annotations

import json
import os

import pytest
from graphs import mini_training, node, saved_student
from run_files import fails, run_folder
from server import run_probe

from distill_core.files import alone_in
from distill_core.lora_files import read_lora


@pytest.fixture(scope="module")
def probe(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("identity")
    run_probe("probe_identity.py", folder)
    return json.loads((folder / "identity.json").read_text())


@pytest.mark.case("host D2", "a bypass LoRA is refused by trainer and Teacher Latents, and seen by the identity")
@pytest.mark.parametrize(
    ("case", "name", "cure"),
    [
        ("bypass", "the injection bypass_lora", "load it with LoraLoaderModelOnly"),
        ("function", "the model function wrapper", "only the host's sampler runs it"),
        ("hooks", "hooks", "load LoRAs with LoraLoaderModelOnly"),
        ("weight", "a weight wrapper on diffusion_model.x.weight", "load it as a LoRA"),
        ("object", "a patch of diffusion_model.forward", "bound to the loaded network"),
        ("compile", "the wrapper torch.compile", "made for sampling"),
        ("bound", "patches_replace dit", "bound to the loaded network"),
    ],
)
def test_what_cannot_be_trained_through_is_named_and_seen(probe, case, name, cure):
    found = probe["refused"][case]
    assert "carries what a student cannot be trained through" in found["text"]
    assert name in found["text"] and cure in found["text"] and found["seen"]


@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_patches_work_in_training_as_in_sampling(probe, family):
    """An attention patch of a UNet and a block patch of FLUX, which see the noise level; guidance is no matter."""
    found = probe["allowed"][family]
    assert found["same"] < 1e-5 and found["moved"] > 20 * found["same"]
    assert max(found["sigmas"]) < 1e-3, "sigma 1.5 as the nearest of a thousand levels"
    assert found["seen"] and found["again"]


@pytest.mark.case("training 6", "the student above a LoRA says which; its file holds its own part")
@pytest.mark.case("training L2", "the file of a student above LoRAs says which, and using it without them warns")
def test_the_file_names_what_was_below_and_its_use_compares(probe):
    found = probe["below"]
    assert [lora["strength"] for lora in found["below"]] == [0.5, 0.8] and found["digests"] == 2
    assert found["base"], "the base is the model without its LoRAs"
    assert (
        found["there"] == [] and len(found["missing"]) == 2 and "which the model does not have" in found["missing"][0]
    )
    assert len(found["weaker"]) == 1 and "here that LoRA has strength 0.3" in found["weaker"][0]
    assert len(found["other base"]) == 1 and "made above another model" in found["other base"][0]


@pytest.mark.parametrize(
    "case",
    [
        "flux lora",
        "wan lora",
        "sd15 lora",
        "sd3 lora",
        "sd3 alpha",
        "sd3 dora",
        "sd3 lokr",
        "sd3 difference",
        "sd3 bias",
    ],
)
def test_one_file_does_what_student_and_loras_do(probe, case):
    found = probe["merged"][case]
    assert found["error"] < 1e-5 < 1e-2 < found["moved"]
    assert found["plain"] == case.endswith(("lora", "alpha")), "plain LoRAs stay low-rank matrices"


@pytest.mark.case("training D10", "each family's network says how wide its text must be")
def test_every_family_says_what_it_takes(probe):
    wide = {"sd3": 64, "flux": 64, "flux2": 64, "wan": 4096, "sd15": 768, "sdxl": 64, "lumina": 64, "qwen-image": 64}
    assert {family: found["context"] for family, found in probe["limits"].items()} == wide
    sd3 = {"channels": 16, "context": 64, "pooled": 64, "side": 32, "pixels": 8, "patch": 1, "items": []}
    sd3 |= {"token": 2, "instead": "concat_latent_image", "references": False}
    assert probe["limits"]["sd3"] == sd3
    going_by = {family for family, found in probe["limits"].items() if found["references"]}
    assert going_by == {"flux", "flux2", "qwen-image"}


# In the graph


def lora_below(graph: dict, loader: str, of: str = "teacher") -> dict:
    """A saved LoRA on the model that goes into a node."""
    source = graph[of]["inputs"]["model"]
    graph["lora"] = node(loader, model=source, lora_name="below_00001_.safetensors", strength_model=0.6)
    graph[of]["inputs"]["model"] = ["lora", 0]
    return graph


@pytest.fixture(scope="module")
def with_lora(host):
    """A server that has a LoRA to load below a student."""
    host.run(mini_training("below"), 120)
    return host


@pytest.mark.parametrize("of", ["teacher", "train"])
def test_a_bypass_lora_is_refused_in_the_graph(with_lora, of):
    """By Teacher Latents and, where that one has the bare model, by the trainer."""
    graph = lora_below(mini_training("bypassed", "bypassed"), "LoraLoaderBypassModelOnly", of)
    assert "load it with LoraLoaderModelOnly" in fails(with_lora, graph)


def test_the_report_says_that_its_model_is_another(with_lora):
    """The run "below" was trained on the bare model; above a LoRA its student is still the bare model's."""
    graph = lora_below(mini_training("reported_above", "reported_above"), "LoraLoaderModelOnly")
    with_lora.run(graph, 120)
    report = node("TurboDistillReport", run_name="reported_above", model=["mini", 0])
    outputs = with_lora.run({"mini": graph["mini"], "report": report}, 120)["outputs"]
    assert "made above the LoRA" in outputs["report"]["text"][0] and outputs["report"]["images"]
    report["inputs"]["model"] = ["teacher", 0]
    same = {name: graph[name] for name in ("mini", "lora", "teacher")}
    assert "text" not in with_lora.run({**same, "report": report}, 120)["outputs"]["report"]


@pytest.mark.case("training D14", "a run that another process trains is refused in the host, too")
def test_a_folder_in_which_another_process_trains_is_refused(with_lora):
    with alone_in(run_folder(with_lora, "twice"), "training"):
        text = fails(with_lora, mini_training("twice"))
    assert f"another process (number {os.getpid()} on" in text and "is training in" in text
    with_lora.run(mini_training("twice"), 120)


@pytest.mark.case("training D10", "a side beyond the position table is refused in words before the first step")
def test_a_picture_that_is_too_long_is_refused_in_words(with_lora):
    graph = mini_training("long", pairs_weight=0.0)
    graph["latent"] = node("EmptySD3LatentImage", width=1024, height=64, batch_size=2)
    graph["dataset"] = node(
        "TurboDistillLatentsDataset",
        model=["teacher", 0],
        latents=["latent", 0],
        positive=["classes", 0],
        dataset_name="long",
    )
    graph["classes"]["inputs"]["class_name"] = "bag"
    text = fails(with_lora, graph)
    assert "has latents of 128 x 8, and this model knows no position beyond 32" in text and "256 pixels" in text


@pytest.mark.parametrize("merge", [False, True])
def test_a_student_above_a_lora_is_saved_alone_or_as_one_file(with_lora, merge):
    """Alone it warns when it is sampled without that LoRA; as one file it does not, and core takes all its keys."""
    graph = lora_below(mini_training("above", "above"), "LoraLoaderModelOnly")
    graph["save"]["inputs"] |= {"merge_upstream": merge, "filename_prefix": f"loras/above{merge}"}
    with_lora.run(graph, 120)
    name = f"above{merge}_00001_.safetensors"
    state, said = read_lora(with_lora.base_dir / "output" / "loras" / name)
    assert ("below" in said) != merge and (not merge or all(".lora_" in key for key in state))
    before = len(with_lora.log())
    graph = saved_student(name) | {
        "latent": node("EmptySD3LatentImage", width=64, height=64, batch_size=1),
        "bag": node("TurboDistillMiniConditioning", class_name="bag"),
        "sample": node(
            "TurboDistillSampler",
            model=["model", 0],
            positive=["bag", 0],
            latent_image=["latent", 0],
            preset="auto",
            steps=0,
            denoise=1.0,
            denoise_mode="snap",
            seed=0,
            sampler="of the preset",
            cfg=0.0,
        ),
        "save": node("SaveLatent", samples=["sample", 0], filename_prefix="above"),
    }
    (text,) = with_lora.run(graph, 120)["outputs"]["sample"]["text"]
    assert ("Warning: this student was made above the LoRA" in text) != merge
    told = with_lora.log()[before:]
    assert "NOT LOADED" not in told and "lora key not loaded" not in told

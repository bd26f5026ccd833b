"""Models of the host that are told more of every picture than its latent: inpainting, editing (probe_items.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from graphs import node
from run_files import fails
from safetensors.torch import load_file
from server import run_probe

NETWORKS = {
    "sd15 inpainting": ["inpaint_mask", "masked_image"],
    "sd15 editing": ["source_image"],
    "flux fill": ["masked_image", "pixel_mask"],
    "flux control": ["source_image"],
    **dict.fromkeys(("flux", "flux2", "qwen-image"), ["reference_image"]),
}
every = pytest.mark.parametrize("network", NETWORKS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What probe_items.py leaves: networks, LoRAs, and items.json."""
    folder = tmp_path_factory.mktemp("items")
    run_probe("probe_items.py", folder)
    return folder


@pytest.fixture(scope="module")
def probe(folder) -> dict:
    return json.loads((folder / "items.json").read_text())


def test_each_network_takes_its_own(probe):
    assert probe["names"] == NETWORKS | dict.fromkeys(("sd15", "sd3", "wan"), [])


@every
def test_the_teacher_is_the_model_as_the_host_samples_it(probe, network):
    """With InpaintModelConditioning's, InstructPixToPixConditioning's or ReferenceLatent's values there, and a
    dataset's tensors here."""
    found = probe["same_as_sampling"][network]
    assert found["difference"] < 3e-6 and found["effect"] > 1e-3


@every
@pytest.mark.parametrize("mode", ["plain", "checkpointed"])
def test_the_students_gradient_is_right(probe, network, mode):
    """LADD's student loss, in float64, against five-point finite differences."""
    assert probe["gradients"][f"{network} {mode}"] < 1e-3


@every
def test_a_step_trains_the_student(probe, network):
    assert 0 < probe["steps"][network] < 1


@every
def test_core_loads_the_lora_without_a_warning_and_gives_the_students_output(probe, network):
    found = probe["exported_loras"][network]
    assert found["warnings"] == [] and found["difference"] < 1e-4 and found["effect"] > 5e-3


@pytest.mark.parametrize("network", ["sd15 inpainting", "flux fill"])
def test_a_report_fills_the_hole_and_leaves_the_rest(probe, network):
    found = probe["reports"][network]
    assert found["picture"] < 1e-6 and found["given"] == ["to fill"]
    assert found["outside"] and found["inside"] > 1e-2 and found["alone"] < 1e-5


@pytest.mark.parametrize("network", ["flux", "flux2", "qwen-image"])
def test_a_report_shows_what_was_to_be_edited_and_the_teacher_goes_by_it(probe, network):
    found = probe["reports_by_reference"][network]
    assert found["given"] == "to edit" and found["picture"] < 1e-5 and found["shape"] and found["effect"] > 1e-3


@pytest.mark.parametrize("network", ["flux", "flux2", "qwen-image"])
def test_a_teacher_is_guided_by_the_picture_against_an_answer_without_it(probe, network):
    found = probe["guided_by_reference"][network]
    assert found["kind"] and found["difference"] < 1e-5 and found["effect"] > 1e-3


@pytest.mark.parametrize("network", ["sd15 editing", "flux control", "flux", "flux2", "qwen-image"])
def test_a_student_is_told_strengths_as_it_was_trained(probe, network):
    """A loader has it at its default strengths; Editing Strengths at others, each time at those that it says."""
    found = probe["told_strengths"][network]
    assert found["default"] < 1e-6 and found["left alone"] == found["taken back"] == 0
    cores = found["core's warnings"]
    assert found["warnings"] == [] and len(cores) == 3 and all("lora_strengths." in text for text in cores)
    for strengths, said in (
        ("(4.0, 1.5)", ["text_strength 4 (trained from 3 to 10, 7.5 where it is not told)", "image_strength 1.5 ("]),
        ("(7.5, 1.1)", ["text_strength 7.5 (", "image_strength 1.1 (trained from 1 to 2, 1.5 where it is not told)"]),
    ):
        assert found[strengths]["difference"] < 1e-6 < 1e-3 < found[strengths]["effect"]
        assert all(words in found[strengths]["said"] for words in [f"{network}.safetensors is told:", *said])
    assert found["at half strength"] < 1e-6
    assert f"text_strength must be from 3 to 10, where {network}.safetensors was trained, not 11" == found["beyond"]
    assert "no LoRA on this model is of a student that is told strengths" in found["no such lora"]


def test_strengths_turn_what_cores_sampler_makes_of_an_eight_channel_network(folder, host):
    """On the real server: Load LoRA alone is the node at 0 and 0; other strengths give other latents, and are said."""
    network = host.add_model("diffusion_models", folder / "sd15 editing.safetensors", "editing.safetensors")
    lora = host.add_model("loras", folder / "loras" / "sd15 editing.safetensors", "told.safetensors")
    sampling = dict(seed=3, steps=1, cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0)
    graph = {
        "model": node("UNETLoader", unet_name=network, weight_dtype="default"),
        "loaded": node("LoraLoaderModelOnly", model=["model", 0], lora_name=lora, strength_model=1.0),
        "clip": node("TestRandomClip", width=768, tokens=77, pooled=0),
        "text": node("CLIPTextEncode", text="a red dog", clip=["clip", 0]),
        "empty": node("EmptyLatentImage", width=64, height=64, batch_size=2),
    }
    asked = {"plain": None, "default": (0.0, 0.0), "turned": (4.0, 0.0), "closer": (0.0, 1.1)}
    for name, strengths in asked.items():
        source = ["loaded", 0]
        if strengths is not None:
            told = dict(text_strength=strengths[0], image_strength=strengths[1])
            graph[name], source = node("TurboDistillEditingStrengths", model=source, **told), [name, 0]
        wired = dict(model=source, positive=["text", 0], negative=["text", 0], latent_image=["empty", 0])
        graph[f"sample {name}"] = node("KSampler", **wired, **sampling)
        graph[f"keep {name}"] = node("SaveLatent", samples=[f"sample {name}", 0], filename_prefix=name)
    outputs = host.run(graph, 120)["outputs"]
    made = {}
    for name in asked:
        (file,) = outputs[f"keep {name}"]["latents"]
        made[name] = load_file(host.base_dir / "output" / file["subfolder"] / file["filename"])["latent_tensor"]
    assert torch.equal(made["plain"], made["default"])
    for name in ("turned", "closer"):
        assert (made[name] - made["plain"]).abs().max() > 1e-3 * made["plain"].abs().max()
    assert not torch.allclose(made["turned"], made["closer"], rtol=1e-3)
    assert "text_strength 4 (trained from 3 to 10" in "".join(outputs["turned"]["text"])
    graph["closer"]["inputs"]["image_strength"] = 2.5
    assert "image_strength must be from 1 to 2, where told.safetensors was trained, not 2.5" in fails(host, graph)


def test_items_that_do_not_fit_the_model_are_refused(probe):
    found = probe["mistakes"]
    assert found["masked, filling"] == found["plain, ordinary"] == "accepted"
    for name in ("no input", "masked, ordinary"):
        assert "and this model has no input for it in the graph" in found[name]
    assert "the dataset plain has no inpaint_mask (a mask, 1 where" in found["plain, filling"]
    assert "make it with masks of Picture Folder" in found["plain, filling"]


@pytest.mark.parametrize(
    ("kind", "size", "text"),
    [
        ("text alone", None, "checkered white ring on waves"),
        ("Qwen-Image-Edit", 1024, "checkered white ring on waves"),
        (
            "Qwen-Image-Edit-2509",
            384,
            "Picture 1: <|vision_start|><|image_pad|><|vision_end|>checkered white ring on waves",
        ),
    ],
)
def test_sources_become_pictures_to_go_by_and_the_text_encoder_sees_them(probe, kind, size, text):
    """Each item has its own source's latent, and its caption as core's node encodes it with that source."""
    found = probe["shown_sources"][kind]
    assert found["tensors"] == ["reference_image"] and found["sources"] < 1e-6 < 0.1 < found["differ"]
    assert found["texts"] == [text] and found["rows"] == list(range(2, 14)) and found["own"]
    assert found["seen"] == (12 if size else 0)
    assert found["sizes"] == ([[1, size, size, 3]] if size else [])


def test_sources_that_a_model_or_its_text_encoder_cannot_take_are_refused(probe):
    found = probe["shown_sources"]["refused"]
    assert "source_in_text is Qwen-Image-Edit-2509 now, was Qwen-Image-Edit" in found["another way"]
    assert "connect such a one" in found["blind"] and "choose source_folder" in found["no sources"]
    assert "takes no masks" in found["masks"]
    assert "this one has no input for them" in found["no input"]


def test_teacher_edits_shows_each_item_its_own_source(probe):
    """The pairs come in turn, at strengths drawn for each edit, with the states of the path; a student learns of it."""
    found = probe["edits_by_reference"]
    assert found["tensors"] == ["image_strength", "reference_image", "text_strength"]
    assert found["sources"] < 1e-6 < 0.1 < found["differ"] and found["states"] == [14, 1, 16, 8, 8]
    for name, low, high in (("text_strength", 2, 3), ("image_strength", 1, 1.5)):
        assert low <= found["spans"][name][0] < found["spans"][name][1] <= high
    assert 0 < found["moved"] < 1
    assert "have no picture to edit" in found["texts alone"] and "edits no picture" in found["no editor"]


def test_pictures_are_stored_with_the_guidance_that_a_model_is_told(probe):
    """FLUX.1 Fill's: with every item and with the empty text. A dataset of another guidance is another."""
    found = probe["told_guidance"]
    assert set(found["items"]) == {30.0} and found["empty"] == [30.0]
    assert found["tensors"] == ["masked_image", "pixel_mask"]
    assert "this model has no input for a guidance scale" in found["no input"]
    assert "embedded_guidance" in found["another"]

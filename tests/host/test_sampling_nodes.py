"""The sampling nodes in the host, on tiny models through its own loaders, beside core's nodes (probe_sampling.py).

The first part goes through the nine defects of today's few-step sampling: each is reproduced with the host's own nodes
where it is the host's, and shown absent from ours or caught by the Schedule Doctor.
"""

from __future__ import annotations

import json
import os
import re
import subprocess

import pytest
from server import COMFYUI, HERE, PYTHON, run_probe

from distill_core.presets.levels import flux2_mu


@pytest.fixture(scope="module")
def probe(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("sampling")
    run_probe("probe_sampling.py", folder)
    return json.loads((folder / "results.json").read_text())


def test_the_hosts_loader_makes_the_families(probe):
    assert all(family == found for family, found in probe["families"].items()) and len(probe["families"]) == 6


# 1. Denoise is quantised to steps / k.


@pytest.mark.parametrize("steps, levels", [(1, 3), (2, 5), (4, 10), (8, 19)])
def test_denoise_is_a_staircase_in_core_and_exact_in_ours(probe, steps, levels):
    core, ours = probe["denoise_in_core"]["start"][str(steps)], probe["denoise_in_ours"]["start"]
    assert len(set(core)) == levels and core[-8] == 1.0, "core: few levels, and full noise well below denoise 1"
    for mode in ("snap", "respace"):
        starts = ours[f"{steps} {mode}"]
        assert len(set(starts)) == len(starts) and starts == sorted(starts)
        assert max(b - a for a, b in zip(starts, starts[1:], strict=False)) < 0.021
        assert max(starts[:-1]) < 1.0


# 2. SDTurboScheduler: slots of 0.1, steps silently cut, an empty list.


def test_sd_turbo_scheduler_cuts_steps_and_empties_the_list(probe):
    assert probe["denoise_in_core"]["turbo .05"] == [0.0]
    assert len(probe["denoise_in_core"]["turbo .2"]) == 3, "4 steps asked, 2 made"
    start, end = probe["denoise_in_ours"]["turbo .05"]
    assert end == 0 < start < 1


# 3. Two turbo grids for the same weights.


def test_both_turbo_grids_have_a_preset(probe):
    from distill_core.presets.levels import preset_sigmas
    from distill_core.presets.table import find_preset

    lists = probe["lists_of_the_host"]
    for name, key in (("turbo", "sdxl-turbo"), ("trailing", "sdxl-turbo-trailing")):
        assert preset_sigmas(find_preset(key)).tolist() == pytest.approx(lists[name], rel=1e-4)


# 4. Two units of shift.


def test_a_shift_in_the_wrong_unit_is_named(probe):
    lists, cases = probe["lists_of_the_host"], probe["doctor_on_the_host"]
    assert lists["AuraFlow 1.15"] == pytest.approx([1, 0.775, 0.535, 0.277, 0], abs=1e-3)
    assert lists["Flux 3"] == pytest.approx([1, 0.984, 0.953, 0.870, 0], abs=1e-3)
    assert "shift_unit" in cases["mu as factor"]["faults"] and "shift_unit" in cases["factor as mu"]["faults"]
    assert cases["factor as mu"]["sigmas"] == pytest.approx([1, 0.9, 0.75, 0.5, 0])


# 5. Shift nodes change the timestep scale.


@pytest.mark.parametrize("case, size", [("AuraFlow on SD3", "too small"), ("SD3 node on schnell", "too big")])
def test_a_wrong_timestep_multiplier_is_named_and_mended(probe, case, size):
    found = probe["doctor_on_the_host"][case]
    assert found["faults"] == ["time_scale"] and f"1000 times {size}" in found["report"]
    assert found["broken differs"] > 0.1, "the host samples on without an error"
    assert found["mended differs"] == 0.0


def test_a_shift_node_too_many_is_named(probe):
    assert "extra_shift_node" in probe["doctor_on_the_host"]["shift node too many"]["faults"]


# 6. The same scheduler name is not the same list.


def test_scheduler_normal_is_named(probe):
    lists = probe["lists_of_the_host"]
    assert lists["sd3 simple"] == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    assert lists["sd3 normal"] == pytest.approx([1, 0.858, 0.602, 0.009, 0], abs=1e-3)
    assert probe["doctor_on_the_host"]["normal"]["faults"] == ["scheduler"]


# 7. The cliff of Flux2Scheduler.


def test_the_jump_of_flux2_scheduler_is_named(probe):
    below, above = (probe["lists_of_the_host"]["flux2"][size] for size in ("1040", "1056"))
    assert below[2] - above[2] > 0.14
    for case in ("flux2 1056", "flux2 1056 unknown size"):
        found = probe["doctor_on_the_host"][case]
        assert found["faults"] == ["flux2_jump"] and found["sigmas"] == pytest.approx(below, abs=2e-3)
    assert flux2_mu(4356, 4) < 1.2 < 2.3 < flux2_mu(4225, 4)


# 8. Nine steps of Z-Image-Turbo.


def test_nine_steps_are_named(probe):
    assert probe["lists_of_the_host"]["sd3 simple 9"][:3] == pytest.approx([1, 0.96, 0.913], abs=1e-3)
    found = probe["doctor_on_the_host"]["z-image 9"]
    assert found["faults"] == ["one_step_more"] and len(found["sigmas"]) == 9


# 9. The noise of a batch.


def test_injected_noise_depends_on_the_batch_in_core(probe):
    assert probe["item_alone_in_core"] > 0.1


@pytest.mark.case(
    "sampling new 7 (Comfy-Org/ComfyUI#12051)", "an image taken from its batch and made alone is the same, on a CPU"
)
def test_an_image_of_a_batch_is_bit_for_bit_the_image_made_alone(probe):
    """Six families, five samplers: initial noise, injected noise and the network's own rounding."""
    pairs = probe["item_alone_equals_item_in_batch"]
    assert len(pairs) == 30
    assert {name: found["difference"] for name, found in pairs.items() if found["difference"]} == {}
    assert all(found["from the neighbour"] > 0.1 for found in pairs.values())
    assert set(probe["select_in_custom_sampler"].values()) == {0.0}


# The nodes themselves.


def test_our_samplers_give_what_cores_give_with_the_same_noise(probe):
    assert max(probe["same_as_core_samplers"].values()) < 2e-6


def test_one_forward_a_step_at_cfg_1_with_progress_as_in_core(probe):
    assert probe["forwards_and_progress"]["1.0"] == {"rows": [1] * 4, "callbacks": [0, 1, 2, 3], "bar": [4]}
    assert probe["forwards_and_progress"]["2.0"]["rows"] == [2] * 4, "both prompts of an image together"


@pytest.mark.case("sampling 7", "inpainting on FLUX.2 klein takes any denoise and keeps the rest bit for bit")
def test_inpainting_keeps_the_rest_exactly(probe):
    for name, change in probe["inpainting"].items():
        assert change["kept"] == 0.0 and change["masked"] > 0.1, name


def test_healthy_set_ups_get_no_finding(probe):
    for name, case in probe["doctor_on_the_host"].items():
        assert (case["faults"] == []) == name.startswith("healthy"), name


def test_turbo_preset_on_the_hosts_models(probe):
    found = probe["presets_on_the_host"]
    assert found["flux-schnell auto"]["sigmas"] == [1, 0.75, 0.5, 0.25, 0]
    assert found["flux2 auto"]["sigmas"] == pytest.approx([1, 0.9674, 0.9081, 0.7672, 0], abs=1e-3)
    assert found["sd15 lcm-lora"]["sigmas"][0] == pytest.approx(14.6146, abs=1e-3)
    assert all("Source" in case["text"] and case["cfg"] == 1 for case in found.values())


def test_auto_reads_what_a_lora_or_checkpoint_says_of_itself(probe):
    found = probe["metadata"]
    assert found["lora"] == found["checkpoint"] == pytest.approx([1, 0.6, 0.3, 0])
    assert found["neither"] == pytest.approx([1, 0.9, 0.75, 0.5, 0])


MESSAGES = {
    "other family": "is for flux-schnell, but the model is sd3; presets for it: .*sd3.5-large-turbo",
    "steps": "made for 1-4 steps, not 9",
    "denoise 0": "denoise must be above 0",
    "empty sigmas": "needs at least one level",
    "unsorted sigmas": "must fall",
    "unfinished sigmas": "must end in 0",
    "video": "is for qwen-image, but the model is wan",
    "video latent on an image model": "is a video .* use the empty latent node of its family",
    "other latent": "encode the image with this model's own VAE",
    "no negative": "connect one, or set cfg to 1",
    "sd15 auto": "choose the one your file was made with: lcm-lora",
}


@pytest.mark.parametrize("mistake, message", MESSAGES.items())
def test_mistakes_are_explained(probe, mistake, message):
    assert re.search(message, probe["mistakes"][mistake]), probe["mistakes"][mistake]


# In the server.

IDS = ["Preset", "Sampler", "SamplerSelect", "SeedVariety", "Doctor", "LoadMiniModel", "MiniConditioning"]


def test_the_server_knows_every_node_with_category_and_tooltips(host):
    nodes = host.object_info()
    for name in IDS:
        node = nodes[f"TurboDistill{name}"]
        assert node["category"] == "turbo distill" and node["description"]
        inputs = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
        assert all(len(entry) > 1 and entry[1].get("tooltip") for entry in inputs.values()), name


def test_every_node_has_a_help_page(host):
    for name in IDS:
        page = host.get(f"/extensions/turbo-distill/docs/TurboDistill{name}.md")
        assert len(page) > 200


def test_the_server_loads_the_pack(host):
    line = re.search(r"[\d.]+ seconds(.*): \S*turbo-distill", host.log())
    assert line and "FAILED" not in line.group(1)


def test_the_pack_loads_in_a_fifth_of_the_hosts_time_without_diffusers_or_transformers(tmp_path):
    """The modules and the CPU time that the pack, with the schemas of its nodes, adds to a host that has started."""
    script = f"""
import sys, time
sys.path.insert(0, {str(HERE)!r})
from launch import ImportHooks, load_pack
sys.meta_path.insert(0, ImportHooks())
sys.path[0], sys.argv[1:] = {str(COMFYUI)!r}, ["--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import nodes, comfy_api.latest
before, start = set(sys.modules), time.process_time()
load_pack("turbo_pack")
for node in sys.modules["turbo_pack.nodes"].NODES:
    node.GET_SCHEMA()
print("RESULT", time.process_time() - start, start, *sorted(set(sys.modules) - before))
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([PYTHON, "-c", script], env=environment, capture_output=True, text=True, cwd=tmp_path)
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT")), None)
    assert line, done.stderr[-3000:]
    seconds, host_seconds, *modules = line.split()[1:]
    print(f"{seconds} s of CPU time after the host's {host_seconds}, {len(modules)} modules")
    assert float(seconds) < 0.2 * float(host_seconds), "in one process, so a busy machine slows both"
    assert not [name for name in modules if name.split(".")[0] in ("diffusers", "transformers", "accelerate", "peft")]
    assert "turbo_pack.nodes.sampling" in modules

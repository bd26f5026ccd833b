"""Training Settings in the real server: it reaches all trainers and changes only what it should."""

from __future__ import annotations

import pytest
import torch
from graphs import mini_training, node
from run_files import assert_same_files, fails, log_of, lora_of, run_folder
from safetensors.torch import load_file

from distill_core.lora_files import read_lora


def training(name: str, method: str = "LADD", settings: dict | None = None, **trainer) -> dict:
    """A trainer with Training Settings; settings None: not connected."""
    if settings is None:
        return mini_training(name, method=method, **trainer)
    graph = mini_training(name, method=method, settings=["settings", 0], **trainer)
    return graph | {"settings": node("TurboDistillTrainingSettings", **settings)}


SEVERAL = dict(
    optimizer="adafactor",
    discriminator_optimizer="adamw",
    lr_schedule="cosine",
    warmup_steps=2,
    decay_from=0.0,
    betas="0.5, 0.9",
    caption_dropout=0.3,
    dropout=0.1,
    alpha=2.0,
    snapshot_every=2,
    validation=0.25,
    validation_every=2,
    log_every=1,
)


@pytest.mark.parametrize("method", ["LADD", "ADD", "Diffusion2GAN", "DMD2"])
def test_every_trainer_takes_the_settings(host, method):
    name = f"several_{method}"
    before = len(host.log())
    host.run(training(name, method, SEVERAL, student_lr=0.05), 300)
    _, said = read_lora(lora_of(host, name))
    train = said["config"]["train"]
    assert train["optimizer"] == "adafactor" and train["betas"] == [0.5, 0.9] and train["caption_dropout"] == 0.3
    assert said["config"]["student"]["lora"] == {"alpha": 2.0, "dropout": 0.1}
    rates = [entry["rate"] for entry in log_of(host, name)]
    assert rates == pytest.approx([0.5, 0.8535, 0.5, 0.1464], abs=1e-3)  # warm-up, then a cosine over four steps
    assert ["validation" in entry for entry in log_of(host, name)] == [True, True, False, True]
    snapshots = lora_of(host, name).parent / "snapshots"
    assert [path.name for path in snapshots.glob(f"{name}_*")] == [f"{name}_step000002.safetensors"]
    assert f"turbo_distill/snapshots/{name}_step000002.safetensors" in loras_listed(host)
    lines = [line for line in host.log()[before:].splitlines() if f"{name}: step" in line]
    assert len(lines) == 4 and all("s/step" in line and "left" in line for line in lines[1:]), lines
    assert all("validation 0." in line for line in lines)
    assert "above 0.01" not in host.log()[before:]


def test_settings_of_all_methods_and_of_the_average(host):
    late = dict(adversarial_from=2, guidance_range="1.0, 3.0", ema_ramp=2.0)
    host.run(training("late", settings=dict(late, log_every=1)), 300)
    config = read_lora(lora_of(host, "late"))[1]["config"]
    assert config["ladd"]["adversarial_from"] == 2 and config["ladd"]["guidance_range"] == [1.0, 3.0]
    assert config["train"]["ema_ramp"] == 2.0
    logs = log_of(host, "late")
    assert ["adversarial" in entry for entry in logs] == [False, False, True, True]
    assert all("pairs" in entry and "discriminator" in entry for entry in logs)


def test_betas_left_empty_are_the_trainers_own(host):
    host.run(training("own_betas", settings=dict(lr_schedule="cosine")), 120)
    assert read_lora(lora_of(host, "own_betas"))[1]["config"]["train"]["betas"] == [0.0, 0.99]


def loras_listed(host) -> list[str]:
    listed = host.get("/object_info/LoraLoaderModelOnly")["LoraLoaderModelOnly"]["input"]["required"]["lora_name"]
    options = listed[0] if isinstance(listed[0], list) else listed[1]["options"]
    return [name.replace("\\", "/") for name in options]


def test_without_a_change_it_changes_nothing(host):
    """Connected with all its defaults, the run is the one without it, to the last bit."""
    host.run(training("plain", steps=3), 300)
    host.run(training("defaults", settings={}, steps=3), 300)
    assert_same_files(lora_of(host, "plain"), lora_of(host, "defaults"))
    assert_same_files(*(run_folder(host, name) / "checkpoint.safetensors" for name in ("plain", "defaults")))


def test_a_student_starts_from_a_lora_of_the_host(host):
    """A tiny rate leaves the student as it began: as the file, whose rank it takes, or fills up to 6."""
    host.run(training("first", steps=3, student_lr=1e-2), 300)
    file = "turbo_distill/first.safetensors"
    assert file in loras_listed(host)
    first = load_file(lora_of(host, "first"))
    for name, rank in (("taken", 0), ("filled", 6)):
        start = dict(start_from=file, caption_dropout=0.0)
        host.run(training(name, settings=start, rank=rank, steps=2, student_lr=1e-9), 300)
        state, said = read_lora(lora_of(host, name))
        assert said["config"]["student"]["rank"] == (rank or 4) and said["config"]["start_from"]
        assert state.keys() == first.keys()
        for key in first:
            if "lora_A" in key:
                up = key.replace("lora_A", "lora_B")
                torch.testing.assert_close(state[up] @ state[key], first[up] @ first[key], rtol=1e-3, atol=1e-5)
    assert any(first[key].abs().max() > 1e-3 for key in first if "lora_B" in key)


MISTAKES = {
    "a package that is missing": (dict(optimizer="prodigy"), {}, 'optimizer "prodigy" needs the package prodigyopt'),
    "a tracker that is missing": (dict(trackers="wandb"), {}, 'tracker "wandb" needs the package'),
    "betas that are no numbers": (dict(betas="0.5; 0.9"), {}, "betas: '0.5; 0.9' is not a list of numbers"),
    "one beta": (dict(betas="0.5"), {}, "betas: 2 numbers are wanted"),
    "dropout without a LoRA": (dict(dropout=0.1), {"train": "all weights"}, "are of a LoRA"),
    "a rank below the file's": (dict(start_from="turbo_distill/first.safetensors"), {"rank": 2}, "has rank 4"),
    "a layer that is not there": ({}, {"lora_targets": "!nothing"}, "no layer's name contains 'nothing'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_before_training_and_the_server_lives(host, mistake):
    settings, trainer, message = MISTAKES[mistake]
    if "start_from" in settings and not lora_of(host, "first").exists():
        host.run(training("first", steps=3, student_lr=1e-2), 300)
    assert message in fails(host, training(mistake.replace(" ", "_").replace("'", ""), settings=settings, **trainer))


@pytest.mark.case("training 17", "a rate above 0.01 is questioned on the node, as is 0, and one below 0.1 for Prodigy")
def test_a_high_rate_is_questioned_on_the_node(host):
    entry = host.run(training("fast", steps=1, student_lr=0.5), 300)
    texts = [text for out in entry["outputs"].values() for text in out.get("text", ())]
    assert any("student_lr is 0.5: above 0.01" in text for text in texts), texts

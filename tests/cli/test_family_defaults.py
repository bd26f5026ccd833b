"""Every family of models from the command line, with defaults alone: levels, guidance and file are right."""

import json

import pytest
import torch
from tiny_pipelines import flux, sd, sd3, sdxl

from distill_core.cli.main import main
from distill_core.data.dataset import LatentDataset
from distill_core.lora_files import read_lora

ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def discrete(build=sd, scheduler: str = "DDIMScheduler", **config):
    import diffusers

    pipeline = build()
    pipeline.scheduler = getattr(diffusers, scheduler)(**TABLE, **config)
    return pipeline


SD = [14.6146, 4.0817, 1.6129, 0.6932]  # timesteps 999, 749, 499 and 249
FAMILIES = {
    "sd eps": (discrete, SD, None),
    "sd v": (lambda: discrete(prediction_type="v_prediction"), SD, None),
    "sd v, zero SNR": (lambda: discrete(**ZERO_SNR), [4096.0, None, None, None], None),
    "sd with LCM's scheduler": (lambda: discrete(scheduler="LCMScheduler"), SD, None),
    "sdxl": (lambda: discrete(sdxl), SD, None),
    "sd3": (sd3, [1.0, 0.9, 0.75, 0.5], None),
    "flux schnell": (lambda: flux(False), [1.0, 0.75, 0.5, 0.25], None),
    "flux dev": (lambda: flux(True), [1.0, 0.9045, 0.7595, 0.5128], 3.5),
}


@pytest.mark.case("methods B4", "the embedded guidance of FLUX.1 dev is a setting, stored and written into the file")
@pytest.mark.case("training 15", "training and sampling agree on the embedded guidance")
@pytest.mark.case("training D3", "with defaults alone the levels begin in pure noise on every family")
@pytest.mark.case(
    "training D4", "FLUX.1 dev is cached, trained and sampled at embedded guidance 3.5 and cfg 1, and says so"
)
@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_of_a_family(family, tmp_path, monkeypatch):
    build, levels, told = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        build().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a red dog\ncat\n")
    config = tmp_path / "config.toml"
    config.write_text(
        f"""
        [model]
        path = '{tmp_path / "model"}'
        [prompts]
        prompts = '{tmp_path / "prompts.txt"}'
        [cache]
        count = 4
        steps = 2
        sizes = [[8, 8]]
        [train]
        steps = 4
        batch_size = 2
        """
    )
    data, run, student = tmp_path / "data", tmp_path / "run", tmp_path / "run" / "student.safetensors"
    assert main(["cache", str(config), "--out", str(data)]) == 0
    assert main(["train", str(config), "--data", str(data), "--out", str(run), "--no-preflight"]) == 0
    _, description = read_lora(student)
    found = description["sigmas"]
    assert [b or a for a, b in zip(found, levels, strict=True)] == pytest.approx(found, rel=1e-3)
    dataset = LatentDataset(data)
    manifest, cond = dataset.manifest(), dataset.batch(0, 2, 0).cond
    assert manifest["guidance"] == (5.0 if told is None else 1.0)
    assert manifest.get("embedded_guidance") == description.get("embedded_guidance") == told
    assert (cond.guidance is None) == (dataset.uncond().guidance is None) == (told is None)
    heard = []
    if told:
        from distill_core.models.backends import diffusers as backends

        assert cond.guidance.tolist() == [told, told]
        forward = backends.DiffusersBackend.forward
        note = lambda self, x, t, cond: heard.append(cond.guidance[0].item()) or forward(self, x, t, cond)  # noqa: E731
        monkeypatch.setattr(backends.DiffusersBackend, "forward", note)
        config.write_text(config.read_text().replace("[cache]", "[cache]\nembedded_guidance = 2.0"))
    sample = ["sample", str(config), "--lora", str(student), "--count", "2", "--out", str(tmp_path / "images")]
    assert main(sample) == 0
    assert len(list((tmp_path / "images").glob("*.png"))) == 2
    assert len(json.loads((tmp_path / "images" / "samples.json").read_text())) == 2
    assert set(heard) <= {told}  # the student's own, whatever the settings say

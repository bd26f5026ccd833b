"""The command ``plan``, on the mini model and on a pipeline's folder of which only the configs are read."""

import json

import pytest
from networks import build_network

from distill_core.cli.main import main


def test_the_command_says_what_a_run_needs(capsys):
    assert main(["plan", "configs/mini_ladd.toml", "--cpu"]) == 0
    said = capsys.readouterr().out
    assert "a step needs" in said and "the model's weights" in said and "it would need less with" in said
    assert main(["plan", "configs/mini_ladd.toml", "--free", "4"]) == 0
    assert "it fits into 4 GiB" in capsys.readouterr().out
    assert main(["plan", "configs/mini_ladd.toml", "--free", "1"]) == 0
    assert "this run needs about 1.3 GiB and 1.0 GiB are free: gradient_checkpointing on" in capsys.readouterr().out


@pytest.mark.parametrize(("method", "batch"), [("ladd", 2), ("diffusion2gan", 2), ("dmd2", 2)])
def test_no_weights_are_read(tmp_path, capsys, method, batch):
    """The folder has none."""
    network = build_network("unet")
    for name, content in {
        "model_index.json": {"_class_name": "StableDiffusionPipeline", "vae": ["diffusers", "AutoencoderKL"]},
        "unet/config.json": {**network.config, "_class_name": "UNet2DConditionModel"},
        "vae/config.json": {"latent_channels": 4},
        "scheduler/scheduler_config.json": {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear"},
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    config = tmp_path / "run.toml"
    config.write_text(
        f'method = "{method}"\n[model]\npath = "{tmp_path}"\ndtype = "bfloat16"\nlora_rank = 4\n'
        f"[cache]\nsizes = [[16, 16]]\n[train]\nbatch_size = {batch}\n"
    )
    assert main(["plan", str(config)]) == 0
    assert "the student's forward" in capsys.readouterr().out

import json

import pytest
import torch
from networks import build_metric, build_trunk_state
from safetensors.torch import load_file, save_file
from test_perceptual_calibration import image_folder

from distill_core.cli.main import main
from distill_core.diffusion.noise import ItemNoise
from distill_core.files import load_tensors
from distill_core.perceptual import load_metric
from distill_core.perceptual.pairs import KINDS
from distill_core.perceptual.weights import LatentSpace, save_weights


@pytest.fixture
def weights(tmp_path):
    state, heads = build_trunk_state(4)
    save_weights(tmp_path / "metric.safetensors", state, heads, LatentSpace(4, 0.5, 1.0), {})
    return tmp_path / "metric.safetensors"


@pytest.fixture
def latents(tmp_path):
    g = torch.Generator().manual_seed(0)
    pair = [torch.randn(2, 4, 8, 10, generator=g) for _ in range(2)]
    save_file({"latents": pair[0]}, tmp_path / "a.safetensors")
    save_file({"latent_tensor": pair[1]}, tmp_path / "b.latent")
    return pair


@pytest.mark.parametrize("command", ["train", "compare", "convert"])
def test_every_subcommand_explains_itself(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["perceptual", command, "--help"])
    assert len(capsys.readouterr().out) > 400


def test_compare_prints_the_metrics_numbers_and_dumps_a_draw(weights, latents, tmp_path, capsys):
    command = ["perceptual", "compare", str(tmp_path / "a.safetensors"), str(tmp_path / "b.latent")]
    options = ["--weights", str(weights), "--draws", "2", "--raw", "--dump", str(tmp_path / "dump.safetensors")]
    assert main([*command, *options]) == 0
    a, b = ((x - 1.0) * 0.5 for x in latents)
    expected = build_metric(draws=2).terms(a, b, ItemNoise(0, range(2)))
    lines = capsys.readouterr().out.splitlines()
    for i in range(2):
        assert lines[i].split() == [
            str(i),
            "perceptual",
            f"{expected['perceptual'][i]:.6f}",
            "l1",
            f"{expected['l1'][i]:.6f}",
        ]
    dumped = load_file(tmp_path / "dump.safetensors")
    assert dumped["distance"].dtype == torch.float64 and dumped["tap4.prediction"].shape[1] == 12
    torch.testing.assert_close(dumped["prediction"], a.double())


def test_compare_names_a_file_without_latents(weights, tmp_path, capsys):
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    assert main(["perceptual", "compare", *[str(tmp_path / "x.safetensors")] * 2, "--weights", str(weights)]) == 2
    assert "no tensor named latents" in capsys.readouterr().err


def test_train_makes_a_metric_and_a_report_and_goes_on(tmp_path, capsys):
    out = tmp_path / "out"
    command = [
        "perceptual",
        "train",
        "--autoencoder",
        "mini",
        "--images",
        str(image_folder(tmp_path / "images")),
        "--out",
        str(out),
        "--size",
        "32",
        "--pairs",
        "40",
        "--held-out",
        "60",
        "--steps",
        "3",
        "--batch",
        "4",
        "--widths",
        "4",
        "4",
        "4",
        "4",
        "4",
    ]
    assert main(command) == 0
    report = json.loads((out / "training.json").read_text())
    assert report["pairs"] == 40 and "--autoencoder mini" in report["command"] and report["commit"]
    assert str(tmp_path) not in (out / "training.json").read_text()
    assert list(report["spearman"]) == ["LatentLPIPS", "E-LatentLPIPS bg, 4 draws", "latent MSE", "LPL"]
    assert set(report["spearman"]["LPL"]) == {"all", *KINDS[:3]}
    made = load_metric(out / "metric.safetensors")
    assert made.channels == 16 and made.scale == 1.5305
    first, _ = load_tensors(out / "metric.safetensors")
    assert main(command) == 0, "finished: it only judges again"
    again, _ = load_tensors(out / "metric.safetensors")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert main([*command, "--seed", "1"]) == 2
    assert "pairs of another run" in capsys.readouterr().err

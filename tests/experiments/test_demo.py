import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from distill_core.diffusion.process import FlowProcess
from distill_core.digests import fingerprint
from distill_core.experiments import demo
from distill_core.lora_files import read_lora
from distill_core.models import mini
from distill_core.models.denoiser import Denoiser

SMALL = demo.DemoConfig()
SMALL = replace(
    SMALL,
    rank=2,
    head_width=8,
    images=20,
    cache=replace(SMALL.cache, count=16, steps=3, shard_size=8, batch_size=8),
    mixed=replace(SMALL.mixed, train=replace(SMALL.mixed.train, steps=2, batch_size=4)),
    ladd_only=replace(SMALL.ladd_only, train=replace(SMALL.ladd_only.train, steps=2, batch_size=4)),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The demo's folder and the report it returned."""
    out = tmp_path_factory.mktemp("demo")
    return out, demo.demo(out, seed=3, config=SMALL)


def test_the_report_has_what_was_promised(finished):
    out, report = finished
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report))
    assert {"teacher", "student", "ladd_only", "floor", "config", "seconds", "seed", "commit"} <= report.keys()
    assert report["teacher"].keys() == {"1", "2", "4", "25"}
    assert report["student"].keys() == report["ladd_only"].keys() == {"1", "2", "4"}
    scores = [*report["teacher"].values(), *report["student"].values(), *report["ladd_only"].values()]
    assert all({"fd", "fd_pixels", "accuracy", "accuracy_pixels"} <= score.keys() for score in scores)
    assert all(0 <= score["accuracy"] <= 1 and score["fd"] > 0 for score in scores)
    for model in ("teacher", "student", "ladd_only"):
        for steps, score in report[model].items():
            assert {name: f["value"] for name, f in report["intervals"][model][steps].items()} == score
    apart = report["differences"]["student"]["4"]["fd"]
    assert apart["low"] < apart["value"] < apart["high"]
    assert apart["value"] == pytest.approx(report["student"]["4"]["fd"] - report["teacher"]["25"]["fd"], abs=2e-4)
    assert report["seed"] == 3 and report["config"]["mixed"]["train"]["seed"] == 3 and report["seconds"] > 0
    assert demo.DemoConfig().images >= 1000


def test_both_recipes_see_the_same_number_of_items():
    mixed, ladd_only = demo.DemoConfig().mixed.train, demo.DemoConfig().ladd_only.train
    assert mixed.steps * mixed.batch_size == ladd_only.steps * ladd_only.batch_size


def test_the_table_shows_every_score(finished):
    table = demo.table(finished[1])
    for row in ("teacher 25", "student 4", "ladd_only 1", "real (floor)"):
        assert row in table
    apart = finished[1]["differences"]["student"]["4"]["fd"]
    assert f"{apart['value']:.2f} [{apart['low']:.2f}, {apart['high']:.2f}]" in table


def test_the_pictures_are_pictures(finished):
    for name in ("samples.png", "curves.png"):
        with Image.open(finished[0] / name) as image:
            assert image.format == "PNG" and min(image.size) > 200
            image.load()
            assert len(set(image.convert("L").resize((64, 64)).tobytes())) > 10  # not blank


def test_the_student_file_is_the_student(finished):
    state, description = read_lora(finished[0] / "student.safetensors")
    assert description["sampler"] == "ancestral" and description["cfg"] == 1.0 and description["prediction"] == "flow"
    assert description["sigmas"] == list(demo.LEVELS)
    backend = demo.mini_backend()
    assert description["base"] == fingerprint(backend.network)
    path = backend.new_lora(2)
    path.load_export(state)
    classes, _ = demo.mini_conditioning()
    x, sigma = torch.randn(2, *mini.LATENT_SHAPE), torch.ones(2)
    ours = Denoiser(backend, path)(x, sigma, classes[:2])
    backend.network.load_lora_adapter(state, prefix="transformer")
    torch.testing.assert_close(Denoiser(backend)(x, sigma, classes[:2]), ours, atol=1e-5, rtol=1e-5)


def test_the_same_seed_gives_the_same_scores(finished, tmp_path):
    _, report = finished
    again = demo.demo(tmp_path, seed=3, config=SMALL)
    for name in ("teacher", "student", "ladd_only"):
        assert again[name] == report[name]


def test_noises_and_classes_do_not_depend_on_the_model_or_the_count():
    def echo(x, sigma, cond):
        return x + cond.pooled[:, :1].view(-1, 1, 1, 1)

    echo.process = FlowProcess()
    classes, _ = demo.mini_conditioning()
    many = demo.draw_samples(echo, 1, "euler", 5, 260, classes)
    few = demo.draw_samples(echo, 1, "renoise", 5, 12, classes)
    assert torch.equal(many[:12], few) and not torch.equal(many[250:], many[:10])

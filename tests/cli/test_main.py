import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image

from distill_core.cli.main import main
from distill_core.cli.sample import load_student
from distill_core.cli.train import perceptual_distance
from distill_core.data.dataset import LatentDataset
from distill_core.diffusion.noise import ItemNoise
from distill_core.digests import fingerprint
from distill_core.files import load_tensors, save_tensors
from distill_core.lora_files import read_lora, save_lora
from distill_core.models import mini
from distill_core.models.denoiser import Denoiser
from distill_core.training.config import describe_keys, load_config
from distill_core.training.loop import copy_into

CONFIG = """
[model]
lora_rank = 4
[cache]
count = 12
steps = 3
guidance = 1.5
sizes = [[8, 8]]
state_sigmas = [1.0, 0.5]
batch_size = 6
[train]
steps = 3
batch_size = 4
student_lr = 3e-4
warmup_steps = 1
checkpoint_every = 1000
[ladd]
terms = { adversarial = 1.0, pairs = 1.0 }
warmup_steps = 0
[discriminator]
width = 16
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A config, its dataset and a student trained from it, made by the commands."""
    root = tmp_path_factory.mktemp("main")
    (root / "c.toml").write_text(CONFIG)
    assert main(["cache", str(root / "c.toml"), "--out", str(root / "data")]) == 0
    assert main(["train", str(root / "c.toml"), "--data", str(root / "data"), "--out", str(root / "run")]) == 0
    return root


def arguments(command: str, folder: Path, *more) -> list[str]:
    return [command, str(folder / "c.toml"), *map(str, more)]


def test_cache_writes_the_dataset_and_goes_on(folder):
    dataset = LatentDataset(folder / "data")
    assert len(dataset) == 12 and dataset.state_sigmas == (1.0, 0.5) and dataset.shapes == [mini.LATENT_SHAPE]
    before = (folder / "data" / "shard-00000.safetensors").stat().st_mtime_ns
    assert main(arguments("cache", folder, "--out", folder / "data")) == 0
    assert (folder / "data" / "shard-00000.safetensors").stat().st_mtime_ns == before


def test_cache_refuses_a_folder_of_other_prompts(folder, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("bag\n")
    text = CONFIG + f"[prompts]\nprompts = {json.dumps(str(tmp_path / 'p.txt'))}\n"
    (tmp_path / "c.toml").write_text(text)
    assert main(arguments("cache", tmp_path, "--out", folder / "data")) == 2
    assert (
        "other settings ([prompts] prompts or negative is another one now); choose another --out"
        in capsys.readouterr().err
    )


def test_train_writes_student_log_curves_and_checkpoint(folder):
    names = {path.name for path in (folder / "run").glob("[!.]*")}
    files = {"student.safetensors", "checkpoint.safetensors", "log.jsonl", "report.json", "curves.png"}
    assert names == files | {"run.html", "samples"}
    logs = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in logs] == [1, 2, 3] and {"adversarial", "pairs", "accuracy"} <= logs[0].keys()


@pytest.mark.case("host console", "headless, too: samples over time and one page that shows the whole run")
def test_train_writes_samples_over_time_and_a_page(folder):
    """The last step's samples only, of the dataset's own first prompts."""
    (path,) = (folder / "run" / "samples").iterdir()
    with Image.open(path) as picture:
        assert path.name == "step000003.jpg" and picture.height == 138
    html = (folder / "run" / "run.html").read_text()
    assert html.count("data:image/jpeg") == 1 and "step 3 of 3" in html


def test_the_student_says_how_to_sample_it(folder):
    _, description = read_lora(folder / "run" / "student.safetensors")
    assert description["sigmas"] == [1.0, 0.75, 0.5, 0.25] and description["sampler"] == "renoise"
    assert description["cfg"] == 1.0 and description["prediction"] == "flow"
    assert description["method"] == "LADD + pairs" and "ladd" in description["config"]
    assert description["base"] == fingerprint(mini.load_transformer()) and description["family"] == "sd3"
    assert description["steps"] == 3 and description["config"]["train"]["batch_size"] == 4


def test_the_student_is_the_average_and_the_same_in_diffusers(folder):
    """Our reader and ``load_lora_weights`` of a pipeline give the same network."""
    from diffusers import StableDiffusion3Pipeline

    file = folder / "run" / "student.safetensors"
    _, student, description = load_student(load_config(folder / "c.toml"), file)
    checkpoint, _ = load_tensors(folder / "run" / "checkpoint.safetensors")
    average = student.backend.new_lora(4)
    copy_into(dict(average.named_parameters()), {n[4:]: v for n, v in checkpoint.items() if n.startswith("ema.")})
    expected, exported = average.export(), student.lora.export()
    assert [name for name, value in expected.items() if not torch.equal(exported[name], value)] == []

    absent = ("scheduler", "vae", "text_encoder", "tokenizer")
    absent += ("text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    pipeline = StableDiffusion3Pipeline(transformer=mini.load_transformer(), **dict.fromkeys(absent))
    pipeline.load_lora_weights(file)
    x = torch.randn(4, *mini.LATENT_SHAPE, generator=torch.Generator().manual_seed(0))
    sigma, cond = torch.tensor(description["sigmas"]), mini.mini_conditioning()[0][:4]
    theirs = Denoiser(type(student.backend)(pipeline.transformer, student.process))(x, sigma, cond)
    torch.testing.assert_close(theirs, student(x, sigma, cond), atol=1e-5, rtol=1e-5)
    assert (theirs - Denoiser(student.backend)(x, sigma, cond)).abs().max() > 1e-4


OTHERS = {
    "add": "[add]\nr1 = 1e-3\n[vision]\nsize = 32",
    "diffusion2gan": '[diffusion2gan]\ncritic = "lora"\ncritic_rank = 4',
}


@pytest.mark.parametrize("method, rank", [("add", 0), ("diffusion2gan", 4)])
def test_the_other_methods_train_and_are_sampled(folder, tmp_path, method, rank):
    """ADD into a whole network, Diffusion2GAN into a LoRA; both files say how they want to be sampled."""
    model = f"lora_rank = {rank}" + ('\nperceptual = "mini"' if method == "diffusion2gan" else "")
    text = CONFIG.replace("lora_rank = 4", model) + f"{OTHERS[method]}\n"
    (tmp_path / "c.toml").write_text(f'method = "{method}"\n{text}')
    out = tmp_path / "run"
    assert main(arguments("train", tmp_path, "--data", folder / "data", "--out", out)) == 0
    _, description = read_lora(out / "student.safetensors")
    assert description["method"] == {"add": "ADD", "diffusion2gan": "Diffusion2GAN"}[method]
    assert method in description["config"] and description["weights"] == ("lora" if rank else "differences")
    assert description["sigmas"] == ([1.0, 0.75, 0.5, 0.25] if method == "add" else [1.0])
    _, student, _ = load_student(load_config(tmp_path / "c.toml"), out / "student.safetensors")
    x = torch.randn(2, *mini.LATENT_SHAPE, generator=torch.Generator().manual_seed(0))
    cond = mini.mini_conditioning()[0][:2]
    with torch.no_grad():
        change = student(x, torch.ones(2), cond) - Denoiser(mini.mini_backend())(x, torch.ones(2), cond)
    assert 0 < change.abs().max() < 1
    log = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert {"discriminator", "accuracy", "distillation" if method == "add" else "pairs"} <= log.keys()
    lora = ["--lora", out / "student.safetensors", "--count", 2]
    assert main(arguments("sample", tmp_path, "--out", tmp_path / "images", *lora)) == 0
    assert len(list((tmp_path / "images").glob("*.png"))) == 2


def test_a_perceptual_loss_must_fit_the_latents():
    assert perceptual_distance("", 16, "cpu") is None and perceptual_distance("mini", 16, "cpu").channels == 16
    with pytest.raises(ValueError, match="16 channels, not 4"):
        perceptual_distance("mini", 4, "cpu")


def test_diffusion2gan_refuses_pairs_without_their_noise(tmp_path, capsys):
    text = CONFIG.replace("state_sigmas = [1.0, 0.5]", "state_sigmas = [0.5]")
    (tmp_path / "c.toml").write_text('method = "diffusion2gan"\n' + text)
    assert main(arguments("cache", tmp_path, "--out", tmp_path / "data")) == 0
    assert main(arguments("train", tmp_path, "--data", tmp_path / "data", "--out", tmp_path / "run")) == 2
    assert "does not store the noise" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_sample_draws_pictures_of_student_and_teacher(folder, tmp_path):
    student = ["--lora", folder / "run" / "student.safetensors"]
    for name, lora in (("student", student), ("teacher", [])):
        out = tmp_path / name
        assert main(arguments("sample", folder, *lora, "--steps", 2, "--count", 3, "--seed", 4, "--out", out)) == 0
        record = json.loads((out / "samples.json").read_text())
        assert [entry["prompt"] for entry in record] == list(mini.CLASS_NAMES[:3])
        assert all(Image.open(out / entry["file"]).size == (64, 64) for entry in record)
    alone = tmp_path / "alone"
    assert main(arguments("sample", folder, *student, "--steps", 2, "--count", 1, "--seed", 4, "--out", alone)) == 0
    pixels = [list(Image.open(path / "00000.png").getdata()) for path in (alone, tmp_path / "student")]
    assert max(abs(a - b) for p, q in zip(*pixels, strict=True) for a, b in zip(p, q, strict=True)) <= 1


@pytest.fixture(scope="module")
def evaluated(folder, tmp_path_factory) -> tuple[dict, str]:
    """The report of `evaluate` against the teacher, and what it printed."""
    out, printed = tmp_path_factory.mktemp("evaluation"), io.StringIO()
    lora = folder / "run" / "student.safetensors"
    with contextlib.redirect_stdout(printed):
        assert main(arguments("evaluate", folder, "--lora", lora, "--out", out, "--count", 20)) == 0
    return json.loads((out / "evaluation.json").read_text()), printed.getvalue()


def test_evaluate_sets_the_student_beside_the_teacher(evaluated):
    report, printed = evaluated
    assert list(report["figures"]) == ["teacher, 3 steps", *(f"student, {n} step{'s' * (n > 1)}" for n in (1, 2, 3, 4))]
    assert report["reference"] == {"items": 20, "from": "the teacher, other noises"} and report["independent"]
    one, teacher = report["figures"]["student, 1 step"], report["figures"]["teacher, 3 steps"]
    spaces = {f"{name}{suffix}" for name in ("fd", "accuracy", "diversity") for suffix in ("", "_pixels")}
    imagenet = {"fd_imagenet", "density_imagenet", "coverage_imagenet"}
    assert one.keys() == spaces | imagenet | {"detail", "edges", "kurtosis"} | {
        *("drift", "drift_pixels", "coherence", "detail_ratio", "detail_error")
    }
    assert teacher.keys() == spaces | imagenet | {"detail", "edges", "kurtosis"}
    for name, apart in report["differences"]["student, 1 step"].items():
        assert apart["value"] == pytest.approx(one[name]["value"] - teacher[name]["value"], abs=2e-4)
        fd = one["fd"]
        assert fd["low"] < fd["value"] < fd["high"]
        assert f"{fd['value']:.3f} [{fd['low']:.3f}, {fd['high']:.3f}]" in printed
        assert f"{apart['value']:+.3f} [{apart['low']:+.3f}, {apart['high']:+.3f}]" in printed


@pytest.mark.case("methods B2", "evaluate draws from a stream of its own; no training has seen a noise of it")
def test_no_noise_of_an_evaluation_was_trained_on(tmp_path, monkeypatch):
    """Every row of noise that cache and train draw, against every row that evaluate draws with the same seed."""
    drawn: set[bytes] = set()
    normal = ItemNoise.normal

    def watch(self, *shape):
        rows = normal(self, *shape)
        drawn.update(row.flatten()[:8].numpy().tobytes() for row in rows)
        return rows

    monkeypatch.setattr(ItemNoise, "normal", watch)
    (tmp_path / "c.toml").write_text(CONFIG)
    assert main(arguments("cache", tmp_path, "--out", tmp_path / "data")) == 0
    assert main(arguments("train", tmp_path, "--data", tmp_path / "data", "--out", tmp_path / "run")) == 0
    trained, drawn = drawn, set()
    assert len(trained) > 12
    lora = tmp_path / "run" / "student.safetensors"
    assert main(arguments("evaluate", tmp_path, "--lora", lora, "--out", tmp_path / "e", "--count", 12)) == 0
    # The reference's first noises, the student's, and its fresh ones at up to three levels in between.
    assert len(drawn) == 12 * (1 + 1 + 3) and not drawn & trained


@pytest.mark.case("methods B2", "latents that the student was trained on are refused as the reference")
def test_what_was_trained_on_is_no_reference(folder, tmp_path, capsys):
    lora = folder / "run" / "student.safetensors"
    out = ["--lora", lora, "--out", tmp_path, "--count", 12]
    assert main(arguments("evaluate", folder, *out, "--data", folder / "data")) == 2
    assert "is what this student was trained on" in one_line(capsys)
    mixed = f"[data]\nmix = {{ '{folder / 'data'}' = 1, '{tmp_path / 'data'}' = 1 }}\n"
    (tmp_path / "c.toml").write_text(CONFIG.replace("count = 12", "count = 12\nseed = 8"))
    assert main(arguments("cache", tmp_path, "--out", tmp_path / "data")) == 0
    assert main(arguments("evaluate", folder, *out, "--data", tmp_path / "data")) == 0
    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert report["reference"] == {"items": 12, "from": str(tmp_path / "data")}
    (tmp_path / "c.toml").write_text(CONFIG + mixed)
    assert main(arguments("train", tmp_path, "--out", tmp_path / "run")) == 0
    out[1] = tmp_path / "run" / "student.safetensors"
    for data in (folder / "data", tmp_path / "data"):
        capsys.readouterr()
        assert main(arguments("evaluate", folder, *out, "--data", data)) == 2
        assert "is what this student was trained on" in one_line(capsys)


def test_a_student_is_not_scored_by_its_own_discriminator(folder, tmp_path, capsys):
    """ADD may train on the very network that `evaluate` scores with; its file says so."""
    state, description = read_lora(folder / "run" / "student.safetensors")
    config = {**description["config"], "add": {}, "vision": {"network": "efficientnet"}}
    save_lora(tmp_path / "s.safetensors", state, {**description, "config": config})
    out = ["--lora", tmp_path / "s.safetensors", "--out", tmp_path, "--count", 12]
    assert main(arguments("evaluate", folder, *out)) == 0
    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert not report["independent"] and not [n for n in report["figures"]["student, 1 step"] if "imagenet" in n]
    assert "no figure is taken from it" in capsys.readouterr().err


def test_evaluate_of_prompts_that_were_not_trained_on(folder, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("bag\nsandal\n")
    lora = folder / "run" / "student.safetensors"
    out = ["--lora", lora, "--out", tmp_path, "--prompts", tmp_path / "p.txt"]
    assert main(arguments("evaluate", folder, *out, "--count", 6)) == 0
    assert main(arguments("evaluate", folder, *out, "--count", 1)) == 2
    assert "--count must be at least 2" in one_line(capsys)


# Mistakes


def one_line(capsys) -> str:
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    return error[0]


@pytest.mark.parametrize(
    "change, message",
    [
        ("[train]\nstep = 3", r"\[train\]: unknown key"),
        ('[model]\npath = "/none/such"', "is not a folder"),
        ('[model]\nlora_targets = ["nothing"]', "LoRA targets"),
        ("[train]\nbatch_size = 1", "hinge with a batch of 1"),
        ('method = "lcm"\n', "method must be one of"),
        (
            "[ladd]\nterms = { pairs = 1.0 }\nstudent_sigmas = [0.9]\n"
            "probabilities = [1.0]\nwarmup_probabilities = [1.0]",
            "both trained and stored",
        ),
    ],
)
def test_a_mistake_ends_with_one_line_and_status_2(folder, tmp_path, capsys, change, message):
    (tmp_path / "c.toml").write_text(change)
    assert main(arguments("train", tmp_path, "--data", folder / "data", "--out", tmp_path / "run")) == 2
    assert re.search(message, one_line(capsys))
    assert not list(tmp_path.glob("run/*.safetensors"))


@pytest.mark.case("training L2", "a student used above another model, or without the LoRA below it, says so and runs")
def test_a_student_of_another_base_or_above_a_lora_is_sampled_with_a_warning(folder, tmp_path, capsys):
    state, description = read_lora(folder / "run" / "student.safetensors")
    below = [{"digest": "feed", "strength": 0.8, "layers": 3, "name": "my style"}]
    save_lora(tmp_path / "s.safetensors", state, {**description, "base": "0123", "below": below})
    command = arguments("sample", folder, "--lora", tmp_path / "s.safetensors", "--count", 1, "--out", tmp_path)
    assert main(command) == 0
    said = capsys.readouterr().err
    assert "warning: this student was made above another model (its base is 0123" in said
    assert "warning: this student was made above the LoRA my style at strength 0.8, which the model does not" in said


def test_a_student_of_another_shape_is_refused(folder, tmp_path, capsys):
    state, description = read_lora(folder / "run" / "student.safetensors")
    save_lora(tmp_path / "s.safetensors", {name: value[:, :3] for name, value in state.items()}, description)
    assert main(arguments("sample", folder, "--lora", tmp_path / "s.safetensors", "--out", tmp_path)) == 2
    assert "does not fit the model" in one_line(capsys)


@pytest.mark.case("training D7", "headless, too, nobody trains on the pairs of another model")
@pytest.mark.parametrize("method", ["ladd", "add", "diffusion2gan", "dmd2"])
def test_pairs_of_another_model_are_refused_by_every_method(folder, tmp_path, capsys, method):
    shutil.copytree(folder / "data", tmp_path / "data")
    manifest = json.loads((tmp_path / "data" / "dataset.json").read_text())
    (tmp_path / "data" / "dataset.json").write_text(json.dumps({**manifest, "base": "0123"}))
    terms = "terms = { adversarial = 1.0, pairs = 1.0 }"
    (tmp_path / "c.toml").write_text(f'method = "{method}"\n[{method}]\n{terms}\n')
    command = arguments("train", tmp_path, "--data", tmp_path / "data", "--out", tmp_path / "run")
    assert main(command) == 2
    said = one_line(capsys)
    assert "are paths of another model (its base is 0123, this one is" in said and "make them again" in said


def test_more_steps_than_trained_are_refused(folder, tmp_path, capsys):
    lora = folder / "run" / "student.safetensors"
    assert main(arguments("sample", folder, "--lora", lora, "--steps", 5, "--out", tmp_path)) == 2
    assert "trained at 4 noise levels, so steps must be 1-4" in one_line(capsys)


def test_missing_arguments_and_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train"])
    assert stop.value.code == 2
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and describe_keys() in text
    tomllib.loads(describe_keys())


def test_a_command_gives_the_signals_back(folder):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    main(arguments("cache", folder, "--out", folder / "data"))
    main(arguments("train", folder, "--data", folder / "data", "--out", folder / "run"))
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


# One output folder is one run


@pytest.mark.parametrize(
    "method, section, key, value, named",
    [
        ("add", "vision", "size", 64, "[vision] size is 64 now, was 32"),
        ("ladd", "discriminator", "width", 24, "[discriminator] width is 24 now, was"),
        ("add", "model", "perceptual", "mini", "[model] perceptual is another one now"),
        ("add", "add", "r1", 1e-3, "[add] r1 is 0.001 now, was"),
        ("ladd", "train", "student_lr", 1e-5, "[train] student_lr is 1e-05 now, was 0.0001"),
        ("ladd", "lora", "alpha", 8.0, "[lora] alpha is 8 now, was left out"),
        ("ladd", "lora", "dropout", 0.5, "[lora] dropout is 0.5 now, was left out"),
    ],
)
def test_a_run_does_not_go_on_with_another_setting(folder, tmp_path, capsys, method, section, key, value, named):
    """Whatever section it is in, also one that only says what judges the student."""
    settings = {"model": {"lora_rank": 4}, "train": {"steps": 2, "batch_size": 4}, "vision": {"size": 32}, "add": {}}

    def write(settings: dict[str, dict]) -> None:
        lines = [f'method = "{method}"']
        for name, keys in settings.items():
            lines += [f"[{name}]", *(f"{k} = {json.dumps(v)}" for k, v in keys.items())]
        (tmp_path / "c.toml").write_text("\n".join(lines))

    command = arguments("train", tmp_path, "--data", folder / "data", "--out", tmp_path / "run")
    write(settings)
    assert main(command) == 0
    student = (tmp_path / "run" / "student.safetensors").read_bytes()
    write({**settings, section: {**settings.get(section, {}), key: value}})
    capsys.readouterr()
    assert main(command) == 2
    assert f"other settings ({named}" in one_line(capsys)
    assert (tmp_path / "run" / "student.safetensors").read_bytes() == student


def test_another_method_is_named_as_one_change(folder, tmp_path, capsys):
    command = arguments("train", tmp_path, "--data", folder / "data", "--out", tmp_path / "run")
    for method, status in (("ladd", 0), ("add", 2)):
        (tmp_path / "c.toml").write_text(
            f'method = "{method}"\n[model]\nlora_rank = 4\n[train]\nsteps = 2\nbatch_size = 4\n[vision]\nsize = 32\n'
        )
        assert main(command) == status
    assert "other settings (method is add now, was ladd); choose" in one_line(capsys)


@pytest.mark.case("host D6", "headless, too, levels without pairs are named")
@pytest.mark.case("host D7", "headless, too, fewer steps than were done are told")
def test_levels_without_pairs_and_fewer_steps_are_told(folder, tmp_path, capsys):
    """The dataset keeps pairs at 1 and .5, and LADD's student has four levels."""
    command = arguments("train", tmp_path, "--data", folder / "data", "--out", tmp_path / "run")
    config = (folder / "c.toml").read_text()
    (tmp_path / "c.toml").write_text(config)
    assert main(command) == 0
    assert "have no pairs in data (it keeps 1, 0.5)" in capsys.readouterr().err
    (tmp_path / "c.toml").write_text(config.replace("[train]\nsteps = 3", "[train]\nsteps = 2"))
    assert main(command) == 0
    assert "this run has already done 3 steps, and steps is 2 now" in capsys.readouterr().err


@pytest.mark.case("training L3", "another dataset under the same run name is refused")
@pytest.mark.case("training 8", "a run goes on with its own dataset and settings only, and names what differs")
def test_a_run_does_not_go_on_with_another_dataset(folder, tmp_path, capsys):
    """Also one of the same settings: what counts is its content."""
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(folder / "data", data)
    assert main(arguments("train", folder, "--data", data, "--out", out)) == 0
    for shard in data.glob("shard-*.safetensors"):
        tensors, metadata = load_tensors(shard)
        save_tensors(shard, {**tensors, "latents": 0.999 * tensors["latents"]}, metadata)
    capsys.readouterr()
    assert main(arguments("train", folder, "--data", data, "--out", out)) == 2
    assert "other settings (--data (or [data] mix) is another one now)" in one_line(capsys)


@pytest.mark.case("attack 4", "a log with a cut last line is read on, and mended")
@pytest.mark.case("training D12", "the log has each step once after a kill")
def test_the_log_of_a_run_that_was_killed_has_every_step_once(folder, tmp_path):
    """Its log knows steps that its checkpoint does not; they are written again, not twice."""
    out = tmp_path / "run"
    assert main(arguments("train", folder, "--data", folder / "data", "--out", out)) == 0
    log = out / "log.jsonl"
    (tmp_path / "c.toml").write_text(CONFIG.replace("steps = 3\nbatch", "steps = 5\nbatch"))
    log.write_text(log.read_text() + '{"step": 4, "adversarial": 9.0}\n{"step": 5, "adv')
    assert main(arguments("train", tmp_path, "--data", folder / "data", "--out", out)) == 0
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4, 5] and entries[3]["adversarial"] != 9.0


def test_a_finished_run_is_not_trained_again(folder, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(folder / "run", out)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert main(arguments("train", folder, "--data", folder / "data", "--out", out)) == 0
    assert "this run has ended" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    text = capsys.readouterr().out
    assert left.value.code == 0 and "%" not in text
    for command in ("demo", "cache", "train", "sample", "evaluate", "retention", "scenes", "plan", "merge", "compare"):
        assert f"\n    {command} " in text or f"\n    {command}\n" in text, command


@pytest.mark.parametrize("command, resumes", [("cache", True), ("train", True), ("sample", False), ("evaluate", False)])
def test_help_says_which_commands_go_on(capsys, command, resumes):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert ("a stopped command goes on there" in text) == resumes


@pytest.mark.parametrize("command, words", [("train", "goes on from here"), ("sample", "starts over")])
def test_a_stopped_command_says_whether_it_goes_on(folder, tmp_path, capsys, monkeypatch, command, words):
    def stop(args) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"distill_core.cli.main.run_{command}", stop)
    data = ["--data", folder / "data"] if command == "train" else []
    assert main(arguments(command, folder, *data, "--out", tmp_path)) == 130
    assert capsys.readouterr().err == f"stopped; the same command {words}\n"


# Processes


@contextmanager
def started(*command, processes: int = 1) -> Iterator[subprocess.Popen]:
    """The program as a process of its own; whatever is left of it ends with the test."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    process = subprocess.Popen(
        [sys.executable, *(launcher if processes > 1 else []), "-m", "distill_core", *map(str, command)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


needs_signals = pytest.mark.skipif(os.name == "nt", reason="needs SIGTERM and process groups")


@needs_signals
def test_a_terminated_training_keeps_checkpoint_and_student(folder, tmp_path):
    (tmp_path / "c.toml").write_text(CONFIG.replace("steps = 3\nbatch", "steps = 1000\nbatch"))
    log = tmp_path / "log.jsonl"
    with started("train", tmp_path / "c.toml", "--data", folder / "data", "--out", tmp_path) as process:
        while process.poll() is None and (not log.exists() or log.read_text().count("\n") < 2):
            time.sleep(0.05)
        process.terminate()
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 143, errors
    state = json.loads(load_tensors(tmp_path / "checkpoint.safetensors")[1]["run"])
    assert state["step"] == log.read_text().count("\n") >= 2
    _, description = read_lora(tmp_path / "student.safetensors")
    assert description["steps"] == state["step"]


@needs_signals
def test_two_processes_train_the_mini_model_as_one_does(folder, tmp_path):
    command = ("train", folder / "c.toml", "--data", folder / "data", "--out", tmp_path)
    with started(*command, processes=2) as process:
        _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    one, two = (load_tensors(run / "checkpoint.safetensors")[0] for run in (folder / "run", tmp_path))
    assert one.keys() == two.keys()
    for name in one:
        if name.startswith(("generator.", "ema.")):
            torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=0, msg=name)
    assert (tmp_path / "log.jsonl").read_text().count("\n") == 3  # the first process alone writes


@pytest.mark.parametrize("option", ["--images", "--out"])
def test_an_empty_path_is_not_the_folder_one_is_in(folder, tmp_path, capsys, option):
    """As of a shell's variable that is not set."""
    paths = {"--images": folder, "--out": tmp_path / "data"} | {option: ""}
    with pytest.raises(SystemExit, match="2"):
        main(arguments("cache", folder, *(part for pair in paths.items() for part in pair)))
    assert f"argument {option}: is empty: give a path" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("sizes = [[7, 8]]", "[7, 8], and this model takes latents whose sides are multiples of 2"),
        ("sizes = [[4096, 8]]", "[4096, 8], and this model knows no position beyond"),
        ("state_sigmas = [0.5, 1.0]", "[cache] state_sigmas must fall, the highest first, not [0.5, 1.0]"),
        ("sizes = [[8, 8]]\nstate_sigmas = [1.5]", "state_sigmas has 1.5, and the model's highest level is 1"),
    ],
)
def test_what_no_latent_can_be_made_for_is_refused(tmp_path, capsys, change, message):
    (tmp_path / "c.toml").write_text(f"[cache]\ncount = 2\nsteps = 2\n{change}\n")
    assert main(arguments("cache", tmp_path, "--out", tmp_path / "data")) == 2
    assert message in one_line(capsys) and not list((tmp_path / "data").glob("shard*"))


@pytest.mark.parametrize(
    ("command", "value", "message"),
    [
        (["sample", "--out", "x", "--count"], "0", "argument --count: must be a whole number of at least 1, not 0"),
        (["sample", "--out", "x", "--count"], "many", "argument --count: must be a whole number of at least 1"),
        (["plan", "--free"], "nan", "argument --free: must be a number of GiB, not nan"),
        (["plan", "--free"], "24GB", "argument --free: must be a number of GiB, not 24GB"),
    ],
)
def test_numbers_that_cannot_be_are_refused(capsys, command, value, message):
    with pytest.raises(SystemExit, match="2"):
        main([command[0], "c.toml", *command[1:], value])
    assert message in capsys.readouterr().err

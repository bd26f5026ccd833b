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
from distill_core.files import fingerprint, load_tensors, read_lora, save_lora, save_tensors
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
    assert "other settings, prompts or model" in capsys.readouterr().err


def test_train_writes_student_log_curves_and_checkpoint(folder):
    names = {path.name for path in (folder / "run").iterdir()}
    assert names == {"student.safetensors", "checkpoint.safetensors", "log.jsonl", "report.json", "curves.png"}
    logs = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in logs] == [1, 2, 3] and {"adversarial", "pairs", "accuracy"} <= logs[0].keys()


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


def test_evaluate_compares_with_the_dataset(folder, tmp_path):
    lora = folder / "run" / "student.safetensors"
    out = ["--out", tmp_path, "--count", 3]
    assert main(arguments("evaluate", folder, "--lora", lora, "--data", folder / "data", *out)) == 0
    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert report["fd"].keys() == {"1", "2", "3", "4"} and report["reference"] == 3
    assert all(value > 0 for value in report["fd"].values()) and report["independent"]


def test_a_score_by_the_students_own_discriminator_is_marked(folder, tmp_path, capsys):
    """ADD may train on the very network that `evaluate` scores with; its file says so."""
    state, description = read_lora(folder / "run" / "student.safetensors")
    config = {**description["config"], "add": {}, "vision": {"network": "efficientnet"}}
    save_lora(tmp_path / "s.safetensors", state, {**description, "config": config})
    out = ["--lora", tmp_path / "s.safetensors", "--data", folder / "data", "--out", tmp_path, "--count", 3]
    assert main(arguments("evaluate", folder, *out)) == 0
    assert not json.loads((tmp_path / "evaluation.json").read_text())["independent"]
    assert "trained against the network that scores it" in capsys.readouterr().err


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


def test_a_student_of_another_base_is_refused(folder, tmp_path, capsys):
    state, description = read_lora(folder / "run" / "student.safetensors")
    save_lora(tmp_path / "s.safetensors", state, {**description, "base": "0123"})
    assert main(arguments("sample", folder, "--lora", tmp_path / "s.safetensors", "--out", tmp_path)) == 2
    assert "distilled from another model" in one_line(capsys)


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
        ("add", "vision", "size", 64, "vision.size"),
        ("ladd", "discriminator", "width", 24, "discriminator.width"),
        ("add", "model", "perceptual", "mini", "perceptual"),
        ("add", "add", "r1", 1e-3, "add.r1"),
        ("ladd", "train", "student_lr", 1e-5, "student_lr"),
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
    assert f"other settings ({named})" in one_line(capsys)
    assert (tmp_path / "run" / "student.safetensors").read_bytes() == student


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
    assert "other settings (dataset)" in one_line(capsys)


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

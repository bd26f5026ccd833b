"""ADD Trainer and Diffusion2GAN Trainer in the real server: what they reach, cancel, resume, real images, mistakes."""

from __future__ import annotations

import random

import pytest
from graphs import mini_training, node, student_score, teacher_score
from run_files import assert_same_files, fails, log_of, lora_of, run_folder, steps_of, wait_for_step
from safetensors.torch import load_file, save_file
from server import Host

from distill_core.lora_files import read_lora

METHODS = ("ADD", "Diffusion2GAN")
TEACHER = {"count": 512, "steps": 8, "batch_size": 128}
SETTINGS = {
    "ADD": dict(steps=30, batch_size=16, discriminator_lr=1e-2, discriminator_updates=4, rank=32),
    "Diffusion2GAN": dict(steps=30, batch_size=16, student_lr=1e-3, rank=32, perceptual=["perceptual", 0]),
}
WELL_BELOW = {"ADD": 0.6, "Diffusion2GAN": 0.3}  # fd of one step, as a part of the guided teacher's
PERCEPTUAL = node("TurboDistillLoadPerceptual", weights="mini model (shipped)", transforms="bg", draws=1, l1=0.0)


def training(name: str, method: str, teacher: dict | None = None, **trainer) -> dict:
    graph = mini_training(name, "one_step" if teacher else "few", teacher, method, **trainer)
    return graph | ({"perceptual": PERCEPTUAL} if "perceptual" in trainer else {})


@pytest.fixture(scope="module", params=METHODS)
def distilled(request, host) -> tuple[Host, str]:
    """The mini model distilled into one step."""
    host.run(training(f"one_{request.param}", request.param, TEACHER, **SETTINGS[request.param]), 600)
    return host, request.param


@pytest.fixture(scope="module")
def teacher_fd(host) -> float:
    return teacher_score(host)["fd"]


def test_one_step_of_the_student_is_far_better_than_one_of_the_teacher(distilled, teacher_fd):
    """fd of the saved LoRA, loaded by core's loader without a warning. Runs of full length are measured by
    tests/benchmarks/distil_in_graph.py."""
    host, method = distilled
    before = len(host.log())
    score = student_score(host, f"one_{method}_00001_.safetensors")
    said = host.log()[before:]
    assert "lora key not loaded" not in said and "NOT LOADED" not in said
    print(method, score, "teacher", teacher_fd)
    assert score["fd"] <= WELL_BELOW[method] * teacher_fd and score["accuracy"] > 0.8


def test_the_file_and_the_log_say_what_was_trained(distilled):
    host, method = distilled
    _, said = read_lora(lora_of(host, f"one_{method}"))
    assert said["method"] == method and said["sigmas"] == [1.0] and said["cfg"] == 1.0 and said["weights"] == "lora"
    terms = {"ADD": {"adversarial", "distillation"}, "Diffusion2GAN": {"adversarial", "pairs"}}[method]
    log = log_of(host, f"one_{method}")
    assert [entry["step"] for entry in log] == list(range(1, SETTINGS[method]["steps"] + 1))
    assert terms | {"discriminator", "accuracy", "logit_gap", "r1"} <= log[0].keys()


@pytest.mark.parametrize("method", METHODS)
def test_a_cancelled_run_goes_on_to_the_same_weights(host, method):
    whole, cut, settings = f"whole_{method}", f"cut_{method}", dict(steps=20, seed=1)
    host.run(training(whole, method, **settings), 300)
    prompt = host.queue(training(cut, method, **settings))
    wait_for_step(host, cut, random.randint(2, 12))
    host.post("/interrupt")
    host.wait(prompt, 120)
    stopped = len(steps_of(host, cut))
    assert 2 <= stopped < 20 and read_lora(lora_of(host, cut))[1]["steps"] == stopped
    host.run(training(cut, method, **settings), 300)
    assert steps_of(host, cut) == list(range(1, 21))
    assert_same_files(lora_of(host, cut), lora_of(host, whole))
    assert_same_files(*(run_folder(host, name) / "checkpoint.safetensors" for name in (cut, whole)))


def test_a_second_network_and_all_weights_train_in_the_graph(host):
    """Diffusion2GAN as in the paper: the student is a whole network, and so is the discriminator."""
    settings = dict(critic="copy", train="all weights", steps=3, gradient_checkpointing=True)
    host.run(training("paper", "Diffusion2GAN", **settings), 300)
    _, said = read_lora(lora_of(host, "paper"))
    assert said["weights"] == "differences" and said["steps"] == 3


@pytest.mark.parametrize(
    "method, weights, called", [("ADD", {}, "ADD"), ("LADD", {"distillation_weight": 2.5}, "LADD + distillation")]
)
def test_real_images_are_learnt_with_the_distillation_term(host, method, weights, called):
    """Images through the model's VAE into Latents Dataset, four levels, the teacher guided by the node's own cfg."""
    name = f"images_{method}"
    graph = training(name, method, target_steps=4, steps=3, batch_size=4, teacher_cfg=1.5, **weights)
    graph["picture"] = node("EmptyImage", width=64, height=64, batch_size=8, color=0x808080)
    graph["encoded"] = node("VAEEncode", pixels=["picture", 0], vae=["mini", 1])
    graph["noisy"] = node(
        "TurboDistillSampler",
        model=["teacher", 0],
        positive=["one", 0],
        latent_image=["encoded", 0],
        preset="auto",
        steps=4,
        denoise=0.7,
        denoise_mode="snap",
        seed=3,
        sampler="euler",
        cfg=1.0,
    )
    graph["one"] = node("TurboDistillMiniConditioning", class_name="bag")
    graph["decoded"] = node("VAEDecode", samples=["noisy", 0], vae=["mini", 1])
    graph["again"] = node("VAEEncode", pixels=["decoded", 0], vae=["mini", 1])
    graph["dataset"] = node(
        "TurboDistillLatentsDataset",
        model=["teacher", 0],
        latents=["again", 0],
        positive=["one", 0],
        negative=["none", 0],
        dataset_name=name,
        dtype="float32",
    )
    host.run(graph, 300)
    _, said = read_lora(lora_of(host, name))
    assert said["sigmas"] == [1.0, 0.75, 0.5, 0.25] and said["method"] == called and said["config"]["guidance"] == 1.5
    state = load_file(lora_of(host, name))
    assert any(value.any() for name, value in state.items() if "lora_B" in name)


MISTAKES = {
    "a dataset without pairs": ("Diffusion2GAN", {"pairs_for_steps": 0}, {}, "keeps no pairs, and this student learns"),
    "pairs for ADD that are not there": ("ADD", {"pairs_for_steps": 0}, {"pairs_weight": 1.0}, "keeps no pairs"),
    "one item to mix": ("Diffusion2GAN", {}, {"batch_size": 1}, "use batch_size of at least 2"),
    "one item and hinge": ("ADD", {}, {"batch_size": 1}, "hinge with a batch of 1"),
    "an autoencoder of other latents": ("ADD", {}, {"vae": ["pixels", 0]}, "the VAE decodes latents of 3 channels"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_before_training_and_the_server_lives(host, mistake):
    method, teacher, trainer, message = MISTAKES[mistake]
    name = mistake.replace(" ", "_")
    graph = mini_training(name, name, teacher, method, **trainer)
    graph["pixels"] = node("VAELoader", vae_name="pixel_space")
    assert message in fails(host, graph)
    assert steps_of(host, name) == [] and not lora_of(host, name).exists()


def test_a_path_of_another_solver_is_refused(host):
    """The stored noise must lead to the stored latent: here the dataset says it took other levels than it did."""
    graph = mini_training("solver", "solver", {}, "Diffusion2GAN")
    host.run(
        {name: graph[name] for name in graph if name not in ("train", "save")}
        | {"show": node("PreviewAny", source=["dataset", 0])},
        120,
    )
    folder = host.base_dir / "output" / "turbo_distill" / "datasets" / "solver"
    for path in folder.glob("shard-*.safetensors"):
        tensors = load_file(path)
        tensors["latents"] = tensors["latents"].flip(0).contiguous()
        save_file(tensors, path, {"state_sigmas": "[1.0]"})
    assert "the stored noise does not lead to the stored latent" in fails(host, graph)


@pytest.mark.parametrize(
    ("method", "changes", "setting"),
    [
        ("ADD", {"vision_size": 64}, "vision_size is 64 now, was 32"),
        ("Diffusion2GAN", {"perceptual": ["perceptual", 0]}, "perceptual is another one now"),
    ],
)
def test_another_judge_is_another_run(host, method, changes, setting):
    name = f"judge_{method}"
    host.run(training(name, method, steps=2), 120)
    assert f"belongs to a run with other settings ({setting})" in fails(
        host, training(name, method, steps=2, **changes)
    )

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toy
from toy import cache_toy

from distill_core.data.cache import CacheConfig, cache_latents
from distill_core.data.dataset import Batch, LatentDataset
from distill_core.data.real import save_latents
from distill_core.diffusion.process import DiscreteProcess, FlowProcess, cumulative_alphas
from distill_core.experiments import demo
from distill_core.methods.ladd import LADDConfig
from distill_core.models import mini
from distill_core.models.denoiser import Denoiser, Guided
from distill_core.training import preflight as module
from distill_core.training.loop import Run, TrainConfig, accumulate
from distill_core.training.preflight import preflight

LADD = LADDConfig(warmup_steps=0)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> LatentDataset:
    folder = tmp_path_factory.mktemp("preflight")
    classes, empty = demo.mini_conditioning()
    config = CacheConfig(count=8, steps=8, guidance=1.5, sizes=((8, 8),), state_sigmas=(1.0, 0.5))
    teacher = Guided(Denoiser(demo.mini_backend()), empty, 1.5)
    for _ in cache_latents(teacher, classes, 16, config, folder):
        pass
    return LatentDataset(folder)


class Altered:
    """A dataset whose latents went through a function."""

    def __init__(self, dataset, change) -> None:
        self.dataset, self.change = dataset, change

    def batch(self, *args) -> Batch:
        batch = self.dataset.batch(*args)
        return replace(batch, latents=self.change(batch.latents))


def mini_run(dataset, ladd=LADD, batch_size=8, rank=4, **settings) -> Run:
    demo_run = demo.DemoRun(ladd, TrainConfig(batch_size=batch_size, **settings))
    config = demo.DemoConfig(rank=rank, head_width=16)
    source = dataset.dataset if isinstance(dataset, Altered) else dataset
    run, _ = demo.open_run(source, config, demo_run)
    run.dataset = dataset
    return run


def state_of(run: Run) -> list[torch.Tensor]:
    tensors = [*(v for p in run.players for v in p.parameters.values()), *run.ema.values()]
    return [t.detach().clone() for t in tensors]


@pytest.mark.parametrize("terms", [{"adversarial": 1.0}, {"adversarial": 1.0, "pairs": 1.0}, {"pairs": 1.0}])
def test_a_sound_run_passes_and_is_left_as_it_was(dataset, terms):
    run = mini_run(dataset, LADDConfig(terms, warmup_steps=0))
    before = state_of(run)
    preflight(run)
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(run), strict=True))
    everything = [v for p in run.players for v in p.parameters.values()]
    assert all(p.grad is None for p in [*everything, *run.method.teacher.backend.network.parameters()])
    assert not any(optimizer.state for optimizer in run.optimizers.values()) and run.step == 0


def test_a_gradient_penalty_and_own_samples_pass(dataset):
    preflight(mini_run(dataset, LADDConfig(warmup_steps=0, r1=0.1, own_share=1.0)))


SCALES = {
    "SD1.5": (1 / 0.18215, 0.0),
    "SDXL": (1 / 0.13025, 0.0),
    "FLUX": (1 / 0.3611, 0.1159),
    "scaled twice": (0.18, 0),
}


@pytest.mark.parametrize("vae", SCALES)
def test_latents_that_were_not_scaled_are_named(dataset, vae):
    scale, shift = SCALES[vae]
    with pytest.raises(ValueError, match="wrong latent scale: .* exactly once"):
        preflight(mini_run(Altered(dataset, lambda x: x * scale + shift)))


def test_noise_for_real_data_is_named(dataset):
    generator = torch.Generator().manual_seed(3)
    with pytest.raises(ValueError, match="real is noise"):
        preflight(mini_run(Altered(dataset, lambda x: torch.randn(x.shape, generator=generator))))


def test_latents_of_another_vae_are_named(dataset):
    """The same numbers with their channels in another order."""
    with pytest.raises(ValueError, match="does not know these latents"):
        preflight(mini_run(Altered(dataset, lambda x: x.flip(1) * x.new_tensor([1, -1] * 8).view(1, -1, 1, 1))))


class VelocityForImage(FlowProcess):
    def calculate_denoised(self, sigma, model_output, model_input):
        return model_output


class WrongSign(FlowProcess):
    def calculate_denoised(self, sigma, model_output, model_input):
        return 2 * model_input - super().calculate_denoised(sigma, model_output, model_input)


PROCESSES = {
    "v taken for x0": (VelocityForImage(), "not the clean latent"),
    "timesteps not times 1000": (FlowProcess(1.0), "timestep scale"),
    "eps for flow": (DiscreteProcess(cumulative_alphas()), "prediction type"),
    "wrong sign": (WrongSign(), "prediction type"),
}


@pytest.mark.parametrize("mistake", PROCESSES)
def test_a_process_that_is_not_the_models_is_named(dataset, mistake):
    process, message = PROCESSES[mistake]
    run = mini_run(dataset)
    run.method.teacher.backend.process = process
    with pytest.raises(ValueError, match=message):
        preflight(run)


def test_adapters_on_in_the_discriminator_are_named(dataset):
    run = mini_run(dataset)
    run.method.teacher = run.method.student
    with pytest.raises(ValueError, match="adapters are on in the teacher and the discriminator"):
        preflight(run)


def test_adapters_on_in_the_features_alone_are_named(dataset):
    run = mini_run(dataset)
    run.method.teacher.features = run.method.student.features
    with pytest.raises(ValueError, match="adapters are on in the discriminator:"):
        preflight(run)


def test_a_student_whose_path_is_off_is_named(dataset):
    run = mini_run(dataset)
    run.method.student = Denoiser(run.method.student.backend)
    with pytest.raises(ValueError, match="weights do not change its output"):
        preflight(run)


def test_pure_noise_at_every_level_is_named(dataset, monkeypatch):
    run = mini_run(dataset, LADDConfig(probabilities=(0.0, 0.0, 0.5, 0.5), warmup_steps=0))
    process = run.method.student.process
    honest = process.noise_scaling

    def noise_alone(sigma, noise, latents, max_denoise=False):
        start = latents.data_ptr() in mine
        return noise if start else honest(sigma, noise, latents, max_denoise)

    batch = run.batch(0)[0]
    monkeypatch.setattr(run, "batch", lambda micro: (batch, None))
    mine: set[int] = set()
    original = run.method.start

    def start(*args):
        mine.add(batch.latents.data_ptr())
        try:
            return original(*args)
        finally:
            mine.clear()

    process.noise_scaling, run.method.start = noise_alone, start
    with pytest.raises(ValueError, match="pure noise at every level"):
        preflight(run)


def test_a_cut_graph_is_named(dataset):
    """The student's output detached on its way into the discriminator."""
    run = mini_run(dataset)
    honest = run.method.adversarial_term
    run.method.adversarial_term = lambda step: honest(step).detach().requires_grad_()
    with pytest.raises(ValueError, match="no gradient reaches the generator"):
        preflight(run)


def test_a_loss_that_trains_the_heads_too_is_named(dataset, monkeypatch):
    """A loop that lets the generator's backward run into everything."""

    def leaky(run, player, step, logs):
        player.loss(step)[0].backward()
        return True

    monkeypatch.setattr(module, "accumulate", leaky)
    with pytest.raises(ValueError, match="the generator's loss trains the discriminator, too"):
        preflight(mini_run(dataset))


def test_a_backbone_that_is_not_frozen_is_named(dataset):
    run = mini_run(dataset)
    run.method.teacher.backend.network.requires_grad_(True)
    with pytest.raises(ValueError, match="the backbone is not frozen"):
        preflight(run)


def test_hinge_at_batch_1_is_refused(dataset):
    with pytest.raises(ValueError, match="hinge with a batch of 1"):
        preflight(mini_run(dataset, batch_size=1))


def test_the_loops_own_accumulation_trains_nobody_else(dataset):
    """The check above is about this function; it is the one the loop uses."""
    assert module.accumulate is accumulate


@pytest.mark.case("training D3", "a student whose highest level is no pure noise is refused before the first step")
def test_levels_that_begin_below_pure_noise_are_named(dataset):
    with pytest.raises(ValueError, match="highest level is no pure noise: student_sigmas begin at 0.75"):
        preflight(mini_run(dataset, LADDConfig(student_sigmas=(0.75, 0.5), warmup_steps=0)))


# The dataset is judged, not its first batch


@pytest.fixture(scope="module")
def mini_teacher() -> Denoiser:
    return Denoiser(demo.mini_backend())


@pytest.mark.case("attack 13", "good latents are never called noise, whatever the batch")
@pytest.mark.parametrize("size", [1, 2, 3])
def test_good_latents_pass_in_batches_of_any_size(dataset, mini_teacher, size):
    """Single items whose neighbours happen to be independent among them."""
    numbers = range(8 // size)
    batches = [dataset.batch(number, size, seed) for seed in range(3) for number in numbers]
    assert not [fault for batch in batches for fault in module.teacher_faults(mini_teacher, [batch])]
    if size == 1:
        assert any(module.looks_like_noise([batch.latents]) for batch in batches), "so the old check had refused it"


def encoded(tmp_path, images, count: int) -> LatentDataset:
    classes, empty = demo.mini_conditioning()
    with torch.no_grad():
        latents = mini.load_autoencoder().encode(images).latents
    save_latents(list(latents), [classes[[i % 10]] for i in range(len(latents))], empty, tmp_path)
    return LatentDataset(tmp_path)


TONES = {"white": 1.0, "black": -1.0, "gray": 0.0}


@pytest.mark.case("training L4", "flat, white and black pictures are trained on, with a word about their deviation")
@pytest.mark.parametrize("tone", TONES)
def test_flat_pictures_that_the_teacher_knows_pass(tmp_path, caplog, tone):
    data = encoded(tmp_path, torch.full((6, 3, 64, 64), TONES[tone]), 6)
    preflight(mini_run(data, batch_size=2))
    assert ("unusual standard deviation" in caplog.text) == (tone != "gray")


@pytest.mark.case("training L4", "pictures without anything in them are named as such, not as a wrong scale")
def test_empty_latents_are_named(dataset):
    with pytest.raises(ValueError, match="(?s)almost of one tone.*preflight in .train."):
        preflight(mini_run(Altered(dataset, lambda x: 0.01 * x)))


def test_latents_with_one_value_a_channel_that_the_teacher_does_not_know_are_named(dataset):
    """A picture that is white throughout, in a latent space whose white the teacher has never seen."""
    far = torch.linspace(-6, 6, 16).view(1, -1, 1, 1)
    with pytest.raises(ValueError, match="almost of one tone"):
        preflight(mini_run(Altered(dataset, lambda x: 0.1 * x + far)))


def test_a_fault_in_a_later_batch_is_found(dataset):
    """The first batch is good, the others are noise."""

    class Later(Altered):
        def batch(self, number, *args):
            batch = self.dataset.batch(number, *args)
            noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(number))
            return batch if number == 0 else replace(batch, latents=noise)

    with pytest.raises(ValueError, match="noise"):
        preflight(mini_run(Later(dataset, None), batch_size=4))


TWO = """
import sys, torch
torch.set_num_threads(1)
from accelerate import Accelerator
from toy import toy_run
from distill_core.data.dataset import LatentDataset
from distill_core.training import preflight as module
from distill_core.training.loop import train

processes = Accelerator(cpu=True)
run = toy_run(LatentDataset(sys.argv[1]), batch_size=4, accelerator=processes, steps=3)
rank = processes.process_index
module.faults_of = lambda run: ["only here"] if rank == 1 else []
try:
    module.preflight(run)
except ValueError as error:
    assert "only here" in str(error)
    print(f"rank {rank} says: {str(error).splitlines()[0]}")
broken = run.players[1].loss
def loss(step):
    value, logs = broken(step)
    return value * (float("nan") if rank == 1 and run.step == 1 else 1), logs
object.__setattr__(run.players[1], "loss", loss)
try:
    for event in train(run):
        pass
except FloatingPointError as error:
    print(f"rank {rank} ends: {error}")
processes.wait_for_everyone()
"""


@pytest.mark.case("attack 13", "what one process finds, all say: none dies of a lost connection")
def test_a_fault_of_one_process_is_told_by_all(tmp_path):
    cache_toy(tmp_path / "data")
    (tmp_path / "two.py").write_text(TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    tests = Path(toy.__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}", "OMP_NUM_THREADS": "1"}
    command += [tmp_path / "two.py", tmp_path / "data"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        assert f"rank {rank} says: stopped before the first step: only here" in done.stdout
        what = ("gradient", "loss")[rank]
        assert f"rank {rank} ends: the discriminator {what} is not finite at step 2" in done.stdout

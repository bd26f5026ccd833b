import pytest
import torch

from distill_core.data.dataset import Batch, CacheConfig, LatentDataset, cache_latents
from distill_core.diffusion.process import DiscreteProcess, FlowProcess, cumulative_alphas
from distill_core.experiments import demo
from distill_core.methods.ladd import LADDConfig
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
        return Batch(self.change(batch.latents), batch.cond, batch.states, batch.state_sigmas)


def mini_run(dataset, ladd=LADD, batch_size=8, rank=4, **settings) -> Run:
    demo_run = demo.DemoRun(ladd, TrainConfig(batch_size=batch_size, **settings))
    config = demo.DemoConfig(rank=rank, head_width=16)
    source = dataset.dataset if isinstance(dataset, Altered) else dataset
    run, _ = demo.open_run(source, config, demo_run)
    run.dataset = dataset
    return run


def state_of(run: Run) -> list[torch.Tensor]:
    tensors = [*run.method.discriminator.parameters(), *run.student_parameters.values(), *run.ema.values()]
    return [t.detach().clone() for t in tensors]


@pytest.mark.parametrize("terms", [{"adversarial": 1.0}, {"adversarial": 1.0, "pairs": 1.0}, {"pairs": 1.0}])
def test_a_sound_run_passes_and_is_left_as_it_was(dataset, terms):
    run = mini_run(dataset, LADDConfig(terms, warmup_steps=0))
    before = state_of(run)
    preflight(run)
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(run), strict=True))
    everything = [*run.method.discriminator.parameters(), *run.student_parameters.values()]
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

"""ADD: levels, the pixel discriminator, the distillation term and its weights."""

from dataclasses import replace

import pytest
import torch
from toy import CHANNELS, TERMS, cache_toy, toy_method, toy_parts, toy_run

from distill_core.data.dataset import Batch
from distill_core.diffusion.noise import ItemNoise
from distill_core.diffusion.process import DiscreteProcess, FlowProcess, cumulative_alphas
from distill_core.discriminators.pixel import PixelDiscriminator
from distill_core.methods import losses
from distill_core.methods.add import ADD, ADDConfig
from distill_core.methods.components import Components, VisionConfig
from distill_core.methods.registry import new_method
from distill_core.models.denoiser import Denoiser, Guided
from distill_core.models.vision import image_embedding
from distill_core.training.loop import train


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return cache_toy(tmp_path_factory.mktemp("data"))


@pytest.fixture
def start(dataset):
    """start(size=8, rank=2, **config) -> (method, step) on the first batch."""

    def make(size: int = 8, rank: int = 2, **config):
        method = toy_method(dataset, ADDConfig(**config), rank=rank)
        return method, method.start(dataset.batch(0, size, 0), ItemNoise(3, range(size)), 0)

    return make


def distillation(**more) -> dict:
    return {"terms": {"distillation": 1.0}, **more}


# The student's step


def test_four_levels_drawn_equally_and_pure_noise_at_the_highest(start):
    method, at = start(size=16 * 25)
    assert method.levels == pytest.approx((1.0, 0.75, 0.5, 0.25))
    shares = [(at.sigma == level).float().mean().item() for level in method.levels]
    assert shares == pytest.approx([0.25] * 4, abs=0.08)
    assert torch.equal(at.x[at.at_top], at.noise[at.at_top]) and torch.equal(at.at_top, at.sigma == 1)


def test_zero_terminal_snr_of_an_eps_model(make_backend, make_cond):
    """Nothing of the image reaches the network at the last timestep, though its schedule leaves 0.5 % of it there."""
    backend = make_backend("unet")
    method = new_method(ADDConfig(distillation()["terms"], space="latent"), Components(backend), None, 2)
    batch = Batch(100 + torch.zeros(32, CHANNELS, 8, 8), make_cond(32))
    at = method.start(batch, ItemNoise(0, range(32)), 0)
    assert method.levels == pytest.approx(backend.process.sigma(torch.tensor([999, 749, 499, 249])).tolist(), rel=1e-4)
    seen = backend.process.calculate_input(at.sigma, at.x)
    assert at.at_top.any() and torch.allclose(seen[at.at_top], at.noise[at.at_top], atol=1e-4)
    assert (seen[~at.at_top].mean((1, 2, 3)) > 20).all()


def test_levels_beyond_the_model_are_refused(dataset):
    with pytest.raises(ValueError, match="highest level"):
        toy_method(dataset, ADDConfig(student_sigmas=(14.6,)))


# The discriminator


@pytest.mark.parametrize("rank", [2, 0], ids=["lora", "full"])
def test_gradient_reaches_the_player_whose_turn_it_is(dataset, rank):
    # not hinge: where it is linear, real and fake pull a bias in opposite directions with the same force
    config = ADDConfig({"adversarial": 1.0, "distillation": 2.5, "pairs": 1.0}, gan_loss="nonsaturating")
    run = toy_run(dataset, ladd=config, rank=rank)
    method = run.method
    frozen = [*method.teacher.backend.network.parameters(), *method.vision.network.parameters()]
    assert not any(p.requires_grad for p in frozen)
    trained = {id(p) for player in run.players for p in player.parameters.values()}
    assert trained.isdisjoint(map(id, frozen))
    at = method.start(dataset.batch(0, 8, 0), ItemNoise(0, range(8)), 1)
    for mine, other in (run.players, run.players[::-1]):
        loss, _ = mine.loss(at)
        loss.backward(inputs=list(mine.parameters.values()))
        assert [n for n, p in mine.parameters.items() if p.grad is None or not p.grad.any()] == []
        assert all(p.grad is None for p in [*other.parameters.values(), *frozen])
        for p in mine.parameters.values():
            p.grad = None


def test_the_discriminators_loss_has_no_path_to_the_student(start):
    method, at = start(r1=1.0)
    wanted = list(method.student.trainable().values())
    loss, _ = method.discriminator_loss(at)
    assert torch.autograd.grad(loss, wanted, allow_unused=True) == (None,) * len(wanted)


def test_it_judges_decoded_images_given_text_and_image(start):
    method, at = start()
    loss, logs = method.generator_loss(at)
    tokens, real = method.vision(method.decode(at.fake)), method.vision(method.decode(at.batch.latents))
    image = image_embedding(real) * (~at.at_top).unsqueeze(1)
    logits = method.discriminator(tokens, at.batch.cond.pooled, image)
    assert logs["adversarial"] == pytest.approx(-logits.mean().item(), abs=1e-3)  # spectral norms move a little
    assert loss.item() == pytest.approx((logs["adversarial"] + 2.5 * logs["distillation"]).item(), rel=1e-5)
    assert torch.equal(at.image, image) and at.at_top.any() and not at.at_top.all()


@pytest.mark.parametrize("text, image", [(True, True), (True, False), (False, True), (False, False)])
def test_either_condition_can_be_left_out(start, text, image):
    method, at = start(text_condition=text, image_condition=image)
    method.discriminator.eval()  # spectral norms stay where they are
    logits = method._logits(at.real_tokens, at)
    for name, wanted in (("text", text), ("image", image)):
        before = getattr(at, name)
        setattr(at, name, before + 1.0)
        assert torch.equal(method._logits(at.real_tokens, at), logits) != wanted
        setattr(at, name, before)


def test_r1_is_on_the_heads_inputs_of_real_images(start):
    """Against autograd's double backward by hand, and the loss' gradient against central differences, in float64."""
    method, at = start(r1=2.0, image_condition=False)
    discriminator = method.discriminator.double().eval()  # spectral norms stay where they are
    tokens = [t.double() for t in at.real_tokens]
    at.__dict__["real_tokens"], at.__dict__["fake_tokens"] = tokens, [t.double() for t in at.fake_tokens]
    at.__dict__["text"], at.__dict__["image"] = at.text.double(), at.image.double()
    loss, logs = method.discriminator_loss(at)
    inputs = [t.clone().requires_grad_() for t in tokens]
    verdict = discriminator(inputs, at.text, at.image).mean(1).sum()
    by_hand = sum(g.square().flatten(1).sum(1) for g in torch.autograd.grad(verdict, inputs)).mean()
    assert logs["r1"] == pytest.approx(by_hand.item(), rel=1e-9) and logs["r1"] > 0

    weight = discriminator.heads[1].projection.weight
    (gradient,) = torch.autograd.grad(loss, weight)
    row, column = divmod(gradient.abs().argmax().item(), gradient.shape[1])
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[row, column] += sign * 1e-6
        values.append(method.discriminator_loss(at)[0].item())
        with torch.no_grad():
            weight[row, column] -= sign * 1e-6
    assert gradient[row, column].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4)
    without = ADDConfig(r1=0.0)
    method.config = without
    assert loss.item() == pytest.approx(method.discriminator_loss(at)[0].item() + 2.0 * by_hand.item(), rel=1e-9)


def test_updates_on_one_batch_share_a_penalty(start):
    """One in two takes it, at twice the weight; without it the loss is the same as with separate forwards."""
    method, at = start(r1=2.0, r1_every=2)
    method.discriminator.eval()  # spectral norms stay where they are
    (first, logs), (second, more), (third, again) = (method.discriminator_loss(at) for _ in range(3))
    assert "r1" not in more and logs["r1"] == pytest.approx(again["r1"].item(), rel=1e-6)
    assert first.item() == pytest.approx(second.item() + 2 * 2.0 * logs["r1"].item(), rel=1e-5)
    assert third.item() == pytest.approx(first.item(), rel=1e-6)


# The distillation term


def by_process():
    return [FlowProcess(), DiscreteProcess(cumulative_alphas(), "eps"), DiscreteProcess(cumulative_alphas(), "v")]


@pytest.mark.parametrize("process", by_process(), ids=["flow", "eps", "v"])
def test_signal_and_noise_are_what_the_network_sees(process):
    sigma = process.sigma_at_flow_time(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).double()
    alpha, noise = losses.signal_and_noise(process, sigma)
    if isinstance(process, FlowProcess):
        assert torch.allclose(alpha, 1 - sigma) and torch.allclose(noise, sigma)
    else:
        assert torch.allclose(alpha**2 + noise**2, torch.ones(3).double()) and torch.allclose(noise / alpha, sigma)


class ExactTeacher:
    """A teacher whose noise estimate is known: eps_hat = tanh(network input), for any process."""

    def __init__(self, process):
        self.process = process

    def __call__(self, x, sigma, cond):
        alpha, noise = (v.view(-1, 1, 1, 1) for v in losses.signal_and_noise(self.process, sigma))
        seen = self.process.calculate_input(sigma, x)
        return (seen - noise * self.eps(seen, cond)) / alpha

    @staticmethod
    def eps(seen, cond):
        return torch.tanh(seen) * (1 + cond.context.mean((1, 2)).view(-1, 1, 1, 1))


def at_exact_teacher(start, process, **config):
    """A step in float64 whose teacher is exact, with a leaf in the place of the student's output."""
    method, at = start(**distillation(space="latent", reduction="sum", **config))
    method.teacher = ExactTeacher(process)
    method.guided_teacher = Guided(method.teacher, method.guided_teacher.uncond, 1.0)
    at.batch = Batch(at.batch.latents.double(), at.batch.cond.to(dtype=torch.float64))
    method.guided_teacher.uncond = method.guided_teacher.uncond.to(dtype=torch.float64)
    method.negative = method.guided_teacher.uncond
    at.fake = at.fake.detach().double().requires_grad_()
    at.teacher_sigma = process.sigma_at_flow_time(at.teacher_time).double()
    return method, at


@pytest.mark.parametrize("process", by_process(), ids=["flow", "eps", "v"])
def test_sds_gradient_is_the_weighted_noise_difference(start, process):
    method, at = at_exact_teacher(start, process, weighting="sds")
    (gradient,) = torch.autograd.grad(method.distillation_term(at), at.fake)
    alpha, sigma = (v.view(-1, 1, 1, 1) for v in losses.signal_and_noise(process, at.teacher_sigma))
    seen = process.calculate_input(at.teacher_sigma, at.teacher_noised)
    noise = (seen - alpha * at.fake.detach()) / sigma
    eps_hat = method.teacher.eps(seen, at.batch.cond)
    expected = losses.sds_weight(sigma) * (eps_hat - noise) / len(at.fake)
    assert (gradient - expected).abs().max() <= 1e-6 * expected.abs().max() and expected.abs().max() > 1e-3


def test_nfsd_gradient_is_the_weighted_direction(start):
    method, at = at_exact_teacher(start, FlowProcess(), weighting="nfsd", nfsd_scale=3.0)
    at.teacher_sigma = at.teacher_time = torch.linspace(0.05, 0.9, 8, dtype=torch.float64)
    negative = method.negative.map(lambda v: v + 0.3)
    method.negative = negative
    (gradient,) = torch.autograd.grad(method.distillation_term(at), at.fake)
    seen, sigma = at.teacher_noised, at.teacher_sigma.view(-1, 1, 1, 1)
    with_text = method.teacher.eps(seen, at.batch.cond)
    without, bad = (method.teacher.eps(seen, c) for c in (method.guided_teacher.uncond, negative))
    denoising = torch.where(sigma < 0.2, without, without - bad)
    expected = losses.sds_weight(sigma) * (denoising + 3.0 * (with_text - without)) / 8
    torch.testing.assert_close(gradient, expected, atol=1e-9, rtol=1e-6)


@pytest.mark.case(
    "methods B6", "NFSD's threshold is timestep 200 of 1000, flow time .36 on Stable Diffusion's schedule"
)
def test_nfsd_threshold_is_in_timesteps(start):
    process = DiscreteProcess(cumulative_alphas())
    method, at = at_exact_teacher(start, process, weighting="nfsd", nfsd_scale=0.0)
    timesteps = torch.tensor([20, 100, 190, 199, 201, 300, 600, 950])
    at.teacher_sigma = process.sigma(timesteps).double()
    method.negative = method.guided_teacher.uncond  # so that above the threshold nothing is left
    target = method.nfsd_target(at)
    moved = (target - at.fake.detach()).flatten(1).abs().amax(1) > 1e-9
    assert moved.tolist() == [True] * 4 + [False] * 4


def test_nfsd_negative_prompt_is_a_setting(dataset):
    parts, seen = toy_parts(), []

    def encode(text):
        seen.append(text)
        return dataset.uncond().map(lambda v: v + 1)

    config = ADDConfig(weighting="nfsd", nfsd_negative="blurry, dull")
    with pytest.raises(ValueError, match="nfsd_negative needs the model's text encoder"):
        toy_method(dataset, config, parts=parts)
    method = toy_method(dataset, config, parts=replace(parts, encode=encode))
    assert seen == ["blurry, dull"] and torch.equal(method.negative.context, dataset.uncond().context + 1)
    plain = toy_method(dataset, ADDConfig(weighting="nfsd"), parts=replace(parts, encode=encode))
    assert len(seen) == 1 and torch.equal(plain.negative.context, dataset.uncond().context)


def test_exponential_weighs_by_the_signal(start):
    method, at = at_exact_teacher(start, FlowProcess(), weighting="exponential")
    square = (at.fake - at.teacher_answer).square().flatten(1).sum(1)
    expected = ((1 - at.teacher_time) * square).mean().item()
    assert method.distillation_term(at).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("reduction", losses.REDUCTIONS)
def test_pixel_space_compares_decoded_images(start, reduction):
    method, at = start(**distillation(reduction=reduction))
    square = (method.decode(at.fake) - method.decode(at.teacher_answer)).square().flatten(1)
    per_item = square.mean(1) if reduction == "mean" else square.sum(1)
    assert method.distillation_term(at).item() == pytest.approx(
        ((1 - at.teacher_time) * per_item).mean().item(), rel=1e-5
    )
    assert not at.teacher_answer.requires_grad and not at.teacher_noised.requires_grad


def test_more_teacher_steps_walk_down_evenly(start):
    method, at = start(**distillation(teacher_steps=2))
    t, cond, guided = at.teacher_time, at.batch.cond, method.guided_teacher
    first = guided(at.teacher_noised, t, cond)
    middle = at.teacher_noised + (at.teacher_noised - first) * -0.5
    torch.testing.assert_close(at.teacher_answer, guided(middle, t / 2, cond), atol=1e-5, rtol=1e-5)


def test_a_student_that_is_the_teachers_answer_has_no_gradient(start):
    method, at = start(**distillation(space="latent"))
    target = at.teacher_answer
    at.fake = target.clone().requires_grad_()
    assert method.distillation_term(at).item() == 0


# Refusals


@pytest.mark.parametrize(
    "bad",
    [
        {"weighting": "l2"},
        {"space": "rgb"},
        {"reduction": "max"},
        {"teacher_steps": 0},
        {"time_range": (0.0, 1.0)},
        {"terms": {"renoise": 1.0}},
        {"student_sigmas": (1.0, 0.5), "probabilities": (1.0,)},
    ],
)
def test_impossible_settings_are_refused(bad):
    with pytest.raises(ValueError):
        ADDConfig(**bad)


def test_missing_parts_are_named_before_training(dataset, tmp_path):
    parts = toy_parts()
    with pytest.raises(ValueError, match="frozen vision network"):
        toy_method(dataset, ADDConfig(), parts=Components(parts.backend, parts.decode))
    with pytest.raises(ValueError, match="no autoencoder"):
        toy_method(dataset, ADDConfig(), parts=Components(parts.backend, None, parts.encoder))
    with pytest.raises(ValueError, match="needs a decoder"):
        toy_method(dataset, ADDConfig({"distillation": 1.0}), parts=Components(parts.backend))
    with pytest.raises(ValueError, match="no vision network in"):
        new_method(
            ADDConfig(),
            parts,
            dataset.batch(0, 2, 0),
            2,
            vision=VisionConfig(str(tmp_path / "dino")),
            uncond=dataset.uncond(),
            guidance=2.0,
        )
    with pytest.raises(ValueError, match="AutoencoderTiny"):
        new_method(ADDConfig(), parts, dataset.batch(0, 2, 0), 2, vision=VisionConfig(decoder=str(tmp_path)))


def test_an_autoencoder_without_gradients_is_refused(dataset):
    parts = toy_parts()
    blind = Components(parts.backend, torch.no_grad()(parts.decode), parts.encoder)
    run = toy_run(dataset, ladd=ADDConfig())
    run.method = toy_method(dataset, ADDConfig(), parts=blind)
    with pytest.raises(ValueError, match="gives no gradients"):
        list(train(run))


def test_guided_distillation_needs_the_empty_conditioning(dataset):
    method = toy_method(dataset, ADDConfig())
    parts = (method.student, method.teacher, method.discriminator)
    networks = dict(vision=method.vision, decode=method.decode)
    with pytest.raises(ValueError, match="uncond"):
        ADD(*parts, **networks, config=ADDConfig(), uncond=None, guidance=2.0)
    with pytest.raises(ValueError, match="uncond"):
        ADD(*parts, **networks, config=ADDConfig(weighting="nfsd"), uncond=None, guidance=1.0)
    ADD(*parts, **networks, config=ADDConfig(), uncond=None, guidance=1.0)


# Combinations and architectures


COMBINATIONS = {
    "adversarial only": {"adversarial": 1.0},
    "distillation only": {"distillation": 1.0},
    "with pairs": {"adversarial": 1.0, "pairs": 1.0},
    "with everything": {"adversarial": 1.0, "distillation": 2.5, "pairs": 1.0, "consistency": 1.0},
    "consistency alone": {"consistency": 1.0},
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_combinations_are_settings(dataset, name):
    terms = COMBINATIONS[name]
    run = toy_run(dataset, ladd=ADDConfig(terms), steps=2)
    logs = [event.logs for event in train(run)]
    assert set(terms) <= logs[-1].keys() and ("discriminator" in logs[-1]) == ("adversarial" in terms)


@pytest.mark.parametrize("weighting", losses.DISTILLATION_WEIGHTS)
def test_every_weighting_trains(dataset, weighting):
    list(train(toy_run(dataset, ladd=ADDConfig(distillation()["terms"], weighting=weighting), steps=2)))


@pytest.mark.parametrize("rank", [2, 0], ids=["lora", "full"])
@pytest.mark.parametrize("name", ["sd3", "unet"])
def test_a_step_on_real_architectures(name, make_backend, make_cond, rank):
    """A small tiny-autoencoder decoder and encoder around a flow transformer and an eps-prediction UNet."""
    from diffusers import AutoencoderTiny

    with torch.random.fork_rng():
        torch.manual_seed(0)
        tiny = (
            AutoencoderTiny(
                latent_channels=4,
                encoder_block_out_channels=(8,) * 4,
                decoder_block_out_channels=(8,) * 4,
                num_encoder_blocks=(1, 1, 1, 1),
                num_decoder_blocks=(1, 1, 1, 1),
            )
            .eval()
            .requires_grad_(False)
        )
        backend = make_backend(name)
        batch = Batch(torch.randn(2, CHANNELS, 8, 8), make_cond(2))
        parts = Components(backend, lambda latents: tiny.decode(latents).sample, tiny.encoder)
        method = new_method(ADDConfig(), parts, batch, rank, uncond=make_cond(1, seed=4), guidance=3.0)
    assert isinstance(method.discriminator, PixelDiscriminator) and isinstance(method.student, Denoiser)
    method.check(batch, 2)
    at = method.start(batch, ItemNoise(0, range(2)), 0)
    for loss, parameters in (
        (method.generator_loss(at)[0], list(method.student.trainable().values())),
        (method.discriminator_loss(at)[0], list(method.discriminator.parameters())),
    ):
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        moved = sum(g is not None and bool(g.any()) for g in grads)
        assert torch.isfinite(loss) and moved > 0.4 * len(parameters)


def test_the_shared_terms_setting_trains(dataset):
    logs = [event.logs for event in train(toy_run(dataset, ladd=TERMS["add"], steps=2))]
    assert {"adversarial", "distillation", "discriminator", "r1"} <= logs[-1].keys()


@pytest.mark.case("methods B5", "the lazy R1 of ADD is taken in one of r1_every updates of the run, not in every step")
@pytest.mark.parametrize("updates", [1, 3])
def test_lazy_r1_counts_over_the_run(dataset, updates):
    config = ADDConfig({"adversarial": 1.0}, r1=0.1, r1_every=4)
    run, taken = toy_run(dataset, ladd=config, discriminator_updates=updates, steps=8), []
    plain = run.players[1].loss

    def loss(step):
        value, logs = plain(step)
        taken.append("r1" in logs)
        return value, logs

    object.__setattr__(run.players[1], "loss", loss)
    for _ in train(run):
        pass
    assert taken == [number % 4 == 0 for number in range(8 * updates)]

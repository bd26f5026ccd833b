from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from benchmarks.step_flops import count
from scipy.stats import kstest, norm
from toy import CHANNELS, LADD_TERMS, LEVELS, TAPS, TERMS, cache_toy, toy_method, toy_run

from distill_core.data.dataset import Batch
from distill_core.diffusion.noise import ItemNoise
from distill_core.diffusion.process import DiscreteProcess, FlowProcess, cumulative_alphas
from distill_core.diffusion.schedules import grid_sigmas
from distill_core.discriminators.latent import LatentDiscriminator
from distill_core.methods.ladd import LADD, LADDConfig
from distill_core.methods.losses import pseudo_huber, squared_error
from distill_core.methods.statistics import discriminator_health, diversity
from distill_core.models.denoiser import Denoiser
from distill_core.training.loop import train, training_step


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return cache_toy(tmp_path_factory.mktemp("data"))


@pytest.fixture
def start(dataset):
    """start(step=0, size=16, **config) -> (method, LADDStep) on the first batch."""

    def make(step: int = 0, size: int = 16, **config):
        method = toy_method(dataset, LADDConfig(**{"warmup_steps": 0, **config}))
        return method, method.start(dataset.batch(0, size, 0), ItemNoise(3, range(size)), step)

    return make


def counts(sigma) -> list[float]:
    return [(sigma == level).float().mean().item() for level in LEVELS]


# Noise levels


def test_student_levels_follow_the_two_distributions(start):
    for step, expected in ((0, (0.0, 0.0, 0.5, 0.5)), (499, (0.0, 0.0, 0.5, 0.5)), (500, (0.7, 0.1, 0.1, 0.1))):
        _, at = start(step, size=600, warmup_steps=500, warmup_probabilities=(0.0, 0.0, 0.5, 0.5))
        assert counts(at.sigma) == pytest.approx(expected, abs=0.07) and sum(counts(at.sigma)) == pytest.approx(1)


@pytest.mark.case("methods C", "by default LADD warms up for 500 steps above 512 pixels, and not at or below")
def test_the_default_warm_up_is_for_large_pictures(dataset):
    method = toy_method(dataset, LADDConfig())
    batch = dataset.batch(0, 2, 0)

    def of_size(height: int, width: int) -> Batch:
        return Batch(torch.zeros(2, CHANNELS, height, width), batch.cond, None, ())

    late = pytest.approx((0.7, 0.1, 0.1, 0.1))
    assert method.probabilities(0, of_size(64, 64)) == late and method.probabilities(500, of_size(128, 128)) == late
    assert method.probabilities(499, of_size(128, 128)) == (0.0, 0.0, 1.0, 1.0)
    assert method.probabilities(0, of_size(64, 66)) == (0.0, 0.0, 1.0, 1.0)
    one = toy_method(dataset, LADDConfig(student_sigmas=(1.0,)))
    assert one.probabilities(0, of_size(128, 128)) == (1.0,) and one.probabilities(500, batch)[0] > 0


@pytest.mark.case("training D3", "LADD's default levels are the model's own grid: it begins at sigma 14.6 on SD 1.5")
def test_default_levels_are_the_models_own(dataset):
    assert toy_method(dataset, LADDConfig()).levels == LEVELS
    for process in (DiscreteProcess(cumulative_alphas()), FlowProcess(shift_alpha=3.0)):
        levels = LADDConfig().levels(process)
        assert levels == tuple(grid_sigmas(process, 4)[:-1].tolist()) and levels[0] == pytest.approx(process.sigma_max)


def test_own_samples_leave_no_cast_behind(start, monkeypatch):
    """Before torch 2.10 autocast kept casts of weights that were made without a graph; here it does, too."""
    casts, made, plain = {}, [], torch.nn.functional.linear

    def linear(x, weight, bias=None):
        if not torch.is_autocast_enabled("cpu") or not weight.requires_grad:
            return plain(x, weight, bias)
        if weight not in casts:
            casts[weight] = weight.bfloat16()
            made.append(weight)
        return plain(x.bfloat16(), casts[weight], bias)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    monkeypatch.setattr(torch, "clear_autocast_cache", casts.clear)
    with torch.autocast("cpu", torch.bfloat16):
        method, at = start(own_share=1.0, probabilities=(0.0, 0.0, 0.5, 0.5))
    at.fake.float().square().mean().backward()
    parameters = method.student.trainable()
    assert len(made) > len(parameters) and [name for name, p in parameters.items() if p.grad is None] == []


def test_the_student_sees_the_latent_noised_at_its_level(start):
    method, at = start()
    sigma = at.sigma.view(-1, 1, 1, 1)
    torch.testing.assert_close(at.x, (1 - sigma) * at.batch.latents + sigma * at.noise)
    assert torch.equal(at.fake, method.student(at.x, at.sigma, at.batch.cond))
    pure = at.sigma == 1
    assert pure.any() and torch.equal(at.x[pure], at.noise[pure])


def test_own_share_starts_lower_levels_from_the_students_own_samples(start):
    method, at = start(own_share=1.0, probabilities=(0.25,) * 4)
    sigma, top = at.sigma.view(-1, 1, 1, 1), at.sigma == 1
    assert torch.equal(at.x[top], at.noise[top]) and 0 < top.sum() < 16
    own = (at.x - sigma * at.noise)[~top] / (1 - sigma[~top])  # what was noised: some one-step sample of the student
    again = ItemNoise(3, range(16)).named("own sample")
    again.uniform()  # the share was drawn before
    pure = again.normal_like(at.x)
    expected = method.student(pure, torch.ones(16), at.batch.cond)[~top]
    torch.testing.assert_close(own, expected, atol=1e-4, rtol=1e-4)


def test_rollouts_start_where_the_student_itself_arrives(dataset):
    """As sampling by Euler steps from the path's noise would; what they shall reach stays the teacher's result."""
    terms, levels = {"adversarial": 1.0, "pairs": 1.0}, [1.0, 0.75, 0.5, 0.25]
    method = toy_method(dataset, LADDConfig(terms, rollout_share=1.0, warmup_steps=0, probabilities=(0.25,) * 4))
    batch = dataset.batch(0, 16, 0)
    stored = batch.states.clone()
    at = method.start(batch, ItemNoise(3, range(16)), 1)
    assert at.on_path.all() and set(at.sigma.tolist()) == set(levels)
    for row, sigma in enumerate(at.sigma.tolist()):
        path = sample(method.student, stored[row : row + 1, 0], batch.cond[row : row + 1], levels, sigma)
        torch.testing.assert_close(at.x[row : row + 1], path, atol=1e-5, rtol=1e-5)
    assert torch.equal(batch.states, stored)
    alone = toy_method(dataset, LADDConfig(terms, warmup_steps=0, probabilities=(0.25,) * 4))
    of_teacher = alone.start(batch, ItemNoise(3, range(16)), 1)
    top = at.sigma == 1
    assert torch.equal(at.sigma, of_teacher.sigma) and torch.equal(at.x[top], of_teacher.x[top])
    assert all(not torch.equal(a, b) for a, b in zip(at.x[~top], of_teacher.x[~top], strict=True))


def sample(student, x, cond, levels, until):
    """Euler steps of a student from pure noise at the first level to ``until``."""
    for sigma, lower in pairwise(levels):
        if sigma > until:
            x = x + (x - student(x, torch.tensor([sigma]), cond)) / sigma * (lower - sigma)
    return x


def test_rollouts_need_the_noise_of_the_paths(dataset):
    config = LADDConfig({"adversarial": 1.0, "pairs": 1.0}, rollout_share=0.5)
    method, batch = toy_method(dataset, config), dataset.batch(0, 4, 0)
    method.check(batch, 4)
    later = replace(batch, states=batch.states[:, 1:], state_sigmas=batch.state_sigmas[1:])
    with pytest.raises(ValueError, match="rollout_share begins .* level, 1, and stored are .*state_sigmas"):
        method.check(later, 4)


@pytest.mark.parametrize("mean, std", [(1.0, 1.0), (-0.5, 0.6)])
def test_renoise_levels_are_logit_normal(start, mean, std):
    _, at = start(size=600, renoise_mean=mean, renoise_std=std)
    assert kstest(torch.logit(at.renoise_time.double()).numpy(), norm(mean, std).cdf).pvalue > 1e-3


def test_everything_drawn_belongs_to_its_item(dataset):
    method = toy_method(dataset, TERMS["mixed"])
    batch = dataset.batch(0, 6, 0)
    whole = method.start(batch, ItemNoise(3, range(6)), 1)
    part = Batch(batch.latents[4:], batch.cond[4:], batch.states[4:], batch.state_sigmas)
    alone = method.start(part, ItemNoise(3, range(4, 6)), 1)
    for name in ("sigma", "x", "noise", "renoise_time", "renoise", "on_path", "on_grid"):
        assert torch.equal(getattr(whole, name)[4:], getattr(alone, name)), name


# The discriminator's view


@pytest.mark.parametrize("shared", [True, False])
def test_real_and_fake_are_renoised_by_one_path(start, shared):
    method, at = start(shared_renoise=shared)
    sigma = at.renoise_sigma.view(-1, 1, 1, 1)
    real_noise = (at.real_noised - (1 - sigma) * at.batch.latents) / sigma
    assert torch.allclose(real_noise, at.renoise, atol=1e-3) == shared
    noised = (1 - sigma) * at.batch.latents + sigma * (at.renoise if shared else real_noise)
    by_hand = method.teacher.features(noised, at.renoise_sigma, at.batch.cond, TAPS)
    torch.testing.assert_close(at.real_maps, by_hand, atol=1e-4, rtol=1e-4)
    at.fake = at.batch.latents  # a perfect student: the features differ only by the noise
    fake = [torch.allclose(a, b, atol=1e-4) for a, b in zip(at.fake_maps, at.real_maps, strict=True)]
    assert fake == [shared] * len(TAPS)


def test_the_teacher_is_untouched_by_the_students_path(start, randomise):
    method, at = start()
    before = [maps.clone() for maps in at.real_maps]
    randomise(method.student.lora, size=5.0)
    _, again = start()
    again.method = method
    assert not torch.allclose(method.student(at.x, at.sigma, at.batch.cond), at.fake, atol=0.1)
    assert all(torch.equal(a, b) for a, b in zip(again.real_maps, before, strict=True))


@pytest.mark.parametrize("terms", LADD_TERMS)
def test_forwards_of_a_step(dataset, terms):
    """One of the student, one of the teacher on the fake, one on the real; the last block is for the student only."""
    run = toy_run(dataset, ladd=TERMS[terms])
    backend, path = run.method.teacher.backend, run.method.student.lora
    calls = {0: [], 2: []}
    for index, seen in calls.items():
        backend.network.blocks[index].register_forward_hook(
            lambda m, a, out, seen=seen: seen.append((backend.switch.active is path, out.requires_grad))
        )
    training_step(run)
    student, fake, real = (True, True), (False, True), (False, False)
    if terms == "hinge":
        assert calls[0] == [student, fake, real] and calls[2] == [student]
    else:  # the consistency target: the guided teacher, then the student without a graph
        guided, answer = (False, False), (True, False)
        assert sorted(calls[0]) == sorted([student, fake, real, guided, answer])
        assert sorted(calls[2]) == sorted([student, guided, answer])


def test_the_discriminator_reuses_the_fakes_features_without_their_graph(start):
    method, at = start()
    maps = at.fake_maps
    method.discriminator_loss(at)[0].backward()
    assert at.fake_maps is maps and all(p.grad is None for p in method.student.lora.parameters())


def test_the_generators_loss_is_the_verdict_on_the_noised_fake(start):
    method, at = start()
    loss, logs = method.generator_loss(at)
    noised = method.teacher.process.noise_scaling(at.renoise_sigma, at.renoise, at.fake)
    maps = method.teacher.features(noised, at.renoise_sigma, at.batch.cond, TAPS)
    logits = method.discriminator(maps, at.renoise_time, at.batch.cond.pooled)
    assert loss.item() == pytest.approx(-logits.mean().item(), abs=1e-6) and logs["adversarial"] == loss.item()


def test_relativistic_compares_with_the_paired_real(start):
    method, at = start(gan_loss="relativistic")
    fake = method.discriminator(at.fake_maps, at.renoise_time, at.batch.cond.pooled)
    real = method.discriminator(at.real_maps, at.renoise_time, at.batch.cond.pooled)
    expected = torch.nn.functional.softplus(real - fake).mean().item()
    assert method.generator_loss(at)[0].item() == pytest.approx(expected, abs=1e-6)
    assert method.discriminator_loss(at)[0].item() == pytest.approx(
        torch.nn.functional.softplus(fake - real).mean().item(), abs=1e-6
    )


def test_hinge_does_not_pay_for_real_logits_in_the_generator(start):
    method, at = start()
    method.generator_loss(at)
    assert "real_maps" not in vars(at)


def test_approximate_r1_perturbs_the_tensor_the_discriminator_saw(start, monkeypatch):
    method, at = start(approximate_r1=2.0, approximate_r1_sigma=0.05)
    seen, features = [], method.teacher.features

    def watch(x, sigma, cond, taps):
        seen.append((x.detach().clone(), sigma.clone()))
        return features(x, sigma, cond, taps)

    monkeypatch.setattr(method.teacher, "features", watch)
    _, logs = method.discriminator_loss(at)
    (real, level), (perturbed, same_level) = seen[1], seen[2]  # after the fake's
    assert torch.equal(real, at.real_noised) and torch.equal(level, same_level)
    noise = (perturbed - real) / 0.05
    assert abs(noise.mean().item()) < 0.1 and noise.std().item() == pytest.approx(1, abs=0.05)

    def verdict(x):
        maps = features(x, level, at.batch.cond, TAPS)
        return method.discriminator(maps, at.renoise_time, at.batch.cond.pooled).mean(1)

    expected = (verdict(real) - verdict(perturbed)).square().mean().item()  # in APT's unit
    assert logs["approximate_r1"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.case("methods B7", "logits and losses are float32 under autocast, and approximate R1 is right there")
def test_mixed_precision_rounds_features_but_no_verdict(start):
    values = {}
    for mixed in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            method, at = start(size=64, approximate_r1=1.0, gan_loss="nonsaturating")
            logits = method._logits(at.fake_maps, at)
            loss, logs = method.discriminator_loss(at)
        assert logits.dtype == loss.dtype == method.generator_loss(at)[0].dtype == torch.float32
        assert len(logits.unique()) > 0.9 * logits.numel()  # of few thousand, bfloat16 would make many equal
        values[mixed] = logs["approximate_r1"].item()
    assert values[True] == pytest.approx(values[False], rel=0.15)


def test_penalties_add_their_weight_to_the_loss(start):
    values = {}
    for name in ("none", "r1", "approximate_r1"):
        method, at = start(**({} if name == "none" else {name: 3.0}))
        values[name] = method.discriminator_loss(at)
    for name in ("r1", "approximate_r1"):
        loss, logs = values[name]
        assert logs[name] > 0
        assert loss.item() == pytest.approx(values["none"][0].item() + 3 * logs[name].item(), rel=1e-4)


# Regression terms


@pytest.mark.parametrize("regression, distance", [("huber", pseudo_huber), ("mse", squared_error)])
def test_pairs_count_items_on_a_stored_level_against_the_cached_latent(start, regression, distance):
    levels = (1.0, 0.6, 0.5)  # 0.6 is not stored
    method, at = start(
        terms={"pairs": 2.0},
        regression=regression,
        student_sigmas=levels,
        probabilities=(1, 1, 1),
        warmup_probabilities=(1, 1, 1),
    )
    on_path = at.sigma != torch.tensor(0.6)
    assert torch.equal(at.on_path, on_path) and 0 < on_path.sum() < 16
    for row, sigma in enumerate(at.sigma.tolist()):
        if sigma in LEVELS:
            assert torch.equal(at.x[row], at.batch.states[row, LEVELS.index(sigma)])
    expected = 2 * distance(at.fake[on_path], at.batch.latents[on_path]).sum() / 16
    assert method.generator_loss(at)[0].item() == pytest.approx(expected.item(), rel=1e-5)


def test_state_share_leaves_the_other_items_on_fresh_noise(start):
    _, none = start(terms={"pairs": 1.0}, state_share=0.0)
    _, some = start(size=400, terms={"pairs": 1.0}, state_share=0.3)
    assert not none.on_path.any() and some.on_path.float().mean().item() == pytest.approx(0.3, abs=0.08)


def test_a_perfect_student_has_no_pairs_loss(start):
    method, at = start(terms={"pairs": 1.0})
    at.fake = at.batch.latents.clone()
    assert method.generator_loss(at)[0].item() == pytest.approx(0, abs=1e-6)


def target_by_hand(method, at, row: int, grid: list[float]) -> torch.Tensor:
    """One guided Euler step down the grid, then the student's answer there; at the end of the grid the step itself."""
    one, cond = slice(row, row + 1), at.batch.cond[row : row + 1]
    index = min(range(len(grid)), key=lambda i: abs(grid[i] - at.sigma[row].item()))
    sigma, lower = grid[index], grid[index + 1]
    uncond = method.guided_teacher.uncond
    with_text = method.teacher(at.x[one], at.sigma[one], cond)
    without = method.teacher(at.x[one], at.sigma[one], uncond)
    denoised = without + method.guided_teacher.scale * (with_text - without)
    x = at.x[one] + (at.x[one] - denoised) / sigma * (lower - sigma)
    return method.student(x, torch.tensor([lower]), cond) if lower > 0 else denoised


def assert_consistency(method, at):
    grid = grid_sigmas(method.student.process, method.config.consistency_levels).tolist()
    rows = at.on_grid.nonzero().flatten().tolist()
    assert 0 < len(rows) < len(at.sigma)
    with torch.no_grad():
        targets = torch.cat([target_by_hand(method, at, row, grid) for row in rows])
    torch.testing.assert_close(at.consistency_target[rows], targets, atol=1e-4, rtol=1e-4)
    expected = squared_error(at.fake[rows], targets).sum() / len(at.sigma)
    assert method.generator_loss(at)[0].item() == pytest.approx(expected.item(), rel=1e-3)
    assert not at.consistency_target.requires_grad


def test_consistency_by_hand_for_flow(start):
    method, at = start(terms={"consistency": 1.0}, regression="mse", consistency_levels=3)
    assert {round(s, 4) for s in at.sigma[at.on_grid].tolist()} == {1.0, 0.6667, 0.3333}
    assert_consistency(method, at)


def test_consistency_by_hand_for_an_eps_unet(make_backend, make_cond, randomise):
    backend = make_backend("unet")
    student = Denoiser(backend, randomise(backend.new_lora(2)))
    levels = tuple(grid_sigmas(backend.process, 2)[:-1].tolist())
    config = LADDConfig({"consistency": 1.0}, levels, (0.5, 0.5), (0.5, 0.5), regression="mse", consistency_levels=3)
    method = LADD(student, Denoiser(backend), None, taps=[], config=config, uncond=make_cond(1, seed=9), guidance=3.0)
    batch = Batch(torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0)), make_cond(8))
    at = method.start(batch, ItemNoise(0, range(8)), 0)
    assert len(set(at.sigma[at.on_grid].tolist())) > 1
    assert_consistency(method, at)


def test_weights_add_up(start):
    terms = {"adversarial": 0.5, "pairs": 2.0, "consistency": 3.0}
    method, at = start(terms=terms)
    loss, logs = method.generator_loss(at)
    assert loss.item() == pytest.approx(sum(terms[name] * logs[name].item() for name in terms), rel=1e-5)
    assert logs.keys() == terms.keys() | {"diversity", "spread", "size"}


# Health and refusals


def test_health_of_known_logits():
    fake = torch.tensor([[-3.0, 1.0], [2.0, 2.0], [-1.0, -1.0], [-1.0, 0.0]])  # item means -1, 2, -1, -0.5
    real = torch.tensor([[1.0, 1.0], [-1.0, -3.0], [2.0, 2.0], [-1.0, 0.0]])  # 1, -2, 2, -0.5
    health = discriminator_health(fake, real)
    spread = ((fake.mean(1).var() + real.mean(1).var()) / 2) ** 0.5
    assert health["accuracy"] == pytest.approx((3 / 4 + 2 / 4) / 2) and health["logit_gap"] == pytest.approx(0.25)
    assert health["logit_spread"] == pytest.approx(spread.item())
    assert discriminator_health(fake[:1], real[:1]).keys() == {"accuracy", "logit_gap"}, "one item has no spread"
    assert discriminator_health(fake[:0], real) == {}


def test_diversity_of_known_outputs():
    real = torch.randn(8, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    assert diversity(0.3 * real + 5.0, real)["diversity"] == pytest.approx(0.3, rel=1e-4)
    assert diversity(real[:1].expand(8, -1, -1, -1), real)["diversity"] == 0.0
    assert diversity(real, real)["spread"] == pytest.approx(real.std(0).mean().item())
    assert diversity(2 * real[:1], real[:1]) == {"size": pytest.approx(2 * real[:1].square().mean().sqrt().item())}


def test_a_discriminator_learns_to_tell_a_frozen_student(dataset):
    config = LADDConfig(renoise_mean=-2.0, warmup_steps=0)
    logs = [event.logs for event in train(toy_run(dataset, ladd=config, steps=80, batch_size=16, student_lr=0.0))]
    assert abs(logs[0]["logit_gap"]) < 0.1 and sum(log["logit_gap"] for log in logs[-10:]) / 10 > 0.7
    assert sum(log["accuracy"] for log in logs[-10:]) / 10 > 0.7


@pytest.mark.parametrize(
    "bad",
    [
        {"terms": {"adverserial": 1.0}},
        {"terms": {}},
        {"terms": {"pairs": 0.0}},
        {"student_sigmas": (1.0, 0.5), "probabilities": (1.0,)},
        {"gan_loss": "wgan"},
        {"regression": "l1"},
        {"approximate_r1_sigma": 0.0},
        {"renoise_std": -1.0},
    ],
)
def test_impossible_settings_are_refused(bad):
    with pytest.raises(ValueError):
        LADDConfig(**bad)


def test_checks_before_the_first_step(dataset, tmp_path):
    stateless = cache_toy(tmp_path, state_sigmas=())
    pairs = LADDConfig({"pairs": 1.0})
    with pytest.raises(ValueError, match="needs a dataset with stored states"):
        list(train(toy_run(stateless, ladd=pairs)))
    never = LADDConfig({"pairs": 1.0}, (0.9, 0.5), (1.0, 0.0), (1.0, 0.0))
    with pytest.raises(ValueError, match="both trained and stored"):
        list(train(toy_run(dataset, ladd=never)))
    by_consistency = LADDConfig({"pairs": 1.0, "consistency": 1.0}, (0.9,), (1.0,), (1.0,), consistency_levels=4)
    toy_method(dataset, by_consistency).check(dataset.batch(0, 2, 0), 2)


def test_guided_consistency_needs_the_empty_conditioning(dataset):
    method = toy_method(dataset)
    parts = (method.student, method.teacher, method.discriminator)
    settings = dict(taps=TAPS, config=LADDConfig({"consistency": 1.0}))
    with pytest.raises(ValueError, match="uncond"):
        LADD(*parts, **settings, uncond=None, guidance=2.0)
    LADD(*parts, **settings, uncond=None, guidance=1.0)


# On a real architecture


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_trains_the_student_of_every_family(family, make_backend, make_cond, checkpointing):
    backend = make_backend(family, gradient_checkpointing=checkpointing)
    taps = backend.default_taps()
    batch = Batch(torch.randn(2, CHANNELS, 8, 8, generator=torch.Generator().manual_seed(0)), make_cond(2))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student, teacher = Denoiser(backend, backend.new_lora(2)), Denoiser(backend)
        heads = LatentDiscriminator.for_teacher(teacher, taps, batch, width=8, blocks=1)
    levels = tuple(grid_sigmas(backend.process, 4)[:-1].tolist())
    at = LADD(student, teacher, heads, taps=taps, config=LADDConfig(student_sigmas=levels)).start(
        batch, ItemNoise(0, range(2)), 0
    )
    loss, _ = at.method.generator_loss(at)
    loss.backward(inputs=list(student.trainable().values()))
    assert all(up.grad.any() for up in student.lora.up[:3]) and all(p.grad is None for p in heads.parameters())


def test_a_step_costs_at_most_4_9_forwards():
    cost = count()
    assert 4.2 < cost["ours"] <= 4.9 and cost["held"] < 1.05
    assert cost["naive"] > 7.5  # the counter sees what it should

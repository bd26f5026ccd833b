"""Diffusion2GAN: the pairs, what the discriminator sees in each phase, and its schedules."""

from dataclasses import replace

import pytest
import torch
from toy import CHANNELS, LEVELS, TERMS, ToyBackend, cache_toy, toy_conds, toy_method, toy_run

from distill_core.data.cache import CacheConfig, check_pairs, teacher_grid
from distill_core.data.dataset import Batch, LatentDataset
from distill_core.diffusion.noise import ItemNoise
from distill_core.diffusion.samplers import SAMPLERS
from distill_core.methods import diffusion2gan, losses
from distill_core.methods.components import Components, DiscriminatorConfig
from distill_core.methods.diffusion2gan import Diffusion2GANConfig
from distill_core.methods.registry import new_method
from distill_core.models.denoiser import Denoiser, Guided
from distill_core.training.loop import train

CRITICS = ("copy", "lora")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return cache_toy(tmp_path_factory.mktemp("data"))


@pytest.fixture
def start(dataset):
    """start(step=0, size=8, rank=2, **config) -> (method, step) on the first batch."""

    def make(step: int = 0, size: int = 8, rank: int = 2, **config):
        method = toy_method(dataset, Diffusion2GANConfig(**{"critic_rank": 2, **config}), rank=rank)
        return method, method.start(dataset.batch(0, size, 0), ItemNoise(3, range(size)), step)

    return make


def test_the_student_starts_from_the_stored_noise_of_each_path(start):
    method, at = start()
    assert method.levels == (1.0,) and at.on_path.all()
    assert torch.equal(at.x, at.batch.states[:, 0]) and torch.equal(at.unit_noise, at.x)
    assert torch.equal(at.fake, method.student(at.x, torch.ones(8), at.batch.cond))


@pytest.mark.parametrize("rank", [2, 0], ids=["lora", "full"])
@pytest.mark.parametrize("critic", CRITICS)
def test_gradient_reaches_the_player_whose_turn_it_is(dataset, critic, rank):
    """Each phase moves its own parameters, all of them that it can, and no others."""
    config = Diffusion2GANConfig(critic=critic, critic_rank=2, r1=0.0)
    run = toy_run(dataset, ladd=config, rank=rank)
    method, (generator, discriminator) = run.method, run.players
    backbone = dict(method.teacher.backend.network.named_parameters())
    assert not any(p.requires_grad for p in backbone.values())
    assert {id(p) for p in generator.parameters.values()}.isdisjoint(map(id, discriminator.parameters.values()))
    assert {id(p) for p in backbone.values()}.isdisjoint(
        id(p) for player in run.players for p in player.parameters.values()
    )
    with torch.no_grad():  # away from the zeros of a fresh path, where half of the gradients vanish
        for name, p in discriminator.parameters.items():
            if ".up." in name or "_conv" in name:
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    at = method.start(dataset.batch(0, 8, 0), ItemNoise(0, range(8)), 1)
    for mine, other in (run.players, run.players[::-1]):
        loss, _ = mine.loss(at)
        loss.backward(inputs=list(mine.parameters.values()))
        silent = [n for n, p in mine.parameters.items() if p.grad is None or not p.grad.any()]
        unused = ["trained.outlet.weight", "trained.outlet.bias"]  # the copy's output layer, after the last read-out
        assert silent == (unused if mine is discriminator and critic == "copy" else [])
        assert all(p.grad is None for p in [*other.parameters.values(), *backbone.values()])
        for p in mine.parameters.values():
            p.grad = None


def test_the_discriminators_loss_has_no_path_to_the_student(start):
    method, at = start(r1=1.0)
    loss, _ = method.discriminator_loss(at)
    wanted = list(method.student.trainable().values())
    assert torch.autograd.grad(loss, wanted, allow_unused=True) == (None,) * len(wanted)


@pytest.mark.parametrize("critic", CRITICS)
def test_zero_paths_leave_the_discriminators_output_unchanged(dataset, critic):
    """Before training it judges the teacher's own features; noise and smaller latents change nothing."""
    method = toy_method(dataset, Diffusion2GANConfig(critic=critic, critic_rank=2))
    discriminator, batch = method.discriminator, dataset.batch(0, 4, 0)
    noise = [torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    with torch.no_grad():
        first, second = (discriminator(batch.latents, z, batch.cond) for z in noise)
        maps = method.teacher.features(batch.latents, torch.zeros(4), batch.cond, discriminator.taps)
        pooled = discriminator.pooled(maps)
        plain = discriminator.heads(pooled, torch.zeros(4), batch.cond.pooled)
        assert torch.equal(first, second) and torch.equal(first, plain)
        discriminator.noise_conv.weight.add_(0.1)
        assert not torch.allclose(discriminator(batch.latents, noise[0], batch.cond), first)
        discriminator.noise_conv.weight.zero_()
        discriminator.input_convs[1].weight.add_(0.1)
        changed = discriminator(batch.latents, noise[0], batch.cond)
        assert not torch.allclose(changed, first)
        early = [m.numel() // 4 // m.shape[1] for m in pooled[:2]]
        assert torch.equal(changed[:, : sum(early)], first[:, : sum(early)])  # enters before the last block only


def test_smaller_latents_reach_only_the_discriminators_forwards(dataset):
    method = toy_method(dataset, Diffusion2GANConfig(critic="lora", critic_rank=2))
    batch, sigma = dataset.batch(0, 4, 0), torch.full((4,), 0.5)
    before = method.teacher(batch.latents, sigma, batch.cond)
    with torch.no_grad():
        for inlet in method.discriminator.input_convs:
            inlet.weight.add_(1.0)
    assert torch.equal(method.teacher(batch.latents, sigma, batch.cond), before)


def test_mix_and_match_shows_targets_of_other_items_as_fakes(start):
    method, at = start(size=16, mix_share=0.5)
    same = [torch.equal(a, b) for a, b in zip(at.mixed, at.fake, strict=True)]
    other = [torch.equal(at.mixed[i], at.batch.latents[i - 1]) for i in range(16)]
    assert [not s for s in same] == other and 3 < sum(other) < 13
    seen = []
    method.discriminator.register_forward_pre_hook(lambda m, args: seen.append(args))
    _, logs = method.discriminator_loss(at)
    (fake, z_fake, c_fake), (real, z_real, c_real) = seen[:2]
    assert torch.equal(fake, at.mixed) and torch.equal(real, at.batch.latents)
    assert torch.equal(z_fake, z_real) and torch.equal(c_fake.context, c_real.context)
    with torch.no_grad():  # they are labelled fake
        expected = torch.nn.functional.softplus(method._logits(at.mixed, at)).mean()
        expected += torch.nn.functional.softplus(-method._logits(at.batch.latents, at)).mean()
    assert logs["discriminator"] == pytest.approx(expected.item(), rel=1e-5)
    _, none = start(mix_share=0.0)
    assert torch.equal(none.mixed, none.fake)


def test_mixing_is_drawn_again_for_every_update(start):
    _, at = start(size=16, mix_share=0.5)
    first = at.mixed
    at.redraw()
    assert not torch.equal(first, at.mixed)


def test_r1_is_lazy_and_of_a_single_sample(dataset):
    config = Diffusion2GANConfig(r1=2.0, r1_every=4)
    logs = [event.logs for event in train(toy_run(dataset, ladd=config, steps=9))]
    assert [i for i, log in enumerate(logs) if "r1" in log] == [0, 4, 8]

    method = toy_method(dataset, config)
    at = method.start(dataset.batch(0, 8, 0), ItemNoise(3, range(8)), 4)
    penalty = method.single_sample_r1(at)
    real = at.batch.latents[:1].clone().requires_grad_()
    logit = method.discriminator(real, at.unit_noise[:1], at.batch.cond[:1]).mean()
    by_hand = torch.autograd.grad(logit, real)[0].square().sum()
    assert penalty.item() == pytest.approx(by_hand.item(), rel=1e-5)
    with_penalty = method.discriminator_loss(at)[0]
    at.number = 5
    without = method.discriminator_loss(at)[0]
    assert with_penalty.item() == pytest.approx(without.item() + 4 * 2.0 * penalty.item(), rel=1e-5)


@pytest.mark.case("memory 5.1", "R1 of a large latent is taken from differences, without a double backward")
@pytest.mark.parametrize("limit", [("R1_POSITIONS", 23), ("R1_WEIGHTS", 1000)])  # the toy's latents have 24
def test_r1_of_a_large_latent_or_network_needs_no_double_backward(dataset, monkeypatch, limit):
    method = toy_method(dataset, Diffusion2GANConfig(r1=2.0))
    at = method.start(dataset.batch(0, 8, 0), ItemNoise(3, range(8)), 0)
    monkeypatch.setattr(diffusion2gan, *limit)
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **options: pytest.fail("a gradient of a gradient"))
    loss, logs = method.discriminator_loss(at)
    loss.backward()
    moved = [p for p in method.discriminator.parameters() if p.grad is not None and p.grad.any()]
    assert logs["r1"] > 0 and moved


@pytest.mark.case("memory 5.1", "R1 of a large latent is taken from differences, without a double backward")
def test_the_difference_estimates_the_gradients_r1(dataset):
    """Its mean over many noises is the squared norm of the gradient; one draw has a standard deviation of 1.4 x it."""
    method = toy_method(dataset, Diffusion2GANConfig(r1_by="difference"))
    drawn = []
    for seed in range(300):
        at = method.start(dataset.batch(0, 2, 0), ItemNoise(seed, range(2)), 0)
        with torch.no_grad():
            drawn.append(method.r1_by_difference(at).item())
    exact = method.single_sample_r1(at).item()
    assert sum(drawn) / len(drawn) == pytest.approx(exact, rel=0.25)


def test_r1s_gradient_is_the_double_backward(start):
    """d penalty / d weight against central differences of the penalty, in float64."""
    method, at = start()
    method.discriminator.double(), method.teacher.backend.network.double()
    batch = Batch(at.batch.latents.double(), at.batch.cond.to(dtype=torch.float64), at.batch.states.double())
    latents, noise, cond = batch.latents[:1], at.x[:1].double(), batch.cond[:1]
    weight = method.discriminator.trained.blocks[1].inlet.weight

    def penalty():
        real = latents.clone().requires_grad_()
        grad = torch.autograd.grad(method.discriminator(real, noise, cond).mean(), real, create_graph=True)[0]
        return grad.square().sum()

    at.batch, at.x, at.sigma = batch, at.x.double(), at.sigma.double()
    at.__dict__.pop("unit_noise", None)
    real = latents.clone().requires_grad_()
    ours = losses.r1_on_head_inputs(method.discriminator(real, noise, cond), [real])
    (gradient,) = torch.autograd.grad(ours, weight)
    row, column = divmod(gradient.abs().argmax().item(), gradient.shape[1])
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[row, column] += sign * 1e-5
        values.append(penalty().item())
        with torch.no_grad():
            weight[row, column] -= sign * 1e-5
    assert gradient[row, column].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)


def test_the_network_learns_at_its_own_rate(dataset):
    run = toy_run(dataset, ladd=Diffusion2GANConfig(critic_rate=0.1))
    groups = run.optimizers["discriminator"].param_groups
    names = list(run.players[1].parameters)
    assert [g["lr_scale"] for g in groups] == [0.1, 1.0]
    assert len(groups[0]["params"]) == sum(name.startswith("trained.") for name in names)


def test_a_given_distance_is_used_and_draws_from_the_items(dataset):
    calls = []

    def distance(prediction, target, random):
        calls.append(random.uniform())
        return (prediction - target).abs().flatten(1).mean(1)

    method = toy_method(dataset, Diffusion2GANConfig({"pairs": 1.0}))
    method.distance = distance
    at = method.start(dataset.batch(0, 4, 0), ItemNoise(0, range(4)), 0)
    loss, _ = method.generator_loss(at)
    assert loss.item() == pytest.approx((at.fake - at.batch.latents).abs().mean().item(), rel=1e-5) and len(calls) == 1


# Pairs


def test_a_stored_pair_is_reproduced(dataset):
    """The cached noise really leads to the cached latent, and check_pairs says how closely."""
    cond, empty = toy_conds()
    teacher = Guided(Denoiser(ToyBackend()), empty, 2.0)
    assert check_pairs(dataset, teacher) < 1e-5


def test_pairs_of_another_teacher_are_refused(dataset):
    _, empty = toy_conds()
    for other in (Guided(Denoiser(ToyBackend(seed=1)), empty, 2.0), Guided(Denoiser(ToyBackend()), empty, 6.0)):
        with pytest.raises(ValueError, match="does not lead to the stored latent"):
            check_pairs(dataset, other)


def test_the_levels_that_a_dataset_names_are_those_of_its_paths(tmp_path):
    """ComfyUI's datasets may have been sampled on any levels, and say so."""
    _, empty = toy_conds()
    teacher = Guided(Denoiser(ToyBackend()), empty, 2.0)
    taken = teacher_grid(teacher.process, CacheConfig(steps=8, state_sigmas=LEVELS)).tolist()
    assert check_pairs(cache_toy(tmp_path / "same", {"sigmas": taken}), teacher) < 1e-5
    with pytest.raises(ValueError, match="does not lead to the stored latent"):
        check_pairs(cache_toy(tmp_path / "other", {"sigmas": [1.0, 0.0]}), teacher)


def test_a_solver_that_adds_noise_is_refused(tmp_path, monkeypatch):
    _, empty = toy_conds()
    with monkeypatch.context() as patch:
        patch.setitem(SAMPLERS, "euler", SAMPLERS["ancestral"])
        cache_toy(tmp_path)
    with pytest.raises(ValueError, match="sampler that adds noise"):
        check_pairs(LatentDataset(tmp_path), Guided(Denoiser(ToyBackend()), empty, 2.0))


def test_pairs_without_stored_noise_are_refused(tmp_path):
    _, empty = toy_conds()
    teacher = Guided(Denoiser(ToyBackend()), empty, 2.0)
    for name, levels in (("none", ()), ("low", (0.5,))):
        dataset = cache_toy(tmp_path / name, state_sigmas=levels)
        with pytest.raises(ValueError, match="does not store the noise"):
            check_pairs(dataset, teacher)
        with pytest.raises(ValueError, match="stored states|both trained and stored"):
            list(train(toy_run(dataset, ladd=Diffusion2GANConfig())))


# Refusals and architectures


@pytest.mark.parametrize("bad", [{"critic": "clone"}, {"mix_share": 1.0}, {"r1_every": 0}, {"terms": {"l1": 1.0}}])
def test_impossible_settings_are_refused(bad):
    with pytest.raises(ValueError):
        Diffusion2GANConfig(**bad)


def test_mixing_needs_a_batch(dataset):
    with pytest.raises(ValueError, match="at least 2"):
        list(train(toy_run(dataset, ladd=Diffusion2GANConfig(), batch_size=1)))
    list(train(toy_run(dataset, ladd=Diffusion2GANConfig(mix_share=0.0), batch_size=1, steps=1)))


def pairs_batch(backend, make_cond, size: int = 4) -> Batch:
    noise = torch.randn(size, CHANNELS, 8, 8, generator=torch.Generator().manual_seed(0))
    top = backend.process.sigma_max
    start = backend.process.noise_scaling(torch.full((size,), top), noise, torch.zeros_like(noise), max_denoise=True)
    latents = torch.randn(noise.shape, generator=torch.Generator().manual_seed(1))
    return Batch(latents, make_cond(size), start.unsqueeze(1), (top,))


@pytest.mark.parametrize("rank, critic, checkpointing", [(2, "copy", False), (0, "lora", False), (2, "lora", True)])
def test_a_step_on_every_family(family, make_backend, make_cond, rank, critic, checkpointing):
    """One step of both phases; under checkpointing the gradients are the same as without."""
    results = []
    for recompute in {False, checkpointing}:
        backend = make_backend(family, gradient_checkpointing=recompute)
        batch = pairs_batch(backend, make_cond)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = Diffusion2GANConfig(critic=critic, critic_rank=2, r1=0.1)
            heads = DiscriminatorConfig(width=8, blocks=1)
            method = new_method(config, Components(backend), batch, rank, discriminator=heads)
            for inlet in method.discriminator.input_convs:
                torch.nn.init.normal_(inlet.weight, std=0.3)
        at = method.start(batch, ItemNoise(0, range(4)), 0)
        assert at.at_top.all() and torch.allclose(at.unit_noise.std(), torch.tensor(1.0), atol=0.1)
        student = list(method.student.trainable().values())
        loss, _ = method.generator_loss(at)
        grads = torch.autograd.grad(loss, student, allow_unused=True)
        assert sum(g is not None and bool(g.any()) for g in grads) > 5
        loss, logs = method.discriminator_loss(at)
        parts = list(method.discriminator.parameters())
        moved = torch.autograd.grad(loss, parts, allow_unused=True)
        assert sum(g is not None and bool(g.any()) for g in moved) > 0.3 * len(parts)
        assert logs["r1"] > 0
        results.append([g for g in (*grads, *moved) if g is not None])
    if checkpointing:
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_terms_settings_are_all_trained(dataset):
    for name in ("diffusion2gan", "diffusion2gan-lora"):
        logs = [event.logs for event in train(toy_run(dataset, ladd=replace(TERMS[name]), steps=2))]
        assert {"pairs", "adversarial", "discriminator", "accuracy"} <= logs[-1].keys()

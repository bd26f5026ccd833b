"""DMD2: the gradient of its term, the fake score, and that each path of the shared backbone is where it belongs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from networks import build_cond
from torch import nn
from toy import TAPS, ToyBackend, cache_toy, toy_method, toy_run

from distill_core.data.dataset import Batch, LatentDataset
from distill_core.diffusion.noise import ItemNoise
from distill_core.diffusion.process import FlowProcess
from distill_core.evaluation.metrics import mini_scores
from distill_core.experiments import compare
from distill_core.experiments.compare import ForwardCount
from distill_core.experiments.entries import Entry, settings
from distill_core.experiments.grounds import clothes
from distill_core.files import load_tensors
from distill_core.methods.components import Components, DiscriminatorConfig
from distill_core.methods.dmd2 import DMD2, MATCHING, DMD2Config, matching_gradient
from distill_core.methods.registry import new_method
from distill_core.models.denoiser import Cond, Denoiser, Limits
from distill_core.models.lora import Lora, LoraSwitch
from distill_core.training.loop import TrainConfig, train
from distill_core.training.preflight import gradient_faults
from distill_core.training.run import RunConfig, StudentConfig, student_of

ALONE, BOTH = {MATCHING: 1.0}, {MATCHING: 1.0, "adversarial": 0.5}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return cache_toy(tmp_path_factory.mktemp("data"))


@pytest.fixture
def start(dataset):
    """start(size=8, rank=2, **config) -> (method, step) on the first batch, with a fake score that was trained."""

    def make(size: int = 8, rank: int = 2, **config):
        method = toy_method(dataset, DMD2Config(**config), rank=rank)
        if method.fake_score is not None:
            disturb(method.fake_score)
        return method, method.start(dataset.batch(0, size, 0), ItemNoise(3, range(size)), 0)

    return make


@torch.no_grad()
def disturb(view: Denoiser) -> None:
    for index, weight in enumerate(view.trainable().values()):
        weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(index)))


# The gradient


@pytest.mark.parametrize("terms", [ALONE, BOTH], ids=["alone", "with a discriminator"])
def test_the_gradient_is_that_of_the_paper(start, terms):
    """(x0_fake - x0_real) / mean |x - x0_real| of each item, written out in float64; 2.0 is the guidance scale."""
    method, at = start(terms=terms)
    (gradient,) = torch.autograd.grad(method.matching_term(at), at.fake)

    for weight in (*method.teacher.backend.network.parameters(), *method.fake_score.lora.parameters()):
        weight.data = weight.data.double()
    x, sigma = at.fake.detach().double(), at.renoise_sigma.double()
    cond, empty = (c.to(dtype=torch.float64) for c in (at.batch.cond, method.guided_teacher.uncond[[0] * 8]))
    level = sigma.view(-1, 1, 1, 1)
    noised = (1 - level) * x + level * at.renoise.double()
    with torch.no_grad():
        text, none = method.teacher(noised, sigma, cond), method.teacher(noised, sigma, empty)
        real, fake = none + 2.0 * (text - none), method.fake_score(noised, sigma, cond)
    by_hand = (fake - real) / (x - real).abs().mean((1, 2, 3), keepdim=True) / x.numel()
    assert by_hand.abs().max() > 1e-4
    torch.testing.assert_close(gradient.double(), by_hand, atol=1e-8, rtol=1e-4)


def test_the_gradient_is_finite_where_the_teacher_would_change_nothing():
    x = torch.ones(2, 4, 2, 2)
    assert matching_gradient(x, x, x).abs().max() == 0
    assert matching_gradient(x, x, x + 1e-8).isfinite().all()


def test_items_that_are_denoised_do_not_count(start):
    _, all_matched = start(terms=ALONE)
    method, at = start(terms={MATCHING: 1.0, "denoising": 1.0}, denoising_share=0.5)
    assert 0 < at.denoises.sum() < 8 and not all_matched.denoises.any()
    (gradient,) = torch.autograd.grad(method.matching_term(at), at.fake)
    counts = gradient.flatten(1).abs().sum(1) > 0
    assert torch.equal(counts, ~at.denoises)
    error = (at.fake_answer - at.fake).square().mean((1, 2, 3)) / at.renoise_sigma**2 * ~at.denoises
    assert method.fake_score_loss(at)[0].item() == pytest.approx(error.mean().item(), rel=1e-4)


# The fake score


class Dots(nn.Module):
    """A velocity for each value of a latent by itself, from the value and the time."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 48), nn.Linear(48, 48), nn.Linear(48, 1)])

    def forward(self, x, timestep):
        both = torch.stack([x, (timestep / 1000).view(-1, 1, 1, 1).expand_as(x)], dim=-1)
        first, second, last = self.layers
        return last(torch.tanh(second(torch.tanh(first(both)))))[..., 0]


class DotsBackend:
    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.network = Dots().requires_grad_(False)
        self.process, self.switch = FlowProcess(), LoraSwitch()

    def forward(self, x, timestep, cond):
        return self.network(x, timestep)

    def limits(self) -> Limits:
        return Limits()


class GaussianStudent(Denoiser):
    """Its results are 0.5 + 0.3 times the noise that it starts from."""

    def __call__(self, x, sigma, cond):
        return 0.5 + 0.3 * x


def test_the_fake_score_learns_the_students_distribution():
    """Of results from N(0.5, 0.3^2) it comes to answer E[x0 | x_t], which the teacher misses by far."""
    backend = DotsBackend()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        fake = Denoiser(backend, Lora(backend.network, [f"layers.{i}" for i in range(3)], 48, backend.switch))
    method = DMD2(
        GaussianStudent(backend), Denoiser(backend), fake, None, config=DMD2Config(ALONE, student_sigmas=(1.0,))
    )
    player = method.players(TrainConfig(student_lr=1e-2))[1]
    optimizer = torch.optim.Adam(player.parameters.values(), player.lr, betas=(0.9, 0.99))
    batch = Batch(torch.zeros(16, 1, 6, 6), Cond(torch.zeros(16, 1, 1)))
    for number in range(400):
        optimizer.param_groups[0]["lr"] = player.lr * (1 - number / 400)
        at = method.start(batch, ItemNoise(0, range(16 * number, 16 * number + 16)), number)
        optimizer.zero_grad()
        player.loss(at)[0].backward()
        optimizer.step()

    worst, before = 0.0, 0.0
    for time in (0.3, 0.6, 0.9):
        mean, deviation = (1 - time) * 0.5, ((1 - time) ** 2 * 0.09 + time**2) ** 0.5
        x = (mean + deviation * torch.linspace(-1.5, 1.5, 36)).view(1, 1, 6, 6)
        expected = 0.5 + (1 - time) * 0.09 / deviation**2 * (x - mean)
        sigma = torch.tensor([time])
        with torch.no_grad():
            worst = max(worst, (fake(x, sigma, batch.cond[:1]) - expected).square().mean().sqrt().item())
            before = max(before, (method.teacher(x, sigma, batch.cond[:1]) - expected).square().mean().sqrt().item())
    assert worst < 0.04 and before > 0.8


def test_the_fake_score_begins_as_the_teacher(dataset):
    for rank, own in ((2, 0), (0, 0), (0, 3), (2, 5)):
        method = toy_method(dataset, DMD2Config(ALONE, fake_score_rank=own), rank=rank)
        batch, sigma = dataset.batch(0, 4, 0), torch.full((4,), 0.5)
        answers = [view(batch.latents, sigma, batch.cond) for view in (method.teacher, method.fake_score)]
        assert torch.equal(*answers)
        lora = method.fake_score.lora
        assert (lora.rank if lora else 0) == (own or rank)
        assert (method.fake_score.backend is method.teacher.backend) == (lora is not None)


@pytest.mark.parametrize("rank, own", [(2, 0), (0, 0), (0, 3)])
def test_each_path_is_in_its_own_view_only(dataset, rank, own):
    """LoRAs of student and fake score on one backbone, copies of it, and a path beside a copy."""
    method = toy_method(dataset, DMD2Config(BOTH, fake_score_rank=own), rank=rank)
    batch, sigma = dataset.batch(0, 4, 0), torch.full((4,), 0.5)
    views = {"student": method.student, "teacher": method.teacher, "fake score": method.fake_score}

    def answers():
        with torch.no_grad():
            found = {name: view(batch.latents, sigma, batch.cond) for name, view in views.items()}
            return found | {"maps": torch.cat(method.teacher.features(batch.latents, sigma, batch.cond, TAPS))}

    for name in ("fake score", "student"):
        before = answers()
        disturb(views[name])
        after = answers()
        assert [n for n in before if not torch.equal(before[n], after[n])] == [name]


# One forward for two


def test_one_forward_gives_the_answer_and_the_features(family, make_backend, make_cond):
    backend = make_backend(family)
    teacher, cond = Denoiser(backend), make_cond(2)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sigma, taps = backend.process.sigma_at_flow_time(torch.tensor([0.3, 0.8])), backend.default_taps(2)
    answer, maps = teacher.with_features(x, sigma, cond, taps)
    assert torch.equal(answer, teacher(x, sigma, cond))
    for one, other in zip(maps, teacher.features(x, sigma, cond, taps), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "terms, updates, forwards",
    [
        (ALONE, 1, 4),  # student, teacher with and without the text, fake score
        (BOTH, 1, 5),  # and the teacher's features of real latents
        (dict(reversed(BOTH.items())), 1, 5),
        (BOTH, 3, 7),  # and the fake score twice more
        ({"adversarial": 1.0}, 1, 3),
    ],
)
def test_a_step_costs_as_many_forwards_as_it_must(dataset, terms, updates, forwards):
    run = toy_run(dataset, ladd=DMD2Config(terms, fake_score_updates=updates, own_share=0.0), steps=2)
    with ForwardCount(backbone=run.method.teacher.backend.network) as count:
        for _ in train(run):
            pass
    assert count.items["backbone"] == forwards * 2 * 4  # steps, items


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_on_every_family(family, make_backend, checkpointing):
    """Each player's loss, one after the other as in training; recomputed blocks see the path that was on."""
    results = []
    for recompute in {False, checkpointing}:
        backend, cond = make_backend(family, gradient_checkpointing=recompute), build_cond(4)
        latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        batch, heads = Batch(latents, cond), DiscriminatorConfig(width=8, blocks=1)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = DMD2Config(BOTH)
            shared = {"discriminator": heads, "uncond": build_cond(1, seed=7), "guidance": 3.0}
            method = new_method(config, Components(backend), batch, 2, **shared)
        disturb(method.student), disturb(method.fake_score)
        at, found = method.start(batch, ItemNoise(0, range(4)), 0), []
        for player in method.players(TrainConfig()):
            weights = list(player.parameters.values())
            grads = torch.autograd.grad(player.loss(at)[0], weights, allow_unused=True)
            assert sum(g is not None and bool(g.any()) for g in grads) > 0.8 * len(grads)
            found += [g for g in grads if g is not None]
        results.append(found)
    if checkpointing:
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


# Training


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("terms", [ALONE, BOTH], ids=["alone", "with a discriminator"])
def test_each_loss_trains_its_own_player(dataset, terms, guidance):
    """Also without guidance, where the fake score is the teacher at first and nothing is to be gained."""
    run = toy_run(dataset, ladd=DMD2Config(terms))
    run.method.guided_teacher.scale = guidance
    before = {name: p.clone() for player in run.players for name, p in player.parameters.items()}
    assert not list(gradient_faults(run, run.batch(0)[0]))
    after = {name: p for player in run.players for name, p in player.parameters.items()}
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("rank", [2, 0], ids=["lora", "full"])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(dataset, tmp_path, rank):
    """The second path, its optimizer and its draws, with several updates a step: equal to the last bit."""
    config = DMD2Config(BOTH, fake_score_updates=3, fake_score_lr=3e-3)

    def new(folder):
        return toy_run(dataset, folder, config, rank=rank)

    run = new(tmp_path / "a")
    frozen = {name: p.clone() for name, p in run.method.teacher.backend.network.named_parameters()}
    rates = {player.name: (player.lr, player.updates) for player in run.players}
    assert rates == {"generator": (1e-2, 1), "discriminator": (1e-2, 1), "fake_score": (3e-3, 3)}
    for event in train(run):
        assert {MATCHING, "adversarial", "discriminator", "fake_score", "fake_score_grad_norm"} <= event.logs.keys()
        if event.step == 3:
            break
    now = dict(run.method.teacher.backend.network.named_parameters())
    assert all(torch.equal(frozen[name], now[name]) for name in frozen)
    for folder in "ab":
        assert [event.step for event in train(new(tmp_path / folder))][-1] == 6
    (a, _), (b, _) = (load_tensors(tmp_path / x / "checkpoint.safetensors") for x in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert any(key.startswith("fake_score.") for key in a)
    assert any(key.startswith("optimizer.fake_score.") and key.endswith("exp_avg_sq") for key in a)
    with pytest.raises(ValueError, match="fake_score_lr"):
        list(train(toy_run(dataset, tmp_path / "a", replace(config, fake_score_lr=1e-3), rank=rank)))


def test_updates_after_the_first_see_fresh_noise(start):
    method, at = start(terms=BOTH)
    levels, noises = [], []
    for _ in range(3):
        method.fake_score_loss(at)
        levels.append(at.renoise_sigma), noises.append(at.renoise)
        at.release(), at.redraw()
    assert not torch.equal(levels[0], levels[1]) and not torch.equal(noises[1], noises[2])
    assert all((0.02 <= level).all() and (level <= 0.98).all() for level in levels)


def test_without_its_term_there_is_no_fake_score(dataset):
    method = toy_method(dataset, DMD2Config({"pairs": 1.0}))
    assert method.fake_score is None and [p.name for p in method.players(TrainConfig())] == ["generator"]


def test_ten_steps_on_the_mini_model_lower_its_fd(tmp_path):
    """By distribution matching alone; the file has the student's path and nothing of the fake score."""
    ground = clothes()
    ground = replace(ground, cache=replace(ground.cache, count=64, steps=4, batch_size=64))
    ground.cache_dataset(0, tmp_path)
    method = DMD2Config(ALONE, fake_score_updates=1)
    run = compare.prepare(ground, Entry(method, settings(10, 16, 1e-3)), LatentDataset(tmp_path), 0)

    def fd() -> float:
        latents = ground.samples(run.method.student, 1, 100, sampler="euler")
        return mini_scores(latents, torch.arange(100) % 10, pixels=False)["fd"]

    before = fd()
    for _ in train(run):
        pass
    identities = {"base": "", "dataset": ""}
    config = RunConfig(method, run.config, StudentConfig(32), identities)
    state, said = student_of(run, config)
    with run.ema_weights():
        assert fd() < 0.85 * before
        own = run.method.student.lora.export()
    assert state.keys() == own.keys() and all(torch.equal(state[key], own[key]) for key in own)
    assert said["method"] == "DMD2" and said["weights"] == "lora" and len(said["sigmas"]) == 4


# Refusals


@pytest.mark.parametrize(
    "bad", [{"time_range": (0.9, 0.1)}, {"time_range": (0.0, 1.5)}, {"fake_score_updates": 0}, {"terms": {"l1": 1.0}}]
)
def test_impossible_settings_are_refused(bad):
    with pytest.raises(ValueError):
        DMD2Config(**bad)


def test_what_is_missing_is_said():
    teacher = Denoiser(ToyBackend())
    with pytest.raises(ValueError, match="needs a fake score"):
        DMD2(teacher, teacher, None, None, config=DMD2Config(ALONE))
    with pytest.raises(ValueError, match="needs the empty conditioning"):
        DMD2(teacher, teacher, teacher, None, config=DMD2Config(ALONE), guidance=2.0)
    with pytest.raises(ValueError, match="needs a discriminator"):
        DMD2(teacher, teacher, teacher, None, config=DMD2Config(BOTH))


def test_a_second_network_beside_shared_weights_is_refused(dataset, monkeypatch):
    monkeypatch.setattr(Denoiser, "together", True)
    with pytest.raises(ValueError, match="set fake_score_rank"):
        toy_method(dataset, DMD2Config(ALONE), rank=0)
    assert toy_method(dataset, DMD2Config(ALONE, fake_score_rank=2), rank=0).fake_score.lora.rank == 2

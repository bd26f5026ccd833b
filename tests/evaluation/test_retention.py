"""The retention score: 1 for the same model, lower for blur, noise, drift and lost variety, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy import LEVELS, ToyBackend, toy_conds

from distill_core.diffusion.process import DiscreteProcess, FlowProcess
from distill_core.diffusion.schedules import explicit_sigmas
from distill_core.evaluation.concept_gain import concept_gain, energy_distance
from distill_core.evaluation.retention import (
    FINER,
    Asked,
    finer_levels,
    retention,
    sample_answers,
    sample_step_gaps,
    score,
)
from distill_core.models.denoiser import Denoiser

PROMPTS, NOISES = 3, 8


def answers(seed: int = 0) -> torch.Tensor:
    """Latents [24, 4, 16, 16] with a mean of their own for each prompt, and fine detail."""
    g = torch.Generator().manual_seed(seed)
    means = torch.randn(PROMPTS, 4, 16, 16, generator=g)
    items = 0.7 * torch.randn(PROMPTS * NOISES, 4, 16, 16, generator=g)
    return torch.nn.functional.avg_pool2d(items + means.repeat(NOISES, 1, 1, 1), 3, 1, 1) * 2


def blurred(x: torch.Tensor, share: float) -> torch.Tensor:
    return (1 - share) * x + share * torch.nn.functional.avg_pool2d(x, 3, 1, 1)


def noised(x: torch.Tensor, share: float) -> torch.Tensor:
    return x + share * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))


def alike(x: torch.Tensor, share: float) -> torch.Tensor:
    """Each prompt's answers moved towards their mean."""
    means = x.unflatten(0, (NOISES, PROMPTS)).mean(0).repeat(NOISES, 1, 1, 1)
    return (1 - share) * x + share * means


def moved(x: torch.Tensor, share: float) -> torch.Tensor:
    return x + share


def test_the_same_model_has_lost_nothing():
    figures = retention(answers(), answers(), PROMPTS)
    wanted = {"retention": 1.0, "sharpness": 1.0, "variety": 1.0, "drift": 0.0}
    assert {name: figure.value for name, figure in figures.items()} == pytest.approx(wanted)
    assert figures["retention"].interval() == pytest.approx((1.0, 1.0))


@pytest.mark.parametrize("damage", [blurred, noised, alike, moved], ids=lambda f: f.__name__)
def test_more_damage_is_a_lower_score(damage):
    before = answers()
    scores = [
        retention(before, damage(before, share), PROMPTS, repeats=0)["retention"].value
        for share in (0, 0.1, 0.3, 0.6, 0.9)
    ]
    assert scores[0] == pytest.approx(1.0) and scores == sorted(scores, reverse=True) and scores[-1] < 0.75, scores


def test_the_parts_name_the_damage():
    before = answers()
    parts = lambda damage: {n: f.value for n, f in retention(before, damage(before, 0.6), PROMPTS, repeats=0).items()}  # noqa: E731
    assert parts(blurred)["sharpness"] < 0.7 < parts(moved)["sharpness"]
    assert parts(alike)["variety"] == pytest.approx(0.4, abs=1e-3) and parts(moved)["variety"] == pytest.approx(1)
    assert parts(noised)["sharpness"] > 1.5 and parts(moved)["drift"] > 0.3


def test_another_answer_to_each_prompt_is_a_drift_of_1():
    """The answers of a prompt, handed round among its noises."""
    before = answers()
    figures = retention(before, before.roll(PROMPTS, 0), PROMPTS)
    low, high = figures["drift"].interval()
    assert low < 1 < high and figures["variety"].value == pytest.approx(1) and low > 0.9
    assert figures["retention"].value == pytest.approx(0.5, abs=0.03)


@given(st.floats(0.01, 100), st.floats(0.01, 100), st.floats(0, 10))
def test_the_score_is_from_0_to_1_and_falls_with_each_part(sharpness, variety, drift):
    now = score(*map(torch.tensor, (sharpness, variety, drift)))
    further = lambda ratio: ratio * (1.5 if ratio >= 1 else 1 / 1.5)  # noqa: E731
    worse = [
        (further(sharpness), variety, drift),
        (sharpness, further(variety), drift),
        (sharpness, variety, drift + 1),
    ]
    assert 0 < now <= 1 and all(score(*map(torch.tensor, parts)) < now for parts in worse)


def test_intervals_cover_the_figure_of_other_noises():
    """Of 40 sets of noises, most have the long run's value in their 95 % interval."""
    many = 4000
    g = torch.Generator().manual_seed(3)
    before = torch.randn(PROMPTS * many, 2, 8, 8, generator=g)
    after = 0.8 * before + 0.3 * torch.randn(before.shape, generator=g)
    inside = {"retention": 0, "drift": 0, "variety": 0}
    whole = retention(before[: PROMPTS * 400], after[: PROMPTS * 400], PROMPTS, repeats=0)
    for number in range(40):
        rows = slice(number * PROMPTS * 16, (number + 1) * PROMPTS * 16)
        figures = retention(before[rows], after[rows], PROMPTS)
        for name in inside:
            low, high = figures[name].interval()
            inside[name] += low <= whole[name].value <= high
    assert all(count >= 34 for count in inside.values()), inside


def test_two_noises_of_each_prompt_have_intervals():
    few = slice(2 * PROMPTS)
    figures = retention(answers()[few], blurred(answers(), 0.5)[few], PROMPTS)
    assert all(figure.replicates.isfinite().all() for figure in figures.values())


REFUSED = {
    "not finite": (answers(), answers() * float("nan")),
    "have the shapes": (answers(), answers()[:, :2]),
    "at least 2": (answers()[:PROMPTS], answers()[:PROMPTS]),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_cannot_be_compared_is_refused(said):
    with pytest.raises(ValueError, match=said):
        retention(*REFUSED[said], PROMPTS)


def asked() -> Asked:
    conds, _ = toy_conds(PROMPTS)
    return Asked([conds[[i]] for i in range(PROMPTS)], explicit_sigmas(LEVELS), (4, 6, 6), 4, "ancestral", {"eta": 1.0})


def test_a_model_is_asked_the_same_each_time_and_its_lora_is_seen():
    backend = ToyBackend()
    lora = backend.new_lora(2)
    with torch.no_grad():
        for up in lora.up:
            up.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    done: list[int] = []
    before = sample_answers(Denoiser(backend), asked(), done.append)
    assert torch.equal(before, sample_answers(Denoiser(backend), asked())) and sum(done) == asked().forwards
    after = sample_answers(Denoiser(backend, lora), asked())
    gaps = [sample_step_gaps(Denoiser(backend, path), asked()) for path in (None, lora)]
    figures = retention(before, after, PROMPTS, (gaps[0], gaps[1]))
    assert figures["drift"].value > 0.05 and figures["few_to_many"].value != pytest.approx(1)
    assert retention(before, before, PROMPTS, (gaps[0], gaps[0]))["few_to_many"].value == pytest.approx(1)


def test_an_item_has_its_prompt_and_noise_in_any_company():
    """Prompts asked alone get the answers that they get among others, from noises of their own."""
    whole = sample_answers(Denoiser(ToyBackend()), asked())
    assert len({row.sum().item() for row in whole}) == PROMPTS * 4
    conds = asked().conds
    other = Asked([conds[0], conds[1], conds[0]], *[getattr(asked(), n) for n in ("sigmas", "shape", "noises")])
    first, second = (sample_answers(Denoiser(ToyBackend()), a) for a in (other, Asked(conds, *asked_tail(other))))
    assert torch.allclose(first[0::3], second[0::3], atol=1e-6) and not torch.allclose(first[2], second[2], atol=1e-3)


def asked_tail(a: Asked) -> tuple:
    return a.sigmas, a.shape, a.noises


@pytest.mark.parametrize("process", [FlowProcess(), DiscreteProcess(torch.linspace(0.999, 0.9, 100).cumprod(0))])
def test_finer_levels_go_through_the_turbos(process):
    sigmas = explicit_sigmas([process.sigma_max, process.sigma_max / 2, process.sigma_max / 5])
    fine = finer_levels(sigmas, process)
    assert len(fine) == FINER * 3 + 1 and fine[::FINER].tolist() == sigmas.tolist()
    assert (fine.diff() < 0).all()


def test_the_gain_is_the_share_of_the_distance_that_is_gone():
    g = torch.Generator().manual_seed(0)
    own, before, after = (torch.randn(64, 12, generator=g) + shift for shift in (0, 2.0, 0.0))
    figures = concept_gain(own, before, after)
    assert figures["concept_before"].interval()[0] > 0.3 and abs(figures["concept_after"].value) < 0.05
    assert figures["gain"].value == pytest.approx(1, abs=0.1)
    assert concept_gain(own, before, before)["gain"].value == pytest.approx(0)
    assert -1.1 < concept_gain(own, after, before)["gain"].value < -0.9
    assert abs(concept_gain(own, own + 1e-3, own)["gain"].value) < 0.1, "nothing to gain"
    with pytest.raises(ValueError, match="at least two"):
        concept_gain(own[:1], before, after)
    with pytest.raises(ValueError, match="not finite"):
        concept_gain(own, before, after * float("inf"))


def test_the_energy_distance_is_that_of_its_definition():
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    far = lambda a, b: (a - b).norm().item()  # noqa: E731
    across = sum(far(a, b) for a in x for b in y) / 20
    within_x = sum(far(a, b) for a in x for b in x) / 20
    within_y = sum(far(a, b) for a in y for b in y) / 12
    found = energy_distance(x, y, torch.ones(1, 5, dtype=torch.float64))
    assert found.item() == pytest.approx((2 * across - within_x - within_y) / within_y)

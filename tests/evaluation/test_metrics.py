"""The figures of a set of samples, all together."""

from dataclasses import replace

import pytest
import torch

from distill_core.evaluation.intervals import Bootstrap
from distill_core.evaluation.metrics import Evaluator, MiniEvaluator, diversity, mini_scores
from distill_core.evaluation.spaces import mini_space
from distill_core.models import mini

OWN = {"drift", "drift_pixels", "coherence", "detail_ratio", "detail_error"}
DETAIL = {"detail", "edges", "kurtosis"}


@pytest.fixture(scope="module")
def latents() -> torch.Tensor:
    return torch.randn(60, *mini.LATENT_SHAPE, generator=torch.Generator().manual_seed(0))


def test_the_evaluator_reports_both_spaces_and_the_detail(latents):
    """Noise is far from the data in both, and a set at the reference's own moments would be at 0."""
    figures = MiniEvaluator(repeats=20)(latents, torch.arange(60) % 10, own=latents[:30])
    spaces = {f"{name}{suffix}" for name in ("fd", "accuracy", "diversity") for suffix in ("", "_pixels")}
    assert figures.keys() == spaces | DETAIL | OWN
    floor = mini.training_log()["floor"]
    assert figures["fd"].value > 5 * floor["fd"] and figures["fd_pixels"].value > 5 * floor["fd_pixels"]
    assert figures["accuracy"].value < 0.5 and figures["diversity"].value > 0
    assert figures["drift"].value == 0 and figures["coherence"].value == pytest.approx(1, abs=1e-5)
    assert figures["detail_ratio"].value == pytest.approx(1, abs=1e-5)
    for name in spaces | DETAIL:
        low, high = figures[name].interval()
        assert low < high and len(figures[name].replicates) == 20, name


def test_figures_do_not_depend_on_the_batches(latents):
    one, other = MiniEvaluator(repeats=5), MiniEvaluator(repeats=5)
    other.size = 7
    labels = torch.arange(60) % 10
    for name, figure in one(latents, labels, latents[5:35]).items():
        again = other(latents, labels, latents[5:35])[name] if name == "fd" else None
        assert again is None or again.value == pytest.approx(figure.value, rel=1e-4)
    assert other.decode(latents[:20]).shape == (20, 3, 64, 64)


def test_accuracy_counts_the_classes_asked_for(latents):
    net, _ = mini.load_classifier("latent")
    labels = net(mini.classifier_input("latent", latents)).argmax(1)
    labels[:15] = (labels[:15] + 1) % 10
    assert mini_scores(latents, labels, pixels=False)["accuracy"] == pytest.approx(45 / 60)


def test_a_reference_adds_density_and_coverage(latents):
    figures = MiniEvaluator(pixels=False, repeats=10, examples=latents)(latents, torch.arange(60) % 10)
    assert figures.keys() == {"fd", "accuracy", "diversity", "density", "coverage"}
    assert figures["coverage"].value == 1  # every example is in its own ball


def test_diversity_is_the_spread_within_classes():
    """By torch's own standard deviation, for the set and for a resample's repeated rows."""
    labels = torch.arange(40) % 4
    features = torch.randn(40, 3, generator=torch.Generator().manual_seed(1)) + 100 * labels[:, None]
    bootstrap = Bootstrap(40, strata=4, repeats=2)
    figure = diversity(features, labels, bootstrap)

    def brute_force(counts: torch.Tensor) -> float:
        x, of = features.repeat_interleave(counts, 0), labels.repeat_interleave(counts)
        return torch.stack([x[of == label].double().std(0).mean() for label in range(4)]).mean().item()

    assert figure.value == pytest.approx(brute_force(torch.ones(40, dtype=torch.long)), rel=1e-6)
    for counts, value in zip(bootstrap.counts.long(), figure.replicates, strict=True):
        assert value.item() == pytest.approx(brute_force(counts), rel=1e-5)


def test_the_quick_scores_are_the_values(latents):
    labels = torch.arange(60) % 10
    figures = MiniEvaluator(pixels=False, repeats=3)(latents, labels)
    assert mini_scores(latents, labels, pixels=False) == {name: round(f.value, 4) for name, f in figures.items()}


def test_words_are_counted_by_group_and_together():
    """Two heads on one space: each group by itself, and their mean over the same items."""
    latents = torch.randn(12, *mini.LATENT_SHAPE, generator=torch.Generator().manual_seed(2))
    space = replace(mini_space("latent"), heads={"side": lambda x: x[:, :2], "size": lambda x: x[:, 2:5]})
    features = space.features(latents, latents)
    groups = {"side": torch.arange(12) % 2, "size": torch.arange(12) % 3}
    figures = Evaluator([space], None, repeats=10)(latents, groups)
    assert figures.keys() == {"fd", "accuracy_side", "accuracy_size", "alignment", "diversity"}
    right = torch.stack([features[:, :2].argmax(1) == groups["side"], features[:, 2:5].argmax(1) == groups["size"]])
    assert figures["accuracy_side"].value == pytest.approx(right[0].double().mean().item())
    assert figures["accuracy_size"].value == pytest.approx(right[1].double().mean().item())
    assert figures["alignment"].value == pytest.approx(right.double().mean().item())
    within = diversity(features, torch.arange(12) % 6, Bootstrap(12, strata=6, repeats=10))
    assert figures["diversity"].value == pytest.approx(within.value)
    assert torch.allclose(figures["diversity"].replicates, within.replicates)


def test_groups_that_no_head_knows_leave_accuracy_out(latents):
    figures = Evaluator([mini_space("latent")], None, repeats=3)(latents, {"texture": torch.arange(60) % 10})
    assert figures.keys() == {"fd"}

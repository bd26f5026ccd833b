import numpy as np
import pytest
import torch

from distill_core.evaluation.live_plots import COLOURS, curves, grid, stack
from distill_core.evaluation.plots import line, panels, training_curves


def logs(values) -> list[dict]:
    return [{"step": i + 1, "adversarial": v, "accuracy": 0.5} for i, v in enumerate(values)]


def strong_points(image) -> np.ndarray:
    """Rows and columns of the first series' strong line in the first panel, without its label."""
    pixels = np.asarray(image)[24:, : image.width // 2]
    return np.argwhere((pixels == np.array(COLOURS[0])).all(-1))


def test_a_falling_loss_is_drawn_falling():
    down, up = (strong_points(curves(logs(values))) for values in (range(300, 0, -1), range(300)))
    for points, sign in ((down, 1), (up, -1)):
        left, right = (points[points[:, 1] < 150][:, 0].mean(), points[points[:, 1] > 300][:, 0].mean())
        assert sign * (right - left) > 50


def test_what_only_some_steps_have_is_drawn_where_it_was_measured():
    """Three validations in 300 steps: a line over all steps, and not one over the first three."""
    measured = {0: 3.0, 149: 2.0, 299: 1.0}
    entries = [{"step": i + 1} | ({"validation": measured[i]} if i in measured else {}) for i in range(300)]
    values, strong = line(entries, "validation")
    assert values == strong == [3.0] * 149 + [2.0] * 150 + [1.0]
    assert line(entries, "pairs") == ([], [])
    points = strong_points(curves(entries))
    left, right = points[points[:, 1] < 200][:, 0].mean(), points[(points[:, 1] > 300) & (points[:, 1] < 400)][:, 0]
    assert right.mean() - left > 50


@pytest.mark.parametrize("values", [[], [1.0], [2.0] * 5, [1.0, float("nan"), float("inf"), 2.0]])
def test_any_log_can_be_drawn(values):
    image = curves(logs(values), 600, 300, title="t")
    assert image.size == (600, 300)


def test_without_a_discriminator_its_panels_leave_their_room_to_the_others():
    game = [{"step": 1, "adversarial": 1.0, "accuracy": 0.5, "logit_gap": 0.1, "generator_grad_norm": 1.0}] * 2
    plain = [{"step": 1, "denoising": 1.0, "generator_grad_norm": 1.0}] * 2
    upper, lower = slice(0, 230), slice(250, 480)
    for logs, filled in ((game, True), (plain, False)):
        pixels = np.asarray(curves(logs))
        titles = (pixels[lower, :200] < 100).all(-1).any()  # in ink
        assert titles == filled and (pixels[upper, :200] < 100).all(-1).any() and pixels.shape[:2] == (480, 860)


def test_a_grid_keeps_places_and_proportions():
    red, blue = torch.zeros(2, 8, 16, 3), torch.zeros(1, 16, 16, 3)
    red[..., 0], blue[..., 2] = 1.0, 1.0
    image = np.asarray(grid([("a", red), ("b", blue)], cell=32))
    label = image.shape[1] - 2 * 36
    assert (image[6 + 8, label + 16] == (255, 0, 0)).all() and (image[6 + 24, label + 16] == 255).all()
    assert (image[6 + 36 + 24, label + 16] == (0, 0, 255)).all() and (image[6 + 36 + 8, label + 36 + 16] == 255).all()


def test_pictures_are_stacked_below_each_other():
    parts = [curves(logs([1.0, 2.0]), width, 100) for width in (300, 200)]
    assert stack(parts).size == (300, 200)


def test_every_term_and_player_of_a_log_has_its_curve():
    """Also those of a method that this file has never heard of; what is no loss is in its own panel or in none."""
    entry = {"step": 1, "health": "healthy", "rate": 1.0, "r1": 0.1, "diversity": 0.9, "logit_spread": 0.2}
    entry |= {"adversarial": 1.0, "distribution matching": 2.0, "fake score": 3.0, "accuracy": 0.5, "logit_gap": 0.1}
    entry |= {"generator_grad_norm": 1.0, "fake score_grad_norm": 2.0}
    drawn = {title: names for title, names in panels([entry])}
    assert drawn["losses"] == ["adversarial", "distribution matching", "fake score"]
    assert drawn["gradient norms"] == ["generator_grad_norm", "fake score_grad_norm"]
    assert drawn["discriminator accuracy"] == ["accuracy"] and drawn["logit gap, real - fake"] == ["logit_gap"]
    many = {"step": 1} | {f"term {i}": float(i) for i in range(12)}
    pixels = np.asarray(curves([many, many]))[30:, :400].reshape(-1, 3)
    assert all((pixels == np.array(colour)).all(-1).any() for colour in COLOURS), "no line is left out"


def test_what_is_told_of_pairs_is_no_loss_and_has_panels_of_its_own(tmp_path):
    """They are drawn by both kinds of curves, beside a run that has none."""
    entry = {"step": 1, "preference": 0.7, "implicit_accuracy": 0.5, "margin": 2.0, "chosen": -0.1, "rejected": -0.2}
    entry |= {"validation": 0.6, "validation_accuracy": 0.9, "generator_grad_norm": 1.0}
    drawn = {title: names for title, names in panels([entry])}
    assert drawn["losses"] == ["preference", "validation"] and len(drawn) == 7
    assert drawn["pairs in the right order"] == ["implicit_accuracy", "validation_accuracy"]
    assert drawn["margin of the pairs"] == ["margin"]
    assert drawn["errs less than the reference by"] == ["chosen", "rejected"]
    assert len(panels([{"step": 1, "adversarial": 1.0}])) == 4
    plain = [{"step": 1, "denoising": 1.0, "generator_grad_norm": 1.0}] * 2
    with_pairs, without = (np.asarray(curves(logs)) for logs in ([entry, entry], plain))
    third = lambda pixels: (pixels[320:345, :200] < 100).all(-1).any()  # noqa: E731  a title
    assert third(with_pairs) and not third(without) and with_pairs.shape == without.shape, "a third row of panels"
    training_curves({"pairs": [entry, entry], "plain": plain}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000

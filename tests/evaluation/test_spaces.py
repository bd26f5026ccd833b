"""Feature spaces: what they see, and which student may not be scored in them."""

import pytest
import torch

from distill_core.evaluation.spaces import imagenet_features, imagenet_space, mini_space, trained_on
from distill_core.models import mini


def test_the_classifiers_see_what_they_were_trained_on():
    latents = torch.randn(3, *mini.LATENT_SHAPE, generator=torch.Generator().manual_seed(0))
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    for name, suffix, x in (("latent", "", latents), ("pixel", "_pixels", images)):
        space, (net, reference) = mini_space(name), mini.load_classifier(name)
        assert space.suffix == suffix and torch.equal(space.reference.cov, reference["cov"])
        features = space.features(latents, images)
        assert features.shape == (3, 64)
        torch.testing.assert_close(space.heads[""](features), net(mini.classifier_input(name, x)))


def test_imagenet_features_are_projected_on_what_the_reference_varies_in():
    """All of a small reference's covariance lies in a quarter as many directions at most; the figure's numbers are
    those of an orthogonal projection."""
    images = torch.rand(8, 3, 40, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    examples = imagenet_features(images)
    assert examples.shape == (8, 1280)
    space = imagenet_space(examples)
    projected = space.features(torch.zeros(0), images)
    assert space.examples.shape == (8, 2) and space.reference.mean.abs().max() < 1e-4
    torch.testing.assert_close(projected, space.examples, atol=1e-4, rtol=1e-4)
    values = torch.linalg.eigvalsh(examples.double().T.cov())[-2:]
    torch.testing.assert_close(space.reference.cov.diagonal().sort().values, values, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "config, seen",
    [
        ({"add": {}, "vision": {"network": "efficientnet", "size": 64}}, True),
        ({"add": {}, "vision": {"network": "encoder", "size": 64}}, False),
        ({"add": {}, "vision": ["0123456789abcdef", 224]}, False),  # ComfyUI: a CLIP vision model, by its hash
        ({"ladd": {}, "discriminator": {"width": 64}}, False),  # a method that has no vision writes none
        ({"add": {}}, False),
    ],
)
def test_a_student_that_was_judged_by_the_evaluator_is_known_by_its_file(config, seen):
    assert trained_on({"sigmas": [1.0], "config": config}) == seen
    assert not trained_on({})

"""Vision networks: blocks to tokens, preparation of images, refusals."""

import pytest
import torch
from torch import nn
from toy import ToyEncoder

from distill_core.methods.components import Components, VisionConfig, open_vision
from distill_core.models.vision import (
    VisionNetwork,
    efficientnet_vision,
    encoder_vision,
    evenly,
    image_embedding,
    transformers_vision,
)


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    """A DINOv2 of random weights, saved as transformers saves it."""
    from transformers import Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("dino")
    config = Dinov2Config(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=28, patch_size=14)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Dinov2Model(config).save_pretrained(folder)
    return folder


def images(size: int = 32) -> torch.Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_a_dinov2_gives_patch_tokens_with_the_class_token_added(dino):
    vision = transformers_vision(dino, blocks=2, size=42)
    tokens = vision(images())
    assert [t.shape for t in tokens] == [(2, 32, 9)] * 2
    hidden = vision.network(vision.prepare(images()), output_hidden_states=True).hidden_states
    for ours, name in zip(tokens, vision.taps, strict=True):
        layer = hidden[int(name.rsplit(".", 1)[1]) + 1]
        torch.testing.assert_close(ours, (layer[:, 1:] + layer[:, :1]).transpose(1, 2), atol=1e-5, rtol=1e-5)


def test_images_are_resized_and_normalised():
    x = VisionNetwork(ToyEncoder(), ["layers.0"], (14, 14)).prepare(torch.ones(1, 3, 28, 28))
    expected = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    assert x.shape == (1, 3, 14, 14) and torch.allclose(x.mean((0, 2, 3)), expected, atol=1e-5)


def test_the_network_is_frozen_and_passes_gradients():
    encoder = ToyEncoder().train()
    x = images().requires_grad_()
    vision = encoder_vision(encoder)
    sum(t.square().mean() for t in vision(x)).backward()
    assert x.grad.any() and not encoder.training and not any(p.requires_grad for p in encoder.parameters())


def test_an_encoder_is_tapped_at_its_resolutions():
    vision = encoder_vision(ToyEncoder(), (16, 16))
    assert vision.taps == ["layers.1", "layers.3"] and [t.shape[2] for t in vision(images())] == [64, 16]


def test_an_imagenet_network_comes_inside_a_package():
    x = images().requires_grad_()
    vision = efficientnet_vision(64)
    tokens = vision(x)
    assert [t.shape for t in tokens] == [(2, 24, 256), (2, 40, 64), (2, 112, 16), (2, 320, 4)]
    sum(t.square().mean() for t in tokens).backward()
    assert x.grad.any() and not any(p.requires_grad for p in vision.network.parameters())


def test_the_embedding_is_normalised():
    embedding = image_embedding([torch.zeros(2, 4, 3), 5 + torch.rand(2, 8, 3)])
    assert embedding.shape == (2, 8) and torch.allclose(embedding.mean(1), torch.zeros(2), atol=1e-4)
    assert torch.allclose(embedding.var(1, unbiased=False), torch.ones(2), atol=0.1)


def test_evenly_ends_with_the_last():
    assert evenly("abcdefgh", 4) == list("bdfh") and evenly("ab", 4) == list("ab")


def test_what_cannot_serve_is_refused(dino, tmp_path):
    with pytest.raises(ValueError, match="no blocks"):
        VisionNetwork(ToyEncoder(), ["layers.9"])
    with pytest.raises(ValueError, match="no vision network in"):
        transformers_vision(tmp_path)
    with pytest.raises(ValueError, match="multiple of its patch"):
        transformers_vision(dino, size=30)
    (tmp_path / "config.json").write_text((dino / "config.json").read_text())
    with pytest.raises(ValueError, match="cannot be opened"):
        transformers_vision(tmp_path)


def test_any_torch_network_serves():
    network = nn.Sequential(nn.Conv2d(3, 5, 4, 4), nn.Flatten(2), nn.Identity())
    vision = VisionNetwork(network, ["0"], (8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)
    assert vision(images())[0].shape == (2, 5, 4)


def test_an_open_network_takes_the_place_of_the_one_that_is_named():
    """ComfyUI hands its networks over opened."""
    given = encoder_vision(ToyEncoder())
    assert open_vision(VisionConfig(network="nowhere"), Components(None, vision=given)) is given

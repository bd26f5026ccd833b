import pytest
import torch

from distill_core.models import mini
from distill_core.perceptual.autoencoders import decoder_stages, open_autoencoder
from distill_core.perceptual.lpl import LatentPerceptualLoss


@pytest.fixture(scope="module")
def autoencoder():
    return open_autoencoder("mini")


def latents(batch=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, *mini.LATENT_SHAPE, generator=g) for _ in range(2)]


def kl_folder(tmp_path, **config):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        **config,
    ).save_pretrained(tmp_path)
    return str(tmp_path)


def test_the_mini_autoencoder_is_used_as_the_trainers_do(autoencoder):
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    net = mini.load_autoencoder()
    torch.testing.assert_close(autoencoder.encode(images), net.encoder(images).contiguous())
    torch.testing.assert_close(autoencoder.decode(latents()[0]), net.decoder(latents()[0]).clamp(-1, 1))


def test_the_stages_end_the_resolutions(autoencoder):
    assert [tuple(f.shape[2:]) for f in autoencoder.features(latents()[0])] == [(8, 8), (16, 16), (32, 32), (64, 64)]
    with pytest.raises(ValueError, match="no stages that are known"):
        decoder_stages(torch.nn.Conv2d(1, 1, 1))


def test_the_value_by_hand(autoencoder):
    a, b = latents()
    expected = 0.0
    for x, y in zip(autoencoder.features(a), autoencoder.features(b), strict=True):
        std = (y.var((2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
        expected = expected + 8 / x.shape[-1] * ((x - y) / std).square().mean((1, 2, 3))
    torch.testing.assert_close(LatentPerceptualLoss(autoencoder)(a, b), expected)


def test_it_has_the_interface_of_the_metric(autoencoder):
    """Zero for equal latents, positive else, per item, gradient only to the prediction."""
    metric, (a, b) = LatentPerceptualLoss(autoencoder), latents(3)
    a.requires_grad_(), b.requires_grad_()
    value = metric(a, b)
    assert value.shape == (3,) and (value > 0).all()
    assert torch.equal(metric(a, a), torch.zeros(3))
    torch.testing.assert_close(metric(a[1:2], b[1:2]), value[1:2])
    value.sum().backward()
    assert a.grad.abs().sum() > 0 and b.grad is None


def test_wrong_shapes_are_refused(autoencoder):
    metric = LatentPerceptualLoss(autoencoder)
    with pytest.raises(ValueError, match="video latent"):
        metric(torch.zeros(1, 16, 2, 8, 8), torch.zeros(1, 16, 2, 8, 8))
    with pytest.raises(ValueError, match="differ in shape"):
        metric(torch.zeros(1, 16, 8, 8), torch.zeros(1, 16, 8, 9))


def test_a_diffusers_folder_brings_its_scale(tmp_path):
    autoencoder = open_autoencoder(kl_folder(tmp_path, scaling_factor=0.5, shift_factor=0.25))
    images = torch.rand(1, 3, 16, 24) * 2 - 1
    raw = autoencoder.network.encode(images).latent_dist.mode()
    latents = autoencoder.encode(images)
    torch.testing.assert_close(latents, (raw - 0.25) * 0.5)
    torch.testing.assert_close(autoencoder.decode(latents), autoencoder.network.decode(raw).sample.clamp(-1, 1))
    assert [tuple(f.shape[2:]) for f in autoencoder.features(latents)] == [(8, 12), (16, 24), (16, 24)]
    assert autoencoder.space.channels == 4


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        open_autoencoder(str(tmp_path))
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(ValueError, match="holds a UNet2DModel"):
        open_autoencoder(str(tmp_path))

"""Heads, and the discriminator that joins one head per tapped block."""

import math

import pytest
import torch

from distill_core.discriminators.latent import ConvBlock, FeatureNorm, LatentDiscriminator, MapHead, time_embedding
from distill_core.discriminators.network import add_small_copy
from distill_core.discriminators.pixel import PixelDiscriminator, TokenHead, text_embedding
from distill_core.models.denoiser import Cond
from distill_core.models.vision import VisionNetwork

CHANNELS, POOLED_DIM = (8, 12), 6


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def maps():
    return [torch.randn(2, 8, 3, 5), torch.randn(2, 12, 6, 10)]


@pytest.fixture
def discriminator():
    return LatentDiscriminator(CHANNELS, POOLED_DIM, width=16)


TIME, POOLED = torch.tensor([0.2, 0.8]), torch.randn(2, POOLED_DIM, generator=torch.Generator().manual_seed(1))


def test_time_embedding_values():
    embedding = time_embedding(torch.tensor([0.0, 0.5]), dim=8)
    assert embedding.shape == (2, 8)
    assert embedding[0].tolist() == [1] * 4 + [0] * 4
    angles = [500 * 10000 ** (-i / 4) for i in range(4)]
    expected = [*map(math.cos, angles), *map(math.sin, angles)]
    assert embedding[1].tolist() == pytest.approx(expected, abs=1e-4)


def test_calibrated_features_have_unit_channels_whatever_their_scales():
    multi_scale_taps = torch.logspace(-2, 2, 12).view(-1, 1, 1)
    features = multi_scale_taps * torch.randn(64, 12, 6, 10) + 3 * multi_scale_taps
    norm = FeatureNorm(12)
    torch.testing.assert_close(
        norm(features), torch.nn.functional.layer_norm(features.movedim(1, -1), (12,)).movedim(-1, 1)
    )
    norm.calibrate(features)
    std, mean = torch.std_mean(norm(features), dim=(0, 2, 3))
    torch.testing.assert_close(mean, torch.zeros(12), atol=1e-3, rtol=0)
    torch.testing.assert_close(std, torch.ones(12), atol=1e-3, rtol=0)
    assert not dict(norm.named_parameters())


def test_a_channel_that_never_varies_stays_finite():
    features = torch.randn(8, 4, 3, 5)
    features[:, 1:3] = features[:, 1:3].sign() * 0 + 1e-8
    norm = FeatureNorm(4)
    norm.calibrate(features)
    assert norm(features).isfinite().all()


def test_conv_block_keeps_shape_and_averages_variances():
    block, x = ConvBlock(16, 3), torch.randn(2, 16, 3, 5)
    torch.testing.assert_close(
        block(x) * math.sqrt(2) - x, block.conv(torch.nn.functional.leaky_relu(block.norm(x), 0.2))
    )


@pytest.mark.parametrize("kernel", [1, 3, 9])
def test_a_head_keeps_the_non_square_layout(kernel):
    head = MapHead(8, cond_dim=10, width=16, kernel=kernel)
    assert head(torch.randn(2, 8, 3, 5), torch.randn(2, 10)).shape == (2, 1, 3, 5)


def test_a_head_sees_rows_and_columns(maps):
    """Convolutions run over the two dimensions: moving a row break of the flattened sequence changes the logits."""
    head, cond = MapHead(8, cond_dim=10, width=16), torch.randn(2, 10)
    logits = head(maps[0], cond).flatten(1)
    reshaped = head(maps[0].reshape(2, 8, 5, 3), cond).flatten(1)
    assert not torch.allclose(logits, reshaped, atol=1e-3)
    pointwise = MapHead(8, cond_dim=10, width=16, kernel=1)
    torch.testing.assert_close(
        pointwise(maps[0], cond).flatten(1), pointwise(maps[0].reshape(2, 8, 5, 3), cond).flatten(1)
    )


def test_a_head_ignores_the_scale_of_the_features(maps):
    head, cond = MapHead(8, cond_dim=10, width=16), torch.randn(2, 10)
    torch.testing.assert_close(head(1000 * maps[0], cond), head(maps[0], cond), atol=1e-3, rtol=1e-3)


def test_projection_is_added_to_an_unconditional_logit(maps):
    head, cond = MapHead(8, cond_dim=10, width=16), torch.randn(2, 10)
    with torch.no_grad():
        head.projection.bias.zero_()
    base = head(maps[0], torch.zeros(2, 10))
    torch.testing.assert_close(head(maps[0], 2 * cond) - base, 2 * (head(maps[0], cond) - base), atol=1e-5, rtol=1e-4)


def test_logits_of_all_heads_and_positions(discriminator, maps):
    logits = discriminator(maps, TIME, POOLED)
    assert logits.shape == (2, 3 * 5 + 6 * 10)
    swapped = [maps[0], torch.randn(2, 12, 6, 10)]  # the second map reaches only the second head's logits
    other = discriminator(swapped, TIME, POOLED)
    assert torch.equal(other[:, :15], logits[:, :15]) and not torch.allclose(other[:, 15:], logits[:, 15:])


def test_logits_depend_on_time_and_pooled_text_in_every_head(discriminator, maps):
    logits = discriminator(maps, TIME, POOLED)
    for changed in (discriminator(maps, TIME + 0.1, POOLED), discriminator(maps, TIME, POOLED + 1)):
        moved = (changed - logits).abs()
        assert moved[:, :15].max() > 1e-3 and moved[:, 15:].max() > 1e-3


def test_items_do_not_influence_each_other(discriminator, maps):
    logits = discriminator(maps, TIME, POOLED)
    alone = discriminator([m[1:] for m in maps], TIME[1:], POOLED[1:])
    torch.testing.assert_close(alone, logits[1:], atol=1e-5, rtol=1e-5)


def test_without_pooled_text(maps):
    discriminator = LatentDiscriminator(CHANNELS, pooled_dim=0, width=16)
    assert discriminator.pooled is None
    assert torch.equal(discriminator(maps, TIME, None), discriminator(maps, TIME, POOLED))


@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_maps_is_refused(discriminator, maps, count):
    with pytest.raises(ValueError, match=f"2 heads were given {count}"):
        discriminator((maps * 2)[:count], TIME, POOLED)


def test_half_precision_maps_give_float32_logits(discriminator, maps):
    half = [m.bfloat16() for m in maps]
    logits = discriminator(half, TIME, POOLED.bfloat16())
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, discriminator([m.float() for m in half], TIME, POOLED.bfloat16().float()))


def test_float64_heads_compute_in_float64(discriminator, maps):
    logits = discriminator.double()([m.double() for m in maps], TIME.double(), POOLED.double())
    assert logits.dtype == torch.float64
    shifted = discriminator([m.double() + 1e-12 for m in maps[:1]] + [maps[1].double()], TIME.double(), POOLED.double())
    assert not torch.equal(shifted, logits)  # float32 on the way would swallow the difference


# ADD's heads on tokens


def tokens(batch: int = 3, channels: int = 8, count: int = 20) -> torch.Tensor:
    return 4 + 3 * torch.randn(batch, channels, count, generator=torch.Generator().manual_seed(2))


def token_head(channels: int = 8, cond_dim: int = 5) -> TokenHead:
    return TokenHead(torch.full((channels,), 4.0), torch.full((channels,), 3.0), cond_dim, width=16)


def test_a_token_head_gives_one_logit_a_token_and_no_item_touches_another():
    head, x, cond = token_head().eval(), tokens(), torch.randn(3, 5)
    logits = head(x, cond)
    assert logits.shape == (3, 20)
    torch.testing.assert_close(head(x[1:2], cond[1:2]), logits[1:2])


def test_a_token_sees_four_neighbours_a_side_around_the_end():
    head, x, cond = token_head().eval(), tokens(1), torch.ones(1, 5)
    before = head(x, cond)
    x[:, :, 0] += 1.0
    changed = (head(x, cond) != before)[0].nonzero().flatten().tolist()
    assert changed == [0, 1, 2, 3, 4, 16, 17, 18, 19]


def test_a_token_heads_convolutions_have_spectral_norm_one():
    head = token_head()
    for _ in range(100):  # the power iteration settles
        head(tokens(), torch.randn(3, 5))
    for conv in (head.single.conv, head.neighbours.conv, head.logit):
        assert torch.linalg.matrix_norm(conv.weight.flatten(1), 2).item() == pytest.approx(1.0, abs=0.02)


def test_tokens_are_standardised_by_those_of_real_images():
    real = [tokens(6), 0.01 * tokens(6, 4)]
    discriminator = PixelDiscriminator(real, 5, 0, width=16)
    for head, x in zip(discriminator.heads, real, strict=True):
        z = (x - head.mean) / head.std
        assert z.mean().abs() < 1e-2 and z.std().item() == pytest.approx(1, abs=0.02)


def test_the_projection_is_the_conditioning():
    discriminator = PixelDiscriminator([tokens()], 5, 2, width=16).eval()
    text, image = torch.randn(3, 5), torch.randn(3, 2)
    logits = discriminator([tokens()], text, image)
    assert not torch.allclose(discriminator([tokens()], text, image + 1), logits)
    assert PixelDiscriminator([tokens()], 0, 0)([tokens()], text, image).shape == (3, 20)


def test_every_vision_head_weighs_the_same():
    fine, coarse = tokens(), tokens()[:, :, :5]
    discriminator, none = PixelDiscriminator([fine, coarse], 0, 0).eval(), torch.zeros(3, 0)
    logits = discriminator([fine, coarse], none, none)
    one = torch.ones(3, 1)
    each = [head(t, one).mean(1) for head, t in zip(discriminator.heads, (fine, coarse), strict=True)]
    assert logits.shape == (3, 40)
    torch.testing.assert_close(logits.mean(1), (each[0] + each[1]) / 2)


def test_images_with_too_few_tokens_are_refused_before_the_first_step():
    """A head looks at nine neighbours in a circle; fewer than four tokens cannot be padded to one."""
    vision = VisionNetwork(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 8, 8)), ["0"], (8, 8), mean=None, std=None)
    images, cond = torch.zeros(2, 3, 32, 32), Cond(torch.zeros(2, 1, 8))
    with pytest.raises(ValueError, match=r"8 x 8 px as 1 tokens.*at least 4: set \[vision\] size"):
        PixelDiscriminator.for_images(vision, images, cond)
    vision.size = (16, 16)
    assert len(PixelDiscriminator.for_images(vision, images + torch.rand(3, 32, 32), cond).heads) == 1


def test_text_is_pooled_or_the_mean_of_its_real_tokens():
    context, pooled = torch.randn(2, 4, 3), torch.randn(2, 6)
    assert torch.equal(text_embedding(Cond(context, pooled)), pooled)
    assert torch.allclose(text_embedding(Cond(context)), context.mean(1))
    short = Cond(context[:, :2]).padded(4)
    assert torch.allclose(text_embedding(short), context[:, :2].mean(1))


# Smaller latents entering a block


def test_a_map_takes_the_latents_at_its_own_size():
    latents, hidden = torch.randn(1, 2, 8, 4), torch.randn(1, 3, 4, 2)
    input_conv = torch.nn.Conv2d(2, 3, 1, bias=False)
    expected = hidden + input_conv(torch.nn.functional.avg_pool2d(latents, 2))
    torch.testing.assert_close(add_small_copy(hidden, latents, input_conv, 1, 1), expected)


def test_tokens_take_a_coarser_copy_and_text_tokens_nothing():
    latents, hidden = torch.randn(1, 2, 8, 8), torch.randn(1, 3 + 16, 2)
    out = add_small_copy(hidden, latents, torch.nn.Identity(), 1, 2)
    assert torch.equal(out[:, :3], hidden[:, :3])
    added = (out - hidden)[:, 3:].transpose(1, 2).view(1, 2, 4, 4)
    coarse = torch.nn.functional.avg_pool2d(latents, 4)
    torch.testing.assert_close(added, coarse.repeat_interleave(2, 2).repeat_interleave(2, 3), atol=1e-6, rtol=1e-5)

"""Per-item tensors: how they are declared, how they travel, and how networks of more input channels take them."""

from __future__ import annotations

import pytest
import torch

from distill_core.diffusion.process import DiscreteProcess, cumulative_alphas
from distill_core.diffusion.samplers import sample, sample_many
from distill_core.models import items
from distill_core.models.denoiser import Cond, Denoiser, Guided, without_captions

INPAINTING = ("inpaint_mask", "masked_image")


def tensors(rows: int, height: int = 6, width: int = 8, seed: int = 0) -> dict[str, torch.Tensor]:
    """All per-item tensors that networks here take, for latents [4, height, width]."""
    g = torch.Generator().manual_seed(seed)
    return {
        "inpaint_mask": (torch.rand(rows, 1, height, width, generator=g) > 0.5).float(),
        "masked_image": torch.randn(rows, 4, height, width, generator=g),
        "source_image": torch.randn(rows, 4, height, width, generator=g),
    }


def only(names, rows: int = 2, **of) -> dict[str, torch.Tensor]:
    return {name: value for name, value in tensors(rows, **of).items() if name in names}


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("extra.inpaint_mask", [3, 1, 6, 8], ""),
        ("extra.masked_image", [3, 4, 6, 8], ""),
        ("extra.reference_image#1", [3, 4, 9, 2], ""),
        ("extra.text_strength", [3], ""),
        ("rejected", [3, 4, 6, 8], ""),
        ("extra.concat_mask", [3, 48, 64], ""),  # the host's own, which is not declared
        ("extra.inpaint_mask", [3, 4, 6, 8], r"inpaint_mask is \[4, 6, 8\] .* latent \[4, 6, 8\], .* is \[1, 6, 8\]"),
        ("extra.masked_image", [3, 4, 6, 6], r"is \[4, 6, 6\] .* is \[4, 6, 8\]"),
        ("extra.reference_image#0", [3, 3, 9, 2], r"is \[3, 9, 2\] .* is \[4, any, any\]"),
        ("extra.text_strength", [3, 1], r"text_strength is \[1\] .* is \[\]"),
        ("rejected", [3, 4, 8, 6], r"rejected is \[4, 8, 6\]"),
    ],
)
def test_shapes_are_checked_against_the_latent(name, shape, message):
    import re

    said = items.wrong_shape({"latents": [3, 4, 6, 8], "context": [3, 5, 7], name: shape})
    assert re.search(message, said) if message else said == ""


def test_values_are_checked_against_their_range():
    half = {
        "extra.inpaint_mask": torch.tensor([[[[0.0, 0.5, 1.0]]]]),
        "extra.masked_image": torch.full((1, 4, 1, 3), -9),
    }
    assert items.wrong_values(half) == ""
    half["extra.inpaint_mask"] = 255 * half["extra.inpaint_mask"]
    assert "inpaint_mask has values from 0 to 255, and a mask" in items.wrong_values(half)
    assert "text_strength has values from -1 to 2, and" in items.wrong_values(
        {"extra.text_strength": torch.tensor([-1.0, 2])}
    )


def test_the_empty_text_keeps_the_items_and_their_places(make_cond):
    cond, empty = make_cond(3).with_items({**tensors(3), "text_strength": torch.arange(3.0)}), make_cond(1, seed=9)
    rows = empty.rows_for(cond)
    assert len(rows) == 3 and torch.equal(rows.context, empty.context.expand(3, -1, -1))
    assert rows.extra.keys() == cond.extra.keys()
    assert all(torch.equal(rows.extra[name], value) for name, value in cond.extra.items())
    # What the host calls its own is as the empty conditioning has it.
    foreign = empty.with_items({"width": torch.ones(1)}).rows_for(cond.with_items({"width": torch.full((3,), 7.0)}))
    assert foreign.extra["width"].tolist() == [1, 1, 1]


def test_dropping_captions_keeps_the_items(make_cond):
    cond, empty, dropped = make_cond(3).with_items(tensors(3)), make_cond(1, seed=9), torch.tensor([True, False, True])
    found = without_captions(cond, empty, dropped)
    for row, drop in enumerate(dropped.tolist()):
        assert torch.equal(found.context[row], empty.context[0] if drop else cond.context[row])
    assert all(torch.equal(found.extra[name], value) for name, value in cond.extra.items())
    longer = empty.padded(cond.context.shape[1] + 2)  # another number of tokens: all rows do as the first one does
    every = without_captions(cond, longer, dropped)
    assert torch.equal(every.context, longer.context.expand(3, -1, -1))
    assert all(torch.equal(every.extra[name], value) for name, value in cond.extra.items())


@pytest.mark.parametrize(
    ("family", "channels", "names"),
    [
        ("unet", 9, INPAINTING),
        ("unet", 8, ("source_image",)),
        ("sd3", 9, INPAINTING),
        ("sd3", 8, ("source_image",)),
        ("flux", 32, ("source_image",)),
    ],
)
def test_the_network_sees_the_latent_and_then_its_items_in_their_order(make_backend, batch, family, channels, names):
    backend = make_backend(family, in_channels=channels, out_channels=16 if family == "flux" else 4)
    (x, sigma, cond), added = batch, tensors(2)
    assert backend.limits().channels == 4 and backend.limits().items == names
    seen = []
    entry = {"unet": "conv_in", "sd3": "pos_embed", "flux": "x_embedder"}[family]
    backend.network.get_submodule(entry).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    denoised = Denoiser(backend)(x, sigma, cond.with_items(added))
    whole = torch.cat([backend.process.calculate_input(sigma, x), *(added[name] for name in names)], 1)
    if family == "flux":
        from diffusers import FluxPipeline

        parts = [FluxPipeline._pack_latents(part, 2, 4, 6, 8) for part in whole.chunk(2, dim=1)]
        whole = torch.cat(parts, dim=2)  # as diffusers' FluxControlPipeline joins them
    assert denoised.shape == x.shape and torch.equal(seen[0], whole)
    # Every one of them counts, in the forward and in the features, and items that it does not take do not.
    for name in added:
        other = cond.with_items({**added, name: 1 - added[name]})
        assert torch.equal(Denoiser(backend)(x, sigma, other), denoised) == (name not in names)
        taps = backend.tap_names[:2]
        before, after = (Denoiser(backend).features(x, sigma, c, taps) for c in (cond.with_items(added), other))
        assert all(map(torch.equal, before, after)) == (name not in names)


def test_sd3s_real_channels_are_known(make_backend):
    assert make_backend("sd3", in_channels=33, out_channels=16).limits().items == INPAINTING
    assert make_backend("sd3", in_channels=32, out_channels=16).limits().items == ("source_image",)
    assert make_backend("sd3", in_channels=16, out_channels=16).limits().items == ()


def test_fluxs_real_channels_are_known(make_backend):
    """FLUX.1 Fill, the control models (Canny, Depth), and FLUX.1 dev."""
    for channels, names in ((384, ("masked_image", "pixel_mask")), (128, ("source_image",)), (64, ())):
        backend = make_backend("flux", in_channels=channels, out_channels=64)
        assert backend.limits().items == names and backend.limits().channels == 16


def test_instruct_pix2pix_takes_its_picture_as_the_autoencoder_gave_it(make_backend, make_cond, batch):
    backend = make_backend("unet", in_channels=8)
    backend.family_name = "sd15"
    (x, sigma, cond), added, seen = batch, only(["source_image"]), []
    backend.network.conv_in.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    Denoiser(backend)(x, sigma, cond.with_items(added))
    torch.testing.assert_close(seen[0][:, 4:], added["source_image"] / 0.18215)


def test_what_is_missing_or_unknown_is_refused_in_words(make_backend, batch):
    x, sigma, cond = batch
    with pytest.raises(ValueError, match=r"takes inpaint_mask and masked_image .* no masked_image \(the latent of"):
        Denoiser(make_backend("unet", in_channels=9))(x, sigma, cond.with_items(only(["inpaint_mask"])))
    with pytest.raises(
        ValueError, match=r"takes 3 channels beside the latent's 4, .* 5 \(inpaint_mask, masked_image\); 4"
    ):
        make_backend("unet", in_channels=7)
    with pytest.raises(ValueError, match=r"takes 17 channels beside the latent's 16, .* 80 \(masked_image, pixel_mask"):
        make_backend("flux", in_channels=4 * 33, out_channels=64)


@pytest.mark.parametrize("scale", [1.0, 4.5])
def test_guidance_leads_away_from_the_text_alone(make_backend, make_cond, batch, scale):
    denoiser = Denoiser(make_backend("unet", in_channels=9))
    (x, sigma, cond), empty, added = batch, make_cond(1, seed=9), only(INPAINTING)
    full = cond.with_items(added)
    bare = Cond(empty.context.repeat(2, 1, 1), empty.pooled.repeat(2, 1)).with_items(added)
    without = denoiser(x, sigma, bare)
    expected = without + scale * (denoiser(x, sigma, full) - without)
    guided = Guided(denoiser, empty, scale)
    torch.testing.assert_close(guided(x, sigma, full), expected, atol=1e-5, rtol=1e-5)
    known = guided.around(denoiser(x, sigma, full), x, sigma, full)
    torch.testing.assert_close(known, expected, atol=1e-5, rtol=1e-5)


def test_samples_take_the_tensors_of_their_item_and_not_of_their_prompt(make_backend, make_cond):
    """Five items of two prompts in batches of two: item 3 is what it is alone."""
    backend = make_backend("unet", DiscreteProcess(cumulative_alphas(), "eps"), in_channels=9)
    conds, per_item = make_cond(2), only(INPAINTING, rows=5)
    grid, shape = torch.tensor([14.6, 1.0, 0.0]), (4, 6, 8)
    found = sample_many(Denoiser(backend), grid, conds, shape, seed=3, count=5, size=2, per_item=per_item)
    own = conds[[1]].with_items({name: value[3:4] for name, value in per_item.items()})
    alone = sample(Denoiser(backend), backend.process, grid, own, shape, seed=3, items=[3])
    torch.testing.assert_close(found[3:4], alone, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="inpaint_mask has 4 rows for 5 items"):
        short = {name: value[:4] for name, value in per_item.items()}
        sample_many(Denoiser(backend), grid, conds, shape, seed=3, count=5, per_item=short)

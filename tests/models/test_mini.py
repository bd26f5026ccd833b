import pytest
import torch
from safetensors.torch import load_file

from distill_core.evaluation.metrics import mini_scores
from distill_core.experiments import demo
from distill_core.models import mini, shipped
from distill_core.models.denoiser import Denoiser, Guided


@pytest.fixture(scope="module")
def autoencoder():
    return mini.load_autoencoder()


@pytest.fixture(scope="module")
def samples():
    """{steps: latents} of the guided teacher: item i has class i mod 10."""
    classes, empty = demo.mini_conditioning()
    teacher = Guided(Denoiser(demo.mini_backend()), empty, mini.GUIDANCE)
    return {steps: demo.draw_samples(teacher, steps, "euler", 1, 100, classes) for steps in (1, 12)}


def test_the_shipped_files_are_whole_and_small():
    files = {path.name: path for path in mini.ASSETS.iterdir()}
    models = {"autoencoder", "transformer", "small", "student", "conditioning"}
    models |= {"latent_classifier", "pixel_classifier"}
    assert files.keys() == {f"{name}.safetensors" for name in models} | {"training.json"}
    assert sum(path.stat().st_size for path in files.values()) < 25e6
    for name in models:
        assert all(torch.isfinite(value).all() for value in load_file(files[f"{name}.safetensors"]).values())
    log = mini.training_log()
    assert {
        "seed",
        "autoencoder",
        "latent_classifier",
        "pixel_classifier",
        "teacher",
        "small_teacher",
        "floor",
    } <= log.keys()
    assert log["latent_classifier"]["test_accuracy"] > 0.85 and log["pixel_classifier"]["test_accuracy"] > 0.85


def test_the_transformers_are_ones_that_the_host_detects():
    """ComfyUI's SD3 detection takes 64 x depth as the width and as many heads as layers."""
    small = shipped.new_transformer(mini.SMALL_CONFIG).config
    assert 64 * small.num_layers == 64 * small.num_attention_heads == small.caption_projection_dim
    config = mini.load_transformer().config
    assert config.num_attention_heads == config.num_layers and config.attention_head_dim == 64
    assert config.caption_projection_dim == 64 * config.num_layers and config.in_channels == mini.LATENT_SHAPE[0]
    table = mini.load_conditioning()
    assert table["context"].shape == (11, 2, config.joint_attention_dim)
    assert table["pooled"].shape == (11, config.pooled_projection_dim)
    assert not any(p.requires_grad for p in mini.load_transformer().parameters())


def test_the_padding_of_the_autoencoder_is_zero_and_changes_nothing(autoencoder):
    stored = load_file(mini.ASSETS / "autoencoder.safetensors")
    wide = shipped.new_autoencoder(64)
    wide.load_state_dict({name: stored[shipped.taesd_key(name)].float() for name in wide.state_dict()})
    for name, narrow in autoencoder.state_dict().items():
        padding = stored[shipped.taesd_key(name)].clone()
        padding[tuple(slice(n) for n in narrow.shape)] = 0
        assert not padding.any(), name
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latents = autoencoder.encoder(x)
        torch.testing.assert_close(wide.encoder(x), latents, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(wide.decoder(latents), autoencoder.decoder(latents), atol=1e-4, rtol=1e-4)
    assert {"vae_scale", "vae_shift"} <= stored.keys()


def test_the_autoencoder_reproduces_the_teachers_pictures(autoencoder, samples):
    with torch.no_grad():
        images = autoencoder.decoder(samples[12][:20]).clamp(-1, 1)
        again = autoencoder.decoder(autoencoder.encoder(images)).clamp(-1, 1)
    psnr = 10 * torch.log10(4 / (again - images).square().mean())
    assert psnr > mini.training_log()["autoencoder"]["test_psnr_db"] - 3  # as good as on real pictures
    assert images.std() > 0.3


def test_the_teacher_is_worth_distilling(samples):
    """Good at many steps, visibly bad at one: by evaluators that its training did not see."""
    labels = torch.arange(100) % 10
    scores = {steps: mini_scores(latents, labels) for steps, latents in samples.items()}
    assert scores[12]["accuracy"] > 0.85 and scores[12]["accuracy_pixels"] > 0.8
    assert scores[12]["fd"] < 0.5 * scores[1]["fd"] and scores[12]["fd_pixels"] < 0.5 * scores[1]["fd_pixels"]


def test_the_smaller_teacher_is_worse_and_knows_the_classes(samples):
    classes, empty = demo.mini_conditioning()
    small = Guided(Denoiser(demo.mini_backend(small=True)), empty, mini.GUIDANCE)
    labels = torch.arange(100) % 10
    theirs, ours = (
        mini_scores(x, labels) for x in (samples[12], demo.draw_samples(small, 12, "euler", 1, 100, classes))
    )
    assert ours["accuracy"] > 0.85 and 1.2 * theirs["fd"] < ours["fd"] < 20
    weights = [sum(p.numel() for p in mini.load_transformer(small).parameters()) for small in (True, False)]
    assert weights[0] < 0.3 * weights[1]


def test_class_names_and_inputs():
    assert len(set(mini.CLASS_NAMES)) == 10 and mini.NULL_CLASS == 10
    latents = torch.tensor([0.0, 100.0, -100.0]).view(1, 3, 1, 1)
    assert mini.classifier_input("latent", latents).flatten().tolist() == pytest.approx([0, 3, -3])
    grey = mini.classifier_input("pixel", torch.ones(1, 3, 64, 64))
    assert grey.shape == (1, 1, 32, 32) and (grey == 1).all()

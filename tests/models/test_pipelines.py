import pytest
import torch
from tiny_pipelines import sd, sd3, sdxl

from distill_core.models import mini
from distill_core.models.pipelines import MiniSource, ModelConfig, open_source, read_prompts


@pytest.fixture(scope="module", params=[sd3, sd, sdxl], ids=lambda build: build.__name__)
def saved(request, tmp_path_factory):
    """A tiny pipeline of one family, and the folder it was saved to."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = request.param()
    folder = tmp_path_factory.mktemp(request.param.__name__)
    pipeline.save_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, folder


@pytest.fixture(scope="module")
def source(saved):
    return open_source(ModelConfig(path=str(saved[1])))


PROMPTS, NEGATIVE = ["a red dog", "cat"], "blurry"


@torch.no_grad()
def own_encoding(pipeline, prompts):
    name = type(pipeline).__name__
    if name == "StableDiffusionPipeline":
        return pipeline.encode_prompt(prompts, "cpu", 1, False)[0], None
    arguments = (prompts, None, None) if name == "StableDiffusion3Pipeline" else (prompts,)
    context, _, pooled, _ = pipeline.encode_prompt(*arguments, do_classifier_free_guidance=False)
    return context, pooled


def test_prompts_are_encoded_as_by_the_pipeline(saved, source):
    conds, uncond = source.encode(PROMPTS, NEGATIVE)
    assert len(conds) == 2 and len(uncond) == 1
    for ours, prompts in ((conds, PROMPTS), (uncond, [NEGATIVE])):
        context, pooled = own_encoding(saved[0], prompts)
        torch.testing.assert_close(ours.context, context, atol=1e-5, rtol=1e-5)
        assert (ours.pooled is None) == (pooled is None)
        if pooled is not None:
            torch.testing.assert_close(ours.pooled, pooled, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(conds.context[0], conds.context[1], atol=1e-2)


@torch.no_grad()
def test_latents_are_decoded_as_by_the_pipeline(saved, source):
    pipeline, _ = saved
    name = type(pipeline).__name__
    settings = dict(prompt="cat", num_inference_steps=2, guidance_scale=1.0, height=16, width=16)
    kept = {}
    for kind in ("latent", "pt"):
        generator = torch.Generator().manual_seed(1)
        kept[kind] = pipeline(**settings, generator=generator, output_type=kind).images
    images = (source.decode(kept["latent"]) + 1) / 2
    torch.testing.assert_close(images, kept["pt"].float(), atol=1e-5, rtol=1e-5, msg=name)
    assert images.std() > 0.01 and source.channels == 4


@torch.no_grad()
def test_pictures_are_encoded_in_the_models_units(saved, source):
    """What diffusers' own pipelines do with a picture, but for the noise: the mean, shifted and scaled."""
    pipeline, _ = saved
    vae = pipeline.vae
    images = torch.rand(2, 3, 16, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = (vae.encode(images).latent_dist.mean - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
    found = source.encode_images(images)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert tuple(found.shape[2:]) == (16 // source.scale, 32 // source.scale)
    assert source.autoencoder_identity() == open_source(ModelConfig(path=str(saved[1]))).autoencoder_identity()


def test_the_network_and_its_process_come_from_the_folder(saved, source):
    pipeline, _ = saved
    part = "unet" if "unet" in pipeline.components else "transformer"
    ours = dict(source.backend.network.named_parameters())
    assert all(torch.equal(ours[name], value) for name, value in getattr(pipeline, part).named_parameters())
    assert getattr(source.pipeline, part) is source.backend.network  # not a second copy
    if source.backend.family_name == "sd3":
        assert source.backend.process.shift_alpha == 3.0
    else:
        assert source.backend.process.prediction == "eps" and len(source.backend.process.sigmas) == 1000


@pytest.mark.case("memory 5.6", "training from a dataset loads no text encoder, and an autoencoder only to decode with")
def test_what_is_not_asked_for_is_not_loaded(saved, monkeypatch):
    import diffusers

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *a, **k: pytest.fail("a text encoder"))
    _, folder = saved
    source = open_source(ModelConfig(path=str(folder)))
    assert source.channels == 4 and source.encoder is None and "vae" not in vars(source)
    assert source.decode(torch.zeros(1, 4, 4, 4)).shape == (1, 3, 8, 8)


def test_a_real_pipeline_has_no_default_prompts(source):
    with pytest.raises(ValueError, match="text file with one prompt a line"):
        read_prompts("", source)


def test_mini_knows_its_classes_only():
    source = open_source(ModelConfig())
    assert read_prompts("", source) == list(mini.CLASS_NAMES)
    conds, empty = source.encode(["bag", "dress"])
    table = mini.load_conditioning()
    assert torch.equal(conds.context, table["context"][[8, 3]]) and torch.equal(empty.pooled, table["pooled"][10:])
    with pytest.raises(ValueError, match="not 'hat'"):
        source.encode(["bag", "hat"])


def test_bad_paths_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        open_source(ModelConfig(path=str(tmp_path / "none")))
    with pytest.raises(ValueError, match="model_index.json"):
        open_source(ModelConfig(path=str(tmp_path)))
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="no diffusers model"):
        open_source(ModelConfig(path=str(tmp_path)))
    with pytest.raises(ValueError, match="there is no file"):
        read_prompts(str(tmp_path / "none.txt"), None)
    (tmp_path / "empty.txt").write_text("\n  \n")
    with pytest.raises(ValueError, match="has no prompt"):
        read_prompts(str(tmp_path / "empty.txt"), None)
    (tmp_path / "two.txt").write_text("a dog\n\n  a cat \n")
    assert read_prompts(str(tmp_path / "two.txt"), None) == ["a dog", "a cat"]


def test_the_mini_model_refuses_a_negative_prompt_rather_than_forgetting_it():
    with pytest.raises(ValueError, match=r"no negative prompts: leave \[prompts\] negative out"):
        MiniSource(ModelConfig()).encode([mini.CLASS_NAMES[0]], "blurred")

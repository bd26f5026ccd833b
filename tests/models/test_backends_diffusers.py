import json

import pytest
import torch
from torch import nn

from distill_core.diffusion.process import DiscreteProcess, FlowProcess, cumulative_alphas
from distill_core.models.backends.diffusers import DiffusersBackend
from distill_core.models.backends.diffusers_folders import load_backend, process_from_scheduler
from distill_core.models.denoiser import Cond, Denoiser


def test_sd3_equals_a_direct_call(make_backend, batch):
    backend = make_backend("sd3")
    x, sigma, cond = batch
    velocity = backend.network(
        hidden_states=x, timestep=1000 * sigma, encoder_hidden_states=cond.context, pooled_projections=cond.pooled
    ).sample
    torch.testing.assert_close(Denoiser(backend)(x, sigma, cond), x - sigma.view(2, 1, 1, 1) * velocity)


@pytest.mark.parametrize("guidance", [False, True], ids=["schnell", "guidance embedding"])
def test_flux_equals_a_direct_call_with_the_pipelines_packing(make_backend, make_cond, batch, guidance):
    from diffusers import FluxPipeline

    backend = make_backend("flux", guidance_embeds=guidance)
    (x, sigma, _), cond = batch, make_cond(2, guidance=guidance)
    batch_size, channels, height, width = x.shape
    velocity = backend.network(
        hidden_states=FluxPipeline._pack_latents(x, batch_size, channels, height, width),
        timestep=sigma,
        guidance=cond.guidance,
        encoder_hidden_states=cond.context,
        pooled_projections=cond.pooled,
        txt_ids=torch.zeros(cond.context.shape[1], 3),
        img_ids=FluxPipeline._prepare_latent_image_ids(batch_size, height // 2, width // 2, x.device, x.dtype),
    ).sample
    velocity = FluxPipeline._unpack_latents(velocity, 8 * height, 8 * width, vae_scale_factor=8)
    torch.testing.assert_close(Denoiser(backend)(x, sigma, cond), x - sigma.view(2, 1, 1, 1) * velocity)


def test_flux_guidance_embedding_is_1_by_default(make_backend, make_cond, batch):
    denoiser = Denoiser(make_backend("flux", guidance_embeds=True))
    (x, sigma, cond), with_guidance = batch, make_cond(2, guidance=True)
    default = denoiser(x, sigma, cond)
    assert torch.equal(default, denoiser(x, sigma, Cond(cond.context, cond.pooled, torch.ones(2))))
    assert not torch.allclose(default, denoiser(x, sigma, with_guidance), atol=1e-4)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_unet_equals_a_direct_call(make_backend, batch, prediction):
    backend = make_backend("unet", DiscreteProcess(cumulative_alphas(), prediction))
    x, _, cond = batch
    timesteps = torch.tensor([999, 250])
    alpha = cumulative_alphas()[timesteps].float().view(2, 1, 1, 1)
    sigma = ((1 - alpha) / alpha).sqrt()
    scaled = x * alpha.sqrt()  # the variance-preserving input, x / sqrt(sigma^2 + 1)
    output = backend.network(scaled, timesteps, encoder_hidden_states=cond.context).sample
    if prediction == "eps":
        expected = (scaled - (1 - alpha).sqrt() * output) / alpha.sqrt()
    else:
        expected = alpha.sqrt() * scaled - (1 - alpha).sqrt() * output
    torch.testing.assert_close(Denoiser(backend)(x, sigma.flatten(), cond), expected, atol=1e-4, rtol=1e-4)


def test_sdxl_unet_gets_pooled_text_and_sizes(make_backend, batch):
    backend = make_backend(
        "unet",
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
    )
    x, sigma, cond = batch
    added = {"text_embeds": cond.pooled, "time_ids": torch.tensor([[48.0, 64.0, 0, 0, 48.0, 64.0]] * 2)}
    timesteps = backend.process.timestep(sigma)
    level = sigma.view(2, 1, 1, 1)
    output = backend.network(
        x / (level**2 + 1).sqrt(), timesteps, encoder_hidden_states=cond.context, added_cond_kwargs=added
    ).sample
    denoised = Denoiser(backend)(x, sigma, cond)
    torch.testing.assert_close(denoised, x - level * output)
    assert not torch.allclose(denoised, Denoiser(backend)(x, sigma, Cond(cond.context, cond.pooled + 1)), atol=1e-4)


def test_the_network_is_frozen_and_in_eval_mode(family, make_backend):
    network = make_backend(family).network
    assert not network.training and not any(p.requires_grad for p in network.parameters())


def test_default_processes(make_backend):
    sd3, flux, unet = (make_backend(name).process for name in ("sd3", "flux", "unet"))
    assert (sd3.timestep_multiplier, sd3.shift_alpha) == (1000.0, 3.0)
    assert (flux.timestep_multiplier, flux.shift_alpha) == (1.0, 1.0)
    assert unet.prediction == "eps" and unet.sigma_max == pytest.approx(14.6146, abs=1e-3)


def test_tap_names_are_the_blocks_in_running_order(make_backend, batch):
    names = {
        "sd3": [f"transformer_blocks.{i}" for i in range(3)],
        "flux": [f"{kind}.{i}" for kind in ("transformer_blocks", "single_transformer_blocks") for i in range(2)],
        "unet": ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"],
    }
    for family, expected in names.items():
        backend, ran = make_backend(family), []
        assert backend.tap_names == expected
        for name in expected:
            backend.network.get_submodule(name).register_forward_hook(lambda *_, name=name, ran=ran: ran.append(name))
        Denoiser(backend)(*batch)
        assert ran == expected


@pytest.mark.parametrize(
    "blocks, expected", [(24, [2, 5, 8, 11, 14, 17]), (14, [1, 3, 5, 7, 9, 10]), (4, [0, 1, 2]), (1, [0])]
)
def test_default_taps_are_spread_over_the_first_three_quarters(make_backend, monkeypatch, blocks, expected):
    backend = make_backend("sd3")
    monkeypatch.setattr(DiffusersBackend, "tap_names", [f"transformer_blocks.{i}" for i in range(blocks)])
    assert backend.default_taps(6) == [f"transformer_blocks.{i}" for i in expected]


def test_every_lora_target_runs_in_a_forward(family, make_backend, batch):
    backend = make_backend(family)
    ran = set()
    for name in backend.lora_targets():
        backend.network.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.add(name))
    Denoiser(backend)(*batch)
    assert ran == set(backend.lora_targets()) and len(ran) > 10


def test_new_path_takes_chosen_targets(make_backend):
    backend = make_backend("sd3")
    targets = backend.lora_targets()[:2]
    assert backend.new_lora(2, targets).targets == targets
    assert backend.new_lora(2).targets == backend.lora_targets()


def test_an_unknown_class_is_refused():
    with pytest.raises(ValueError, match="Linear is not supported.*SD3Transformer2DModel"):
        DiffusersBackend(nn.Linear(2, 2))


def save(folder, network, subfolder, scheduler=None):
    network.save_pretrained(folder / subfolder)
    if scheduler is not None:
        scheduler.save_pretrained(folder / "scheduler")
    return folder


def test_load_a_transformer_folder(make_network, make_backend, batch, tmp_path):
    from diffusers import FlowMatchEulerDiscreteScheduler

    folder = save(tmp_path, make_network("sd3"), "transformer", FlowMatchEulerDiscreteScheduler(shift=2.5))
    backend = load_backend(folder)
    assert (backend.process.timestep_multiplier, backend.process.shift_alpha) == (1000.0, 2.5)
    torch.testing.assert_close(Denoiser(backend)(*batch), Denoiser(make_backend("sd3"))(*batch))


def test_load_a_flux_folder_with_its_time_in_0_to_1(make_network, make_backend, batch, tmp_path):
    from diffusers import FlowMatchEulerDiscreteScheduler

    backend = load_backend(save(tmp_path, make_network("flux"), "transformer", FlowMatchEulerDiscreteScheduler()))
    assert backend.process.timestep_multiplier == 1.0
    torch.testing.assert_close(Denoiser(backend)(*batch), Denoiser(make_backend("flux"))(*batch))


def test_load_a_unet_folder_with_a_zero_terminal_snr_scheduler(make_network, tmp_path):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
    )
    backend = load_backend(save(tmp_path, make_network("unet"), "unet", scheduler), gradient_checkpointing=True)
    assert backend.process.prediction == "v"
    alphas = scheduler.alphas_cumprod[:-1].double()
    torch.testing.assert_close(backend.process.sigmas[:-1].double(), ((1 - alphas) / alphas).sqrt(), rtol=1e-3, atol=0)
    assert backend.process.sigma_max == pytest.approx(4096, rel=1e-3)
    assert backend.network.is_gradient_checkpointing


def test_load_a_network_folder_without_a_scheduler_in_another_precision(make_network, tmp_path):
    folder = save(tmp_path, make_network("sd3"), "transformer") / "transformer"
    backend = load_backend(folder, dtype=torch.bfloat16)
    assert next(backend.network.parameters()).dtype == torch.bfloat16
    assert backend.process.shift_alpha == 3.0  # the family's default


def test_folders_without_a_supported_network_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no diffusers model"):
        load_backend(tmp_path)
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({"_class_name": "PixArtTransformer2DModel"}))
    with pytest.raises(ValueError, match="PixArtTransformer2DModel"):
        load_backend(tmp_path)


@pytest.mark.parametrize("schedule", ["scaled_linear", "linear"])
@pytest.mark.parametrize("rescale", [False, True], ids=["", "zero terminal SNR"])
def test_process_has_the_sigmas_of_diffusers(schedule, rescale):
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler(
        beta_start=0.001,
        beta_end=0.015,
        beta_schedule=schedule,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=rescale,
        num_train_timesteps=500,
    )
    process = process_from_scheduler(dict(scheduler.config))
    alphas = scheduler.alphas_cumprod.double()
    torch.testing.assert_close(process.sigmas.double(), ((1 - alphas) / alphas).sqrt(), rtol=1e-3, atol=0)
    assert process.prediction == "v" and len(process.sigmas) == 500


def test_process_of_a_flow_scheduler_by_family():
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    for class_name, multiplier in (("SD3Transformer2DModel", 1000.0), ("FluxTransformer2DModel", 1.0)):
        process = process_from_scheduler(config, class_name)
        assert isinstance(process, FlowProcess)
        assert (process.timestep_multiplier, process.shift_alpha) == (multiplier, 3.0)


def test_dynamic_shifting_takes_the_mu_of_1024_pixels_as_its_logarithmic_shift():
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "use_dynamic_shifting": True}
    process = process_from_scheduler({**config, "max_shift": 1.15}, "FluxTransformer2DModel")
    assert process.shift_alpha == pytest.approx(3.158, abs=1e-3)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"beta_schedule": "squaredcos_cap_v2"}, "squaredcos_cap_v2"),
        ({"prediction_type": "sample"}, "sample"),
        ({"rescale_betas_zero_snr": True}, "zero terminal SNR"),
    ],
)
def test_schedulers_that_no_process_describes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        process_from_scheduler({"_class_name": "DDIMScheduler", **change})

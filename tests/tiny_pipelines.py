"""Whole diffusers pipelines of a few thousand weights, as they are saved to a folder."""

from __future__ import annotations

from contextlib import contextmanager

from networks import CONTEXT_DIM, build_network


def tokenizer():
    """CLIP's tokenizer with letters as its whole vocabulary."""
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=12)


def text_encoder(width: int, projection: int | None = None):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=54,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=12,
        projection_dim=projection or 8,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def autoencoder(**config):
    from diffusers import AutoencoderKL

    blocks = dict(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=4,
        layers_per_block=1,
    )
    return AutoencoderKL(**{**blocks, **config}).eval()


def sd3(kind: str = "StableDiffusion3Pipeline", channels: int = 4, **network):
    import diffusers

    return getattr(diffusers, kind)(
        transformer=build_network("sd3", **network),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(scaling_factor=1.5, shift_factor=0.1, latent_channels=channels),
        text_encoder=text_encoder(16, 8),
        tokenizer=tokenizer(),
        text_encoder_2=text_encoder(16, 8),
        tokenizer_2=tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def sd(kind: str = "StableDiffusionPipeline", **network):
    import diffusers

    return getattr(diffusers, kind)(
        unet=build_network("unet", **network),
        scheduler=diffusers.DDIMScheduler(beta_schedule="scaled_linear"),
        vae=autoencoder(scaling_factor=0.5),
        text_encoder=text_encoder(32),
        tokenizer=tokenizer(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def flux(guidance: bool = True, kind: str = "FluxPipeline", vae: dict | None = None, **network):
    import diffusers
    from transformers import T5Config, T5EncoderModel

    sizes = dict(vocab_size=54, d_model=CONTEXT_DIM, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
    dynamic = {"use_dynamic_shifting": True, "max_shift": 1.15} if guidance else {"shift": 1.0}
    return getattr(diffusers, kind)(
        transformer=build_network("flux", guidance_embeds=guidance, **network),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**dynamic),
        vae=autoencoder(scaling_factor=0.5, shift_factor=0.1, **(vae or {})),
        text_encoder=text_encoder(16),
        tokenizer=tokenizer(),
        text_encoder_2=T5EncoderModel(T5Config(**sizes)).eval(),
        tokenizer_2=tokenizer(),
    )


def flux_fill():
    """Latents of four channels, whose positions are of 8 x 8 pixels."""
    blocks = dict(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 16),
    )
    return flux(kind="FluxFillPipeline", vae=blocks, in_channels=4 * (4 + 4 + 64), out_channels=16)


def flux_kontext():
    return flux(kind="FluxKontextPipeline")


def sd_inpainting():
    return sd("StableDiffusionInpaintPipeline", in_channels=9)


def sd3_inpainting():
    return sd3("StableDiffusion3InpaintPipeline", 16, in_channels=33, out_channels=16)


def sdxl_inpainting():
    return sdxl("StableDiffusionXLInpaintPipeline", in_channels=9)


def sd3_editing():
    return sd3("StableDiffusion3Pipeline", 16, in_channels=32, out_channels=16)


def instruct_pix2pix():
    return sd("StableDiffusionInstructPix2PixPipeline", in_channels=8)


def sdxl_editing():
    return sdxl("StableDiffusionXLInstructPix2PixPipeline", in_channels=8)


def sdxl(kind: str = "StableDiffusionXLPipeline", **network):
    import diffusers

    added = dict(
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 16
    )
    return getattr(diffusers, kind)(
        unet=build_network("unet", **added, **network),
        scheduler=diffusers.DDIMScheduler(beta_schedule="scaled_linear"),
        vae=autoencoder(scaling_factor=0.5),
        text_encoder=text_encoder(16),
        tokenizer=tokenizer(),
        text_encoder_2=text_encoder(16, 16),
        tokenizer_2=tokenizer(),
        add_watermarker=False,
    )


@contextmanager
def watched(network):
    """What a pipeline tells its network by name, and what that answers, call by call."""
    told, answers = [], []
    handles = [
        network.register_forward_pre_hook(lambda _, args, kwargs: told.append(kwargs), with_kwargs=True),
        network.register_forward_hook(lambda _, args, output: answers.append(output[0])),
    ]
    yield told, answers
    for handle in handles:
        handle.remove()

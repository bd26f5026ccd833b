"""Workflows that distil models which edit a picture, in API format; that on the scenes model runs anywhere."""

from __future__ import annotations

from inpainting_workflows import EDITED, ON_SCENES, SMALL, drawn, photograph, scenes_of
from workflow_nodes import FLUX_CLIP, QWEN_CLIP, link, node, parts, turbo_sampler

SOURCES = "scenes before they were edited (shipped)"
ASKED = "turn the day into a night with stars"


def learnt(
    name: str, source: tuple[list, list, list], pairs_name: str, pairs: dict, edits: dict, trainer: dict
) -> dict:
    """Pictures before and after -> what the teacher makes of them -> a trainer -> LoRA and report. source: MODEL, CLIP
    and VAE."""
    model, clip, vae = source
    given = dict(model=model, vae=vae, clip=clip, folder=EDITED, source_folder=SOURCES, dataset_name=pairs_name)
    shown = dict(model=model, pairs=link("pairs"), dataset_name=name)
    return {
        "pairs": node("TurboDistillPictureFolder", **given, **pairs),
        "dataset": node("TurboDistillTeacherEdits", **shown, **edits),
        "train": node(
            "TurboDistillLADDTrainer", model=model, dataset=link("dataset"), run_name=name, vae=vae, **trainer
        ),
        "lora": node("TurboDistillSaveLora", lora=link("train", 1), filename_prefix=f"loras/{name}"),
        "report": node("SaveImage", images=link("train", 3), filename_prefix=f"{name}_report"),
    }


def edit_scenes() -> dict:
    """The scenes editing model in one step that is told how closely to keep to text and picture: one edit by the
    teacher, and by the student at two strengths of the text."""
    name, (loaders, model, clip, vae) = "edit_scenes", scenes_of("editing")
    edits = dict(count=192, steps=12, pairs_for_steps=1, batch_size=48, dtype="float32")
    edits |= dict(text_strength_low=1.0, text_strength_high=5.0, image_strength_low=1.0, image_strength_high=2.5)
    trainer = dict(pairs_weight=4.0, steps=160, batch_size=16, student_lr=6e-4, discriminator_lr=4e-3, **SMALL)
    trainer |= dict(strengths_told=True, usual_text_strength=2.0, usual_image_strength=1.3)
    given = dict(positive=link("edit"), latent=link("edit", 2), seed=link("seed"))
    workflow = {
        **loaders,
        "positive": node("CLIPTextEncode", text="striped green ring on cobbles", clip=clip),
        "compared": node("CLIPTextEncode", text="striped yellow ring on cobbles", clip=clip),
        "negative": node("CLIPTextEncode", text="", clip=clip),
        **learnt(name, (model, clip, vae), "scene_pairs", ON_SCENES, edits, trainer),
        "seed": node("PrimitiveInt", value=7),
        **drawn("positive"),
        "edit": node(
            "InstructPixToPixConditioning",
            **dict(positive=link("compared"), negative=link("negative"), vae=vae, pixels=link("picture")),
        ),
        "guider": node(
            "DualCFGGuider",
            **dict(model=model, cond1=link("edit"), cond2=link("edit", 1), negative=link("negative")),
            **dict(cfg_conds=4.0, cfg_cond2_negative=1.3, style="regular"),
        ),
        "noise": node("RandomNoise", noise_seed=link("seed")),
        "euler": node("KSamplerSelect", sampler_name="euler"),
        "levels": node("BasicScheduler", model=model, scheduler="simple", steps=25, denoise=1.0),
        "teacher": node(
            "SamplerCustomAdvanced",
            **dict(noise=link("noise"), guider=link("guider"), sampler=link("euler"), sigmas=link("levels")),
            latent_image=link("edit", 2),
        ),
    }
    for who, text in (("weak", 1.5), ("strong", 4.0)):
        told = dict(model=link("train"), text_strength=text, image_strength=1.3)
        workflow[f"told {who}"] = node("TurboDistillEditingStrengths", **told)
        workflow[f"student {who}"] = turbo_sampler(link(f"told {who}"), **given)
    shown = {"picture": link("picture")}
    for who in ("teacher", "student weak", "student strong"):
        workflow[f"decode {who}"], shown[who] = node("VAEDecode", samples=link(who), vae=vae), link(f"decode {who}")
    for who, images in shown.items():
        prefix = f"{name}_{who.replace(' ', '_')}"
        workflow[f"save {who}"] = node("SaveImage", images=images, filename_prefix=prefix)
    return workflow


def by_reference(
    name: str, source: tuple[dict, list, list, list], shown: dict, strength: float, pairs: dict, count: int
) -> dict:
    """A model of full size that goes by a reference, in 4 steps: the teacher edits pictures of one's own.

    shown: nodes that end in the CONDITIONINGs "shown" and "negative", of the picture and what is asked for.  strength:
    the teacher's guidance of the text; that of the picture is left at 1.  count: of edits.
    """
    loaders, model, clip, vae = source
    edits = dict(count=count, steps=25, batch_size=2, text_strength_low=strength, text_strength_high=strength)
    edits |= dict(image_strength_low=1.0, image_strength_high=1.0)
    trainer = dict(target_steps=4, steps=2000, batch_size=2, pairs_weight=0.0, teacher_cfg=strength)
    common = dict(positive=link("shown"), latent_image=link("latent"), seed=link("seed"), steps=0, preset="auto")
    common |= dict(denoise=1.0, denoise_mode="snap")
    guided = dict(negative=link("negative"), sigmas=link("levels"), sampler="euler", cfg=strength)
    workflow = {
        **loaders,
        **learnt(name, (model, clip, vae), f"{name}_pairs", dict(size=1024, **pairs), edits, trainer),
        **photograph(1024),
        **shown,
        "latent": node("EmptySD3LatentImage", width=1024, height=1024, batch_size=1),
        "seed": node("PrimitiveInt", value=7),
        "levels": node("BasicScheduler", model=model, scheduler="simple", steps=25, denoise=1.0),
        "teacher": node("TurboDistillSampler", model=model, **common, **guided),
        "student": node("TurboDistillSampler", model=link("train"), **common, sampler="of the preset", cfg=0.0),
    }
    for who in ("teacher", "student"):
        workflow[f"decode {who}"] = node("VAEDecode", samples=link(who), vae=vae)
        workflow[f"save {who}"] = node("SaveImage", images=link(f"decode {who}"), filename_prefix=f"{name}_{who}")
    return workflow


def kontext() -> dict:
    """FLUX.1 Kontext is told its guidance, so the teacher runs at strength 1."""
    source = parts("flux1-dev-kontext_fp8_scaled.safetensors", FLUX_CLIP, "ae.safetensors")
    _, _, clip, vae = source
    shown = {
        "compared": node("CLIPTextEncode", text=ASKED, clip=clip),
        "guided compared": node("FluxGuidance", conditioning=link("compared"), guidance=2.5),
        "encoded": node("VAEEncode", pixels=link("picture"), vae=vae),
        "shown": node("ReferenceLatent", conditioning=link("guided compared"), latent=link("encoded")),
        "negative": node("ConditioningZeroOut", conditioning=link("guided compared")),
    }
    return by_reference("distil_flux1_kontext", source, shown, 1.0, dict(embedded_guidance=2.5), 1000)


def qwen_image_edit() -> dict:
    """Its text encoder is shown the picture, too."""
    files = "qwen_image_edit_2509_fp8_e4m3fn.safetensors", QWEN_CLIP, "qwen_image_vae.safetensors"
    loaders, model, clip, vae = parts(*files)
    shift = {"shift": node("ModelSamplingAuraFlow", model=model, shift=3.1)}
    told = dict(clip=clip, vae=vae, image1=link("picture"))
    shown = {
        "shown": node("TextEncodeQwenImageEditPlus", prompt=ASKED, **told),
        "negative": node("TextEncodeQwenImageEditPlus", prompt="", **told),
    }
    source, seen = (loaders | shift, link("shift"), clip, vae), dict(source_in_text="Qwen-Image-Edit-2509")
    return by_reference("distil_qwen_image_edit", source, shown, 4.0, seen, 500)


EDIT_WORKFLOWS = {
    "edit_scenes": edit_scenes(),
    "distil_flux1_kontext": kontext(),
    "distil_qwen_image_edit": qwen_image_edit(),
}

"""Workflows that tune a turbo on own pictures and sample it before and after, in API format."""

from __future__ import annotations

from collections.abc import Sequence

from distil_workflows import EXAMPLES
from workflow_nodes import FLUX_CLIP, Z_CLIP, checkpoint, link, node, parts, turbo_sampler

KEPT_CLASSES = ("t-shirt", "trouser", "pullover", "dress", "sandal", "shirt", "sneaker")
OWN_CLASSES = ("ankle boot", "bag", "coat")  # of the shipped example pictures
PREFERRED, REJECTED = "preferred examples (shipped)", "rejected examples (shipped)"  # of the same classes
OWN, KEPT = "own", "kept"  # the two prompts that are sampled before and after
MEASURED = (  # by Turbo Retention; none of them is among the prompts that come with the pack
    "a red tractor in a wheat field, photograph",
    "three lemons on a blue plate, seen from above",
    "portrait of a smiling carpenter in his workshop, oil painting",
    "an observatory on a snowy peak under the Milky Way, digital art",
)
SHOWN = {OWN: "a lighthouse on a cliff in my style", KEPT: "a red fox in fresh snow, morning light, photograph"}


def before_and_after(
    name: str, model: list, vae: list, latent: dict, prompts: Sequence[str] = (OWN, KEPT), **sampling
) -> dict:
    """The turbo and the tuned turbo from the same noise, on a prompt of own pictures and on one to keep."""
    made = {"latent": latent, "seed": node("PrimitiveInt", value=7)}
    for prompt in prompts:
        for who, source in (("turbo", model), ("tuned", link("train"))):
            key = f"{who} {prompt}"
            made[key] = turbo_sampler(source, link(prompt), link("latent"), **sampling | {"seed": link("seed")})
            made[f"decode {key}"] = node("VAEDecode", samples=link(key), vae=vae)
            made[f"save {key}"] = node(
                "SaveImage", images=link(f"decode {key}"), filename_prefix=f"{name}_{who}_{prompt}"
            )
    return made


def retention(model: list, vae: list, **settings) -> dict:
    """What the turbo has lost, on prompts to keep."""
    wired = dict(before=model, after=link("train"), positive=link("kept prompts"), latent_image=link("latent"), vae=vae)
    return {"retention": node("TurboDistillRetention", **wired, **settings)}


def kept_prompts(texts: Sequence[str], clip: list) -> dict:
    return {
        "kept words": node("TurboDistillPrompts", prompts="\n".join(texts), file="none"),
        "kept prompts": node("CLIPTextEncode", text=link("kept words"), clip=clip),
    }


def tuning(name: str, model: list, encoder: list, vae: list, pictures: dict, previews: list, **trainer) -> dict:
    """Picture Folder -> Tune Turbo -> Save Turbo LoRA and the report."""
    folder = dict(model=model, vae=vae, clip=encoder, folder=EXAMPLES, dataset_name=name)
    wired = dict(model=model, dataset=link("dataset"), run_name=name, vae=vae, preview_positive=previews)
    return {
        "dataset": node("TurboDistillPictureFolder", **folder, **pictures),
        "train": node("TurboDistillTuneTrainer", **wired, **trainer),
        "lora": node("TurboDistillSaveLora", lora=link("train", 1), filename_prefix=f"loras/{name}"),
        "report": node("SaveImage", images=link("train", 3), filename_prefix=f"{name}_report"),
    }


def tune_large(
    name: str, source: tuple[dict, list, list, list], size: int, empty: str, sampling: dict | None = None, **trainer
) -> dict:
    """A turbo of any family, the shipped prompts to keep."""
    loaders, model, clip, vae = source
    latent = node(empty, width=size, height=size, batch_size=2)
    return {
        **loaders,
        **{key: node("CLIPTextEncode", text=text, clip=clip) for key, text in SHOWN.items()},
        **kept_prompts(MEASURED, clip),
        **tuning(name, model, clip, vae, dict(size=size), link(OWN), clip=clip, steps=2000, **trainer),
        **before_and_after(name, model, vae, latent, **(sampling or {})),
        **retention(model, vae, preset=trainer.get("preset", "auto")),
    }


def mini_parts() -> dict:
    """The mini turbo, and prompts of its classes that the own pictures are not of."""
    return {"mini": node("TurboDistillLoadMiniModel", distilled=True), **kept_prompts(KEPT_CLASSES, link("mini", 2))}


def tune_mini() -> dict:
    """Clothes in inverted grey, three classes of ten; the other seven are kept."""
    model, vae, clip = (link("mini", i) for i in range(3))
    latent = node("EmptySD3LatentImage", width=64, height=64, batch_size=4)
    texts = {OWN: "ankle boot", KEPT: "trouser"}
    pictures = dict(size=64, step=16, dtype="float32")
    kept = dict(keep_positive=link("kept prompts"), keep_count=140, keep_share=0.33, keep_weight=3.0)
    trainer = kept | dict(steps=700, batch_size=12, student_lr=1.5e-3, rank=32, gradient_checkpointing=False)
    return {
        **mini_parts(),
        "own words": node("TurboDistillPrompts", prompts="\n".join(OWN_CLASSES), file="none"),
        "own prompts": node("CLIPTextEncode", text=link("own words"), clip=clip),
        **{key: node("TurboDistillMiniConditioning", class_name=text) for key, text in texts.items()},
        **tuning("tune_mini_turbo", model, clip, vae, pictures, link("own prompts"), **trainer),
        **before_and_after("tune_mini_turbo", model, vae, latent),
        **retention(model, vae, noises=2),
    }


def make_adapter() -> dict:
    """The mini turbo's training adapter, and what it does: few steps get worse, many stay."""
    vae, name = link("mini", 1), "make_adapter"
    steps = dict(few=(4, link("train")), many=(25, link("train")), turbo=(4, link("mini")))
    made = {
        **mini_parts(),
        "compared": node("TurboDistillMiniConditioning", class_name="ankle boot"),
        "train": node(
            "TurboDistillAdapterTrainer",
            model=link("mini"),
            positive=link("kept prompts"),
            run_name=name,
            sizes="64x64",
            keep_count=140,
            steps=300,
            batch_size=12,
            vae=vae,
            preview_positive=link("kept prompts"),
            student_lr=1e-3,
            rank=16,
            gradient_checkpointing=False,
        ),
        "lora": node("TurboDistillSaveLora", lora=link("train", 1), filename_prefix=f"loras/{name}"),
        "report": node("SaveImage", images=link("train", 3), filename_prefix=f"{name}_report"),
        "latent": node("EmptySD3LatentImage", width=64, height=64, batch_size=4),
        "seed": node("PrimitiveInt", value=7),
        "levels": node("BasicScheduler", model=link("mini"), scheduler="simple", steps=25, denoise=1.0),
    }
    for who, (count, model) in steps.items():
        own = dict(sigmas=link("levels"), sampler="euler", cfg=1.0) if count > 4 else {}
        key = f"adapter {who}"
        made[key] = turbo_sampler(model, link("compared"), link("latent"), **own | {"seed": link("seed")})
        made[f"decode {key}"] = node("VAEDecode", samples=link(key), vae=vae)
        made[f"save {key}"] = node("SaveImage", images=link(f"decode {key}"), filename_prefix=f"{name}_{who}")
    return made


def prefer_mini() -> dict:
    """The mini model learns from twelve pairs where the light is to come from; both sampled as the model is."""
    name, model, vae = "prefer_mini", link("shifted"), link("mini", 1)
    folders = dict(folder=PREFERRED, rejected_folder=REJECTED, dataset_name=name)
    pictures = dict(model=model, vae=vae, clip=link("mini", 2), size=64, step=16, dtype="float32")
    wired = dict(model=model, dataset=link("dataset"), run_name=name, vae=vae, preview_negative=link("negative"))
    learning = dict(steps=80, batch_size=8, student_lr=1e-3, rank=16, beta=200.0, gradient_checkpointing=False)
    texts = {"paired": "ankle boot", "unpaired": "trouser"}
    guided = dict(sampler="euler", cfg=1.5, sigmas=link("model levels"), negative=link("negative"), seed=link("seed"))
    made = {
        "mini": node("TurboDistillLoadMiniModel", distilled=False),
        "shifted": node("ModelSamplingSD3", model=link("mini"), shift=1.0),
        "positive": node("TurboDistillMiniConditioning", class_name="all ten"),
        "negative": node("TurboDistillMiniConditioning", class_name="none"),
        **{key: node("TurboDistillMiniConditioning", class_name=text) for key, text in texts.items()},
        "dataset": node("TurboDistillPictureFolder", **folders, **pictures),
        "train": node("TurboDistillDPOTrainer", **wired, preview_positive=link("positive"), cfg=1.5, **learning),
        "lora": node("TurboDistillSaveLora", lora=link("train", 1), filename_prefix=f"loras/{name}"),
        "report": node("SaveImage", images=link("train", 3), filename_prefix=f"{name}_report"),
        "model levels": node("BasicScheduler", model=model, scheduler="simple", steps=25, denoise=1.0),
    }
    latent = node("EmptySD3LatentImage", width=64, height=64, batch_size=4)
    return made | before_and_after(name, model, vae, latent, tuple(texts), **guided)


TUNE_WORKFLOWS = {
    "prefer_mini": prefer_mini(),
    "tune_mini_turbo": tune_mini(),
    "make_adapter": make_adapter(),
    "tune_z_image_turbo": tune_large(
        "tune_z_image_turbo",
        parts("z_image_turbo_bf16.safetensors", Z_CLIP, "ae.safetensors"),
        1024,
        "EmptySD3LatentImage",
        batch_size=2,
        rank=16,
    ),
    "tune_flux1_schnell": tune_large(
        "tune_flux1_schnell",
        parts("flux1-schnell.safetensors", FLUX_CLIP, "ae.safetensors"),
        1024,
        "EmptySD3LatentImage",
        batch_size=2,
        rank=16,
        turbo_steps=4,
    ),
    "tune_sdxl_turbo": tune_large(
        "tune_sdxl_turbo",
        checkpoint("sd_xl_turbo_1.0_fp16.safetensors"),
        512,
        "EmptyLatentImage",
        dict(preset="sdxl-turbo", steps=4),
        batch_size=4,
        rank=32,
        preset="sdxl-turbo",
        turbo_steps=4,
    ),
}

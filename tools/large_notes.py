"""The notes of workflows on models of full size, with what each will need (`estimates`)."""

from __future__ import annotations

from estimates import NEEDS, in_words
from note_parts import BEFORE_AFTER, COMPARISON, DOWNLOAD, GATED, PASTED, RESUME, USE, USE_FILL, USE_TUNED, note

TUNED_COUNT = 256  # the node's default of keep_count
OWN_STEPS = {"tune_z_image_turbo": 8}  # of turbos whose workflow leaves turbo_steps at 0


def on_large(name: str, title: str, what: str, workflow: dict, *more: str) -> str:
    inputs = {key: workflow[key]["inputs"] for key in ("dataset", "train")}
    return note(
        title,
        what + " **Not yet run by us on a card**: a start, not a result.",
        DOWNLOAD + GATED + "Then press **Run**. To see that all works, set *count* to 100 and *steps* to 50 first.",
        "The model. Then *prompts to learn from*: choose a text file of yours in ComfyUI's `input` folder, with "
        "prompts like those you will use. Hundreds are better than ten. " + RESUME,
        "First the latents, then curves and samples on the trainer. Its status should say *healthy*. " + COMPARISON,
        in_words(NEEDS[name], inputs["dataset"], inputs["train"]),
        *more,
        USE,
    )


def tune_large(name: str, title: str, what: str, workflow: dict, *more: str) -> str:
    """A turbo of full size on own pictures."""
    train = workflow["train"]["inputs"]
    steps = train.get("turbo_steps") or OWN_STEPS[name]
    sampled = {"count": TUNED_COUNT, "steps": steps, "cfg": 1.0}
    return note(
        title,
        what + " **Not yet run by us on a card**: a start, not a result.",
        DOWNLOAD + GATED + "In *Picture Folder* choose a folder of yours (inside ComfyUI's `input`, a `.txt` with the "
        "caption beside each picture; press **R** to see a new folder). Then press **Run**.",
        "*positive, of your pictures*: write it as your captions are written. Then *keep_share*: more keeps more of "
        "what the model was. To see that all works, set *keep_count* to 16 and *steps* to 50 first. " + RESUME,
        f"First the turbo samples {TUNED_COUNT} pictures of prompts to keep, then curves and samples on the trainer. "
        f"{BEFORE_AFTER}",
        in_words(NEEDS[name], sampled, train),
        *more,
        USE_TUNED,
    )


def fill_large(name: str, title: str, what: str, workflow: dict, *more: str) -> str:
    """An inpainting model of full size on own pictures."""
    return note(
        title,
        what + " **Not yet run by us on a card**: a start, not a result.",
        DOWNLOAD + "In *Picture Folder* choose a folder of yours (inside ComfyUI's `input`, a `.txt` with the caption "
        "beside each picture; press **R** to see a new folder). Then press **Run**. To see that all works, set *steps* "
        "to 50 first.",
        "*masks*: *random*, or *files* and *alpha* for masks of your own. *masks_each* is how many random masks a "
        "picture gets. Thousands of pictures are better than a hundred. " + RESUME,
        "Curves and samples on the trainer: pictures with a hole, and what the student fills in. " + PASTED,
        in_words(NEEDS[name], None, workflow["train"]["inputs"]),
        *more,
        USE_FILL,
    )


def edit_large(name: str, title: str, what: str, workflow: dict, *more: str) -> str:
    """A model of full size that edits own pictures."""
    edits, train = workflow["dataset"]["inputs"], workflow["train"]["inputs"]
    return note(
        title,
        what + " **Not yet run by us on a card**: a start, not a result.",
        DOWNLOAD + "In *Picture Folder* choose your pictures as *source_folder*, and as *folder* the same pictures "
        "with, in a `.txt` beside each, what is to be done with it (both inside ComfyUI's `input`; press **R** to see "
        "a new folder). Then press **Run**. To see that all works, set *count* to 20 and *steps* to 50 first.",
        "The instructions: like those that you will use. Hundreds of pictures are better than ten. " + RESUME,
        "First the teacher's edits, then curves and samples on the trainer. " + COMPARISON,
        in_words(NEEDS[name], {**edits, "cfg": edits["text_strength_high"]}, train),
        *more,
        USE,
    )


def turbo(title: str, what: str, change: str, expect: str) -> str:
    return note(title, what, f"{DOWNLOAD}Then press **Run**.", change, expect)


def large_notes(workflows: dict[str, dict]) -> dict[str, str]:
    """Note by the name of the workflow."""
    large = {name: workflows[name] for name in NEEDS if name.startswith("distil_")}
    return {
        "tune_z_image_turbo": tune_large(
            "tune_z_image_turbo",
            "Tune Z-Image Turbo on your own pictures",
            "A style or a character for Z-Image Turbo that still works in its 8 steps.",
            workflows["tune_z_image_turbo"],
        ),
        "tune_flux1_schnell": tune_large(
            "tune_flux1_schnell",
            "Tune FLUX.1 schnell on your own pictures",
            "A style or a character for FLUX.1 schnell that still works in its 4 steps.",
            workflows["tune_flux1_schnell"],
        ),
        "tune_sdxl_turbo": tune_large(
            "tune_sdxl_turbo",
            "Tune SDXL-Turbo on your own pictures",
            "A style or a character for SDXL-Turbo that still works in 1 to 4 steps, at 512 px. SDXL has several "
            "turbos, so *preset* of Tune Turbo says which one this is.",
            workflows["tune_sdxl_turbo"],
        ),
        "distil_sdxl_fine_tune": on_large(
            "distil_sdxl_fine_tune",
            "Distil your SDXL fine-tune into 4 steps",
            "LADD on your own checkpoint. Training Settings keeps a LoRA every 500 steps, to compare.",
            large["distil_sdxl_fine_tune"],
        ),
        "distil_sd3.5_medium": on_large(
            "distil_sd3.5_medium",
            "Distil SD3.5 medium into 4 steps",
            "LADD, the method of SD3-Turbo.",
            large["distil_sd3.5_medium"],
        ),
        "distil_flux1_dev": on_large(
            "distil_flux1_dev",
            "Distil FLUX.1 dev into 4 steps",
            "LADD. FLUX.1 dev takes its guidance (3.5) as an input, so the teacher runs at cfg 1 without a negative.",
            large["distil_flux1_dev"],
        ),
        "distil_sdxl_add": on_large(
            "distil_sdxl_add",
            "Distil SDXL into 4 steps with ADD, at 512 px",
            "As SDXL-Turbo was made: DINOv2-large judges what a tiny autoencoder decodes.",
            large["distil_sdxl_add"],
            "`dinov2_large.safetensors` is `model.safetensors` of facebook/dinov2-large under another name, in "
            "`models/clip_vision`. The two files of taesdxl belong into `models/vae_approx`.",
        ),
        "distil_sd1.5_diffusion2gan": on_large(
            "distil_sd1.5_diffusion2gan",
            "Distil SD 1.5 into one step",
            "Diffusion2GAN learns from 20,000 pairs of noise and teacher result. Only the checkpoint is needed.",
            large["distil_sd1.5_diffusion2gan"],
            "The paper takes E-LatentLPIPS as the distance. If you have its weights for SD 1.5, put them into "
            "`models/perceptual` and connect *Load E-LatentLPIPS* to *perceptual*. Without, it is a Huber distance.",
        ),
        "distil_sd15_inpainting": fill_large(
            "distil_sd15_inpainting",
            "Distil SD 1.5 inpainting into one step",
            "LADD on your own pictures with masks, as LADD's authors did it with SD3 (section 6.2 of the paper).",
            large["distil_sd15_inpainting"],
        ),
        "distil_sdxl_inpainting": fill_large(
            "distil_sdxl_inpainting",
            "Distil SDXL inpainting into one step",
            "LADD on your own pictures with masks.",
            large["distil_sdxl_inpainting"],
            "`sdxl_inpainting_0.1_fp16.safetensors` is `unet/diffusion_pytorch_model.fp16.safetensors` of "
            "diffusers/stable-diffusion-xl-1.0-inpainting-0.1 under another name, in `models/diffusion_models`. Text "
            "encoders and VAE come from the SDXL checkpoint.",
        ),
        "distil_flux1_fill": fill_large(
            "distil_flux1_fill",
            "Distil FLUX.1 Fill into one step",
            "LADD on your own pictures with masks. FLUX.1 Fill takes its guidance (30) as an input, so the teacher "
            "runs at cfg 1. Keep *embedded_guidance* of Picture Folder and FluxGuidance the same.",
            large["distil_flux1_fill"],
        ),
        "distil_flux1_kontext": edit_large(
            "distil_flux1_kontext",
            "Distil FLUX.1 Kontext into 4 steps",
            "The teacher edits your pictures by your instructions, and LADD makes a LoRA of it. FLUX.1 Kontext takes "
            "its guidance (2.5) as an input, so its strengths are 1. Keep *embedded_guidance* of Picture Folder and "
            "FluxGuidance the same.",
            large["distil_flux1_kontext"],
        ),
        "distil_qwen_image_edit": edit_large(
            "distil_qwen_image_edit",
            "Distil Qwen-Image-Edit into 4 steps",
            "The teacher edits your pictures by your instructions, and LADD makes a LoRA of it. Its text encoder is "
            "shown the picture, too: *source_in_text* of Picture Folder says as which version does.",
            large["distil_qwen_image_edit"],
            "Captions with a picture take about 3 MB of memory each while Picture Folder works, 20 MB with the first "
            "version's way of showing.",
        ),
        "sdxl_turbo": turbo(
            "SDXL-Turbo in 1 step",
            "At 512 px, as it was trained.",
            "The prompt. *steps* 2 or 4 give more detail.",
            "One picture. SDXL-Turbo needs no negative prompt; its cfg is 1.",
        ),
        "sd_turbo": turbo(
            "SD-Turbo in 2 steps",
            "At 512 px. SD-Turbo and SDXL-Turbo were trained at the same noise levels, so they share the preset "
            "*sdxl-turbo*.",
            "The prompt. *steps* can be 1 to 4.",
            "One picture.",
        ),
        "flux1_schnell": turbo(
            "FLUX.1 schnell in 4 steps",
            "Its noise levels do not depend on the size, unlike FLUX.1 dev's.",
            "The prompt, then the size.",
            "One picture of 1024 px.",
        ),
        "sd3.5_large_turbo": turbo(
            "SD3.5 Large Turbo in 4 steps",
            "At the four levels it was trained at. " + GATED,
            "The prompt.",
            "One picture of 1024 px.",
        ),
        "z_image_turbo": turbo(
            "Z-Image Turbo",
            "With the steps and levels of its preset.",
            "The prompt.",
            "One picture of 1024 px. The text under Turbo Sampler names the levels.",
        ),
        "qwen_image_lightning": turbo(
            "Qwen-Image in 4 steps",
            "With the Lightning LoRA and its preset.",
            "The prompt. For the 8-step LoRA choose the preset *qwen-image-lightning-8*.",
            "One picture of 1328 px.",
        ),
        "sdxl_dmd2_lora": turbo(
            "SDXL with the DMD2 LoRA, in core's SamplerCustom",
            "Turbo Preset gives noise levels, sampler and cfg to core's own sampler.",
            "The prompt. Then the checkpoint: the LoRA works on SDXL fine-tunes, too.",
            "One picture of 1024 px. *What the preset chose* names every value and its source.",
        ),
        "image_to_image_2_steps": turbo(
            "Image to image in 2 steps",
            "*denoise* 0.5 of four trained levels is two steps.",
            "The picture, the prompt, then *denoise*: 0.25, 0.5 or 0.75 start at a trained level.",
            "Your picture with its layout kept and its content changed.",
        ),
        "inpainting_4_steps": turbo(
            "Inpainting in 4 steps",
            "A soft square in the middle is made anew; the rest stays as it is, to the last bit of the latent.",
            "The picture and the prompt. For a mask of your own: right-click the picture, *Open in MaskEditor*, and "
            "connect its MASK to *Set Latent Noise Mask*. An empty mask changes nothing, and Turbo Sampler says so.",
            "The picture with a new middle.",
        ),
    }

"""The note in each workflow: what it does, what to press, what to change first, what to expect. In Markdown."""

from __future__ import annotations

from estimates import NEEDS, in_words

PRESS = "Press **Run**."
DOWNLOAD = "Red loaders lack their file: the panel *Missing Models* downloads it, or choose a file of your own. "
GATED = "Models of Stability AI and Black Forest Labs ask for a login and their licence on Hugging Face first. "
COMPARISON = (
    "*Teacher's pictures* and *student's pictures* start from the same noise. The student's should show as much in its "
    "few steps as the teacher's in its many."
)
RESUME = (
    "You can cancel at any time; pressing Run again goes on. For other settings choose another *dataset_name* and "
    "*run_name*."
)
USE = (
    "The LoRA lies in `output/loras`. To use it: Load LoRA, then *Turbo Sampler* with preset *auto*. For core's "
    "KSampler, *Turbo Preset* says which sampler, scheduler and steps give the same levels."
)

BEFORE_AFTER = (
    "*Before* and *after* start from the same noise, at the turbo's own steps. Your prompt should show your pictures' "
    "style after, and the prompt to keep should look as before. *Turbo Retention* says how much was kept: 1 is all."
)
USE_TUNED = (
    "The LoRA lies in `output/loras`. It belongs on the same turbo: Load LoRA, then sample as before, with the same "
    "steps. If the turbo is a LoRA itself, *merge_upstream* of Save Turbo LoRA writes both into one file."
)
PASTED = (
    "*Teacher's pictures* and *student's pictures* fill the same hole from the same noise. Outside of the mask they "
    "are the picture itself, because ImageCompositeMasked puts the fill into it."
)
USE_FILL = (
    "The LoRA lies in `output/loras`. To use it: Load LoRA on the same inpainting model, then "
    "*InpaintModelConditioning* and *Turbo Sampler* as here, with preset *auto*."
)
TUNED_COUNT = 256  # the node's default of keep_count
OWN_STEPS = {"tune_z_image_turbo": 8}  # of turbos whose workflow leaves turbo_steps at 0


def note(title: str, what: str, press: str, change: str, expect: str, *more: str) -> str:
    parts = [
        f"## {title}",
        what,
        f"**What to press.** {press}",
        f"**What to change first.** {change}",
        f"**What to expect.** {expect}",
        *more,
    ]
    return "\n\n".join(parts)


def on_mini(title: str, what: str, seconds: str, expect: str) -> str:
    return note(
        title,
        what + " On the mini model that comes with the pack: nothing is downloaded.",
        f"{PRESS} On a CPU it takes {seconds}; watch the curves and samples on the trainer.",
        "*steps* of the trainer: more is better. " + RESUME,
        f"{expect} {COMPARISON}",
        USE,
    )


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


def turbo(title: str, what: str, change: str, expect: str) -> str:
    return note(title, what, f"{DOWNLOAD}Then press **Run**.", change, expect)


def notes(workflows: dict[str, dict]) -> dict[str, str]:
    """The note of every workflow by its name."""
    large = {name: workflows[name] for name in NEEDS if name.startswith("distil_")}
    return {
        "sample_mini": note(
            "First pictures in 4 steps",
            "Samples the mini model with its turbo LoRA. Everything comes with the pack.",
            PRESS + " It takes seconds.",
            "*class_name*, *seed* and *steps* (1, 2 or 4).",
            "Four grey pictures of ankle boots. The text under Turbo Sampler says what *auto* chose, and from where.",
        ),
        "sample_scenes": note(
            "A model that reads words",
            "Samples the scenes model: coloured objects on textured grounds. Everything comes with the pack.",
            PRESS + " It takes seconds.",
            "*prompts*: a texture, a colour, a shape and a ground. Its tooltip has all the words.",
            "Four striped yellow rings on cobbles. At 4 steps the pictures are soft: distil it, as `distil_mini_ladd` "
            "does the mini model, with *Load Scenes Model* and *all_prompts*.",
        ),
        "lora_in_ksampler": note(
            "Your LoRA in core's KSampler",
            "The student that `distil_mini_ladd` saved, without a sampler of this pack. Run that workflow first.",
            "Press the key **R**, so that Load LoRA finds the new file. " + PRESS,
            "Model and LoRA. Then set KSampler as *what the preset chose* says in its line *KSampler*.",
            "Four boots like the student's in `distil_mini_ladd`. KSampler draws its noise in another way, so the same "
            "seed gives other boots.",
        ),
        "schedule_doctor": note(
            "What is wrong with this model?",
            "One node breaks the mini model on purpose: its timesteps have the wrong scale. Schedule Doctor finds the "
            "fault and gives a corrected MODEL and SIGMAS.",
            PRESS + " It takes seconds.",
            "Put your own model and sigmas in their place.",
            "*Before* shows noise or mush, *after* shows boots. *What the doctor found* names each fault.",
        ),
        "seed_variety": note(
            "Pictures of one prompt that differ more",
            "Two samplers share one seed, so they start from the same noise, at 1 step. One takes the model through "
            "Seed Variety.",
            PRESS + " It takes seconds.",
            "*strength*: 0 changes nothing, 1 is the most.",
            "Two rows of four boots. Those *with Seed Variety* differ more among each other.",
        ),
        "compare_teacher_student": note(
            "Teacher and student side by side",
            "Compare Models samples both from the same noise at several numbers of steps. Seconds, forward passes and "
            "the difference from the teacher stand beside each row.",
            PRESS + " It takes about a minute.",
            "Put your own teacher and student in their place, then *steps* and *teacher_cfg*.",
            "A grid: one column for each class, the teacher's 25 steps on top. The student at 4 steps comes closest.",
        ),
        "compare_latents": note(
            "How far apart do two results look?",
            "The mini teacher at 2 and at 25 steps from one seed. E-LatentLPIPS measures the distance on the latents, "
            "without decoding.",
            PRESS + " It takes seconds.",
            "*steps* of the sampler *2 steps*: try 1, 4 and 8.",
            "A number for each pair: 0 is equal, and it falls as the steps get more. The map is bright where the two "
            "pictures differ.",
        ),
        "distil_mini_ladd": on_mini(
            "Distil the mini model with LADD",
            "Teacher Latents samples 1024 latents; LADD Trainer trains a LoRA for 4 steps.",
            "about two minutes",
            "The report shows the curves, then teacher and student.",
        ),
        "distil_mini_add": on_mini(
            "Distil the mini model with ADD",
            "A vision network judges the decoded pictures. Training Settings keeps a LoRA every 50 steps.",
            "about three minutes",
            "ADD needs longer than LADD on this model, so the pictures are rougher.",
        ),
        "distil_mini_diffusion2gan": on_mini(
            "Distil the mini model into one step",
            "Diffusion2GAN learns from pairs of noise and the teacher's result, by E-LatentLPIPS.",
            "about two minutes",
            "One step gives what the teacher makes of the same noise.",
        ),
        "distil_mini_dmd2": on_mini(
            "Distil the mini model with DMD2",
            "A second low-rank path learns what the student's results look like; the student goes from there to the "
            "teacher's. Pairs keep it near the teacher's own results.",
            "about two minutes",
            "The report shows the curves, then teacher and student.",
        ),
        "own_pictures": note(
            "Train on your own pictures",
            "Picture Folder makes a dataset of pictures and their captions, LADD Trainer a LoRA for 4 steps that makes "
            "pictures like them. On the mini model and twelve example pictures: clothes in inverted grey.",
            PRESS + " On a CPU it takes about two minutes.",
            "Put pictures into a folder inside ComfyUI's `input` folder, a `.txt` with the caption beside each, press "
            "**R** and choose the folder. The mini model knows grey pictures of its ten classes only; for others take "
            "a model of your own with its *size*. " + RESUME,
            "The node says how many pictures of which sizes it found. The teacher's boots are light on black, the "
            "student's turn dark on white, in rough shapes: twelve pictures and two minutes are few.",
            "The same with a large model: in any *distil_* workflow put Picture Folder in the place of Teacher "
            "Latents, or both through Mix Datasets.",
            USE,
        ),
        "inpaint_scenes": note(
            "Distil a model that fills holes",
            "Twelve scenes with sixteen random masks each make LADD Trainer's data, and the scenes inpainting model "
            "becomes a LoRA for one step. Everything comes with the pack.",
            PRESS + " On a CPU it takes about two minutes; watch the curves and samples on the trainer.",
            "*steps* of the trainer: more is better. The masks: *masks*, *masks_each* and *mask_shares* of Picture "
            "Folder. The picture: the words of *positive*, which also say what is filled in. " + RESUME,
            PASTED + " With so few pictures and steps the student's fills are softer than the teacher's.",
            USE_FILL,
            "For a model of full size: `distil_sd15_inpainting`, `distil_sdxl_inpainting`, `distil_flux1_fill`.",
        ),
        "edit_scenes": note(
            "Distil a model that edits, with strengths to turn",
            "The scenes editing model edits twelve pictures at strengths that are drawn for each edit. LADD Trainer "
            "tells them to a student of one step, and *Editing Strengths* turns them. Everything comes with the pack.",
            PRESS + " On a CPU it takes about three minutes; watch the curves and samples on the trainer.",
            "*text_strength* and *image_strength* of *weak* and *strong*: they cost nothing; only the sampling runs "
            "again. *count* of Teacher Edits and *steps* of the trainer: more is better. " + RESUME,
            "The green rings of *before* are asked to be yellow. *Teacher's pictures* have it from 25 steps with three "
            "forwards each, the student's from one forward: *strong* is nearer to yellow than *weak*.",
            "The LoRA lies in `output/loras`. To use it: Load LoRA on the same editing model, Editing Strengths, "
            "*InstructPixToPixConditioning* and any sampler at one step and cfg 1. Without Editing Strengths it has "
            "the usual strengths of the trainer.",
            "Pictures of yours: two folders in ComfyUI's `input` folder, results with captions in one, the pictures "
            "before under the same names in the other; press **R** and choose them.",
        ),
        "tune_mini_turbo": note(
            "Tune a turbo on your own pictures",
            "Tune Turbo trains a LoRA on pictures for a model that is a turbo already, and keeps its four steps and "
            "what else it can. On the mini turbo and twelve example pictures: ankle boots, bags and coats in inverted "
            "grey. The other seven classes are to stay as they are.",
            PRESS + " On a CPU it takes a few minutes; watch the curves and samples on Tune Turbo.",
            "*keep_share*: 0 learns the style fastest and spoils the rest, 0.9 hardly changes anything. Pictures of "
            "yours go into a folder in ComfyUI's `input` folder, with captions; press **R** and choose it. The mini "
            "model knows its ten classes only; for other pictures take `tune_z_image_turbo` and the like. " + RESUME,
            f"Boots that were light on black turn dark on white. Trousers stay. {BEFORE_AFTER}",
            USE_TUNED,
        ),
        "prefer_mini": note(
            "Train a model by preferences",
            "Of two pictures of one class DPO Trainer learns which was preferred, and makes a LoRA for the model. On "
            "the mini model and twelve pairs: the preferred picture has its light from the left, the rejected one from "
            "the right.",
            PRESS + " On a CPU it takes about two minutes; watch the curves and samples on DPO Trainer.",
            "*beta*: 20 learns faster and spoils the clothes, the default of 2000 hardly changes them. Pairs of yours: "
            "two folders in ComfyUI's `input` folder, the better pictures with captions in one, the worse ones under "
            "the same names in the other; press **R** and choose them. The mini model knows its ten classes only. "
            + RESUME,
            "*Pairs in the right order* rises to 1. *Before* and *after* start from the same noise: boots turn dark on "
            "their right side, and so do trousers, of which there was no pair.",
            "The LoRA lies in `output/loras`. It belongs on the same model: core's Load LoRA, then sample as before. A "
            "turbo learns in the same way with *preference_levels* = student.",
        ),
        "make_adapter": note(
            "A training adapter for any turbo",
            "De-Distil Adapter trains a LoRA on the turbo's own samples, which undoes its distillation. A LoRA for the "
            "turbo is then trained with the adapter on and used with it off. On the mini turbo.",
            PRESS + " On a CPU it takes about two minutes.",
            "The model, then *sizes* and *clip* (instead of *positive*) for a model of yours. " + RESUME,
            "With the adapter four steps get worse, and 25 steps still give boots: the model is one of many steps "
            "again.",
            "To use it: choose `turbo_distill/make_adapter.safetensors` as *adapter* of Tune Turbo. It is on while "
            "that trains, and off in its previews and pictures.",
        ),
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

"""The note in each workflow: what it does, what to press, what to change first, what to expect. In Markdown."""

from __future__ import annotations

from large_notes import large_notes
from note_parts import BEFORE_AFTER, COMPARISON, PASTED, PRESS, RESUME, USE, USE_FILL, USE_TUNED, note


def on_mini(title: str, what: str, seconds: str, expect: str) -> str:
    return note(
        title,
        what + " On the mini model that comes with the pack: nothing is downloaded.",
        f"{PRESS} On a CPU it takes {seconds}; watch the curves and samples on the trainer.",
        "*steps* of the trainer: more is better. " + RESUME,
        f"{expect} {COMPARISON}",
        USE,
    )


def notes(workflows: dict[str, dict]) -> dict[str, str]:
    """The note of every workflow by its name."""
    return large_notes(workflows) | {
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
    }

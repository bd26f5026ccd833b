"""What the notes in workflows are made of: their sections, and sentences that several of them have. In Markdown."""

from __future__ import annotations

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

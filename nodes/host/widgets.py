"""Names of the core's settings as the nodes' widgets have them, for messages."""

from __future__ import annotations

from ...distill_core.methods.registry import METHODS
from ...distill_core.methods.tune import TuneConfig

WIDGETS = {
    "student.rank": "rank (or train)",
    "student.targets": "lora_targets",
    "student.sampler": "sampler (or preset)",
    "student.sampler_options": "sampler (or preset)",
    "student.cfg": "preset (or cfg)",
    "student.strengths.told": "strengths_told",
    "student.strengths.text": "usual_text_strength",
    "student.strengths.image": "usual_image_strength",
    "student.lora.alpha": "alpha (Training Settings)",
    "student.lora.dropout": "dropout (Training Settings)",
    "start_from": "start_from (Training Settings)",
    "student_sigmas": "target_steps (or preset)",
    "probabilities": "target_steps (or preset)",
    "warmup_probabilities": "target_steps (or preset)",
    **{f"terms.{term}": f"{term}_weight" for term in ("pairs", "adversarial", "distillation", *TuneConfig.known_terms)},
    "gan_loss": "loss",
    "base": "model",
    "teacher": "teacher_model",
    "dtype": "the model's precision",
    "vision_network": "clip_vision",
    "vision.size": "vision_size",
    "guidance": "teacher_cfg",
    "method": "the trainer's method",
}


def widget_of(name: str) -> str:
    """The widget of a setting's dotted name."""
    section, _, rest = name.partition(".")
    return widget_of(rest) if section in METHODS and rest else WIDGETS.get(name, name)


def in_widgets(text: str) -> str:
    """A message of the core with its settings' names as widgets."""
    replaced = {
        "gan_loss = 'nonsaturating'": "set loss to nonsaturating",
        " per process (gradient accumulation does not help)": " (accumulation does not help)",
        "LoRA targets: ": "lora_targets: ",
        "[vision] size": "vision_size",
        "[strengths] told:": "strengths_told:",
        "[strengths] text is": "usual_text_strength is",
        "[strengths] image is": "usual_image_strength is",
        "make the items with ranges in [cache] text_strength and image_strength, or set told = false": "make the items "
        "with Teacher Edits, from a low to a high strength, or switch it off",
    }
    for core, words in replaced.items():
        text = text.replace(core, words)
    return text

"""Which group a node of a workflow belongs to, its title and its colour."""

from __future__ import annotations

GROUPS = ("Model", "Prompt", "Picture", "Training data", "Training", "Sampling", "Result")
NOTE = "MarkdownNote"
OF_TYPE = {
    "Model": (
        *("CheckpointLoaderSimple", "UNETLoader", "CLIPLoader", "DualCLIPLoader", "TripleCLIPLoader", "VAELoader"),
        *("CLIPVisionLoader", "LoraLoaderModelOnly", "ModelSamplingSD3", "ModelSamplingAuraFlow"),
        *(
            "TurboDistillLoadMiniModel",
            "TurboDistillLoadScenesModel",
            "TurboDistillLoadPerceptual",
            "TurboDistillSeedVariety",
        ),
    ),
    "Prompt": (
        *("TurboDistillPrompts", "TurboDistillMiniConditioning", "TurboDistillScenesConditioning"),
        *("CLIPTextEncode", "FluxGuidance", "ConditioningZeroOut"),
    ),
    "Picture": (
        *("LoadImage", "ImageScale", "VAEEncode", "SetLatentNoiseMask", "SolidMask", "FeatherMask", "MaskComposite"),
        *("MaskPreview", "InpaintModelConditioning", "InstructPixToPixConditioning"),
        *("ReferenceLatent", "TextEncodeQwenImageEditPlus"),
    ),
    "Training data": (
        *("TurboDistillTeacherLatents", "TurboDistillLatentsDataset", "TurboDistillPictureFolder"),
        *("TurboDistillMixDatasets", "TurboDistillTeacherEdits"),
    ),
    "Training": (
        *("TurboDistillLADDTrainer", "TurboDistillADDTrainer", "TurboDistillDiffusion2GANTrainer"),
        *("TurboDistillDMD2Trainer", "TurboDistillTuneTrainer", "TurboDistillAdapterTrainer"),
        "TurboDistillDPOTrainer",
        *("TurboDistillTrainingSettings", "TurboDistillSaveLora", "TurboDistillReport"),
    ),
    "Sampling": (
        *("TurboDistillSampler", "TurboDistillPreset", "TurboDistillDoctor", "KSampler", "SamplerCustom"),
        *("PrimitiveInt", "BasicScheduler", "EmptyLatentImage", "EmptySD3LatentImage", "TurboDistillCompare"),
        *("SamplerCustomAdvanced", "DualCFGGuider", "RandomNoise", "KSamplerSelect", "TurboDistillEditingStrengths"),
    ),
    "Result": (
        "VAEDecode",
        "ImageCompositeMasked",
        "SaveImage",
        "PreviewImage",
        "PreviewAny",
        "TurboDistillPerceptualDistance",
        "TurboDistillRetention",
    ),
}
START = ("PrimitiveInt", "EmptyLatentImage", "EmptySD3LatentImage", "BasicScheduler")
IN_PICTURE = ("words model", "words shifted", "words latent", "draw", "picture")  # what is drawn to be changed
BY_KEY = {"report": "Training", "levels": "Sampling"} | dict.fromkeys(IN_PICTURE, "Picture")
TITLES = {  # of the nodes with these keys in the workflows' sources; other nodes keep their own name
    "positive": "positive",
    "negative": "negative",
    "compared": "positive, for teacher and student",
    "own": "positive, of your pictures",
    "kept": "positive, to be kept",
    "own words": "prompts of the previews",
    "own prompts": "prompts of the previews, encoded",
    "kept words": "prompts to keep",
    "kept prompts": "prompts to keep, encoded",
    "guided positive": "guidance of the positive",
    "guided compared": "guidance, for teacher and student",
    "nothing": "empty negative",
    "prompts": "prompts to learn from",
    "shifted": "teacher: no shift",
    "dataset": "1. Teacher Latents",
    "seed": "seed of both",
    "levels": "teacher's noise levels",
    "shown": "positive, and the picture",
    "shift": "the model's shift",
    "words model": "draws the picture",
    "words shifted": "no shift",
    "words latent": "size and number",
    "draw": "draws the picture",
    "told weak": "weak: text strength 1.5",
    "told strong": "strong: text strength 4",
    "student weak": "student, weak",
    "student strong": "student, strong",
    "decode student weak": "decode student, weak",
    "decode student strong": "decode student, strong",
    "save picture": "before",
    "save student weak": "student's, weak",
    "save student strong": "student's, strong",
    "model levels": "the model's noise levels",
    "teacher": "teacher",
    "student": "student",
    "decode teacher": "decode teacher",
    "decode student": "decode student",
    "paste teacher": "teacher's, into the picture",
    "paste student": "student's, into the picture",
    "save teacher": "teacher's pictures",
    "save student": "student's pictures",
    "report": "report of the run",
    "lora": "3. Save Turbo LoRA",
    "turbo own": "before: your prompt",
    "tuned own": "after: your prompt",
    "turbo kept": "before: a prompt to keep",
    "tuned kept": "after: a prompt to keep",
    "save turbo own": "before: your prompt",
    "save tuned own": "after: your prompt",
    "save turbo kept": "before: a prompt to keep",
    "save tuned kept": "after: a prompt to keep",
    "paired": "positive, of the pairs",
    "unpaired": "positive, without pairs",
    "turbo paired": "before: a class of the pairs",
    "tuned paired": "after: a class of the pairs",
    "turbo unpaired": "before: another class",
    "tuned unpaired": "after: another class",
    "save turbo paired": "before: a class of the pairs",
    "save tuned paired": "after: a class of the pairs",
    "save turbo unpaired": "before: another class",
    "save tuned unpaired": "after: another class",
    "adapter turbo": "the turbo, 4 steps",
    "adapter few": "with the adapter, 4 steps",
    "adapter many": "with the adapter, 25 steps",
    "save adapter turbo": "the turbo, 4 steps",
    "save adapter few": "with the adapter, 4 steps",
    "save adapter many": "with the adapter, 25 steps",
    "plain": "without Seed Variety",
    "varied": "with Seed Variety",
    "save plain": "without Seed Variety",
    "save varied": "with Seed Variety",
    "before": "before: the broken model",
    "after": "after: the mended model",
    "save before": "before",
    "save after": "after",
    "broken": "breaks the model: wrong timesteps",
    "findings": "what the doctor found",
    "few": "2 steps",
    "many": "25 steps",
    "save few": "2 steps",
    "save many": "25 steps",
    "save map": "where they differ",
    "numbers": "distance of each pair",
    "explanation": "what the preset chose",
    "keep": "black: keep",
    "square": "white: make anew",
    "soft square": "soft edge",
    "lora file": "student: teacher and LoRA",
    "tiny": "tiny autoencoder",
    "vision": "vision network",
}
OWN_NAMES = {
    "TurboDistillTuneTrainer": "2. Tune Turbo",
    "TurboDistillAdapterTrainer": "1. De-Distil Adapter",
    "TurboDistillTeacherEdits": "1b. Teacher Edits",
}
COLOURS = {
    "positive": "#232",
    "own": "#232",
    "kept": "#232",
    "paired": "#232",
    "unpaired": "#232",
    "compared": "#232",
    "negative": "#322",
    "nothing": "#322",
}  # as in core's templates


def title_of(key: str, class_type: str) -> str | None:
    """The title of a node; None: the node's own name."""
    if class_type == "TurboDistillPictureFolder":
        return "1. Picture Folder"
    if class_type in OWN_NAMES:
        return OWN_NAMES[class_type]
    if class_type.endswith("Trainer"):
        return f"2. {class_type.removeprefix('TurboDistill').removesuffix('Trainer')} Trainer"
    return TITLES.get(key)


def group_of(key: str, class_type: str, trains: bool) -> int:
    """The index in `GROUPS`. trains: whether the workflow has a trainer; else sizes and seeds stand with the prompt.

    Raises ValueError for a node that has none.
    """
    if class_type in START and not trains and key not in IN_PICTURE:
        return GROUPS.index("Prompt")
    if key in BY_KEY:
        return GROUPS.index(BY_KEY[key])
    for group, types in OF_TYPE.items():
        if class_type in types:
            return GROUPS.index(group)
    raise ValueError(f"{class_type} belongs to no group: add it to tools/workflow_groups.py")

"""Runs inside the host's Python: what Compare Models says where its inputs do not fit together, as JSON.

probe_compare.py FOLDER
"""

from as_host import folder

# isort: split
import json
import types

import comfy.sd
import tiny_models
import torch
from pack.nodes.host import compare as host_compare

SD3, SD15 = (comfy.sd.load_diffusion_model(tiny_models.write(family, folder)) for family in ("sd3", "sd15"))
FITS = types.SimpleNamespace(channels=4)
sampled: list[str] = []
host_compare.sample_prompts = lambda *given, **options: sampled.append("row")


def said(**changes) -> str:
    """The error of a comparison that differs from one that fits in ``changes``."""
    given = dict(teacher=SD3, student=SD3, vae=object(), negative=None)
    given |= dict(latent={"samples": torch.zeros(1, 16, 8, 8)}, steps=[4], teacher_steps=4, teacher_cfg=1.0)
    given |= dict(prompts=[tiny_models.conditioning("sd3")], preset="sd3.5-large-turbo", seed=0)
    try:
        next(host_compare.compare(**given | changes))
    except ValueError as error:
        return str(error)
    return ""


results = {
    "other latents": said(student=SD15, preset="lcm-lora"),
    "no vae": said(vae=None),
    "student's cfg": said(preset="hyper-sd3-lora"),
    "perceptual": said(perceptual=FITS),
}
(folder / "results.json").write_text(json.dumps(results | {"sampled": len(sampled)}))

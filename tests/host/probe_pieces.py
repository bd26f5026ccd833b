"""Runs inside the host's Python: prompts sampled together, and in pieces because memory ran out, as JSON."""

from as_host import folder

# isort: split
import json

import torch
from pack.nodes.host import side_by_side
from pack.nodes.host.mini import load_mini_model
from pack.nodes.host.side_by_side import empty_latent, runs_of_one_length, sample_prompts, teacher_recipe

whole = side_by_side.sample_latent
sizes: list[int] = []


def short_of_memory(model, positive, negative, *, latent: dict, **options):
    """As where three latents and more do not fit."""
    sizes.append(len(latent["samples"]))
    if sizes[-1] > 2:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return whole(model, positive, negative, latent=latent, **options)


with torch.inference_mode():
    model, vae, clip = load_mini_model(False)
    names = ("bag", "shirt", "sandal", "coat", "dress", "")
    *prompts, negative = (clip.encode_from_tokens_scheduled(name) for name in names)
    asked = dict(latent=empty_latent(model, 5, (16, 8, 8)), recipe=teacher_recipe(model, 2, 1.5), seed=3)
    together = sample_prompts(model, prompts, negative, **asked)
    side_by_side.sample_latent = short_of_memory
    apart = sample_prompts(model, prompts, negative, **asked)
    longer = [[torch.cat([tokens, tokens], 1), values] for tokens, values in prompts[1]]
    mixed = [prompts[0], longer, longer, prompts[3]]
    asked["latent"] = asked["latent"][:4]
    lengths = sample_prompts(model, mixed, negative, **asked)

results = {
    "difference": (together - apart).abs().max().item(),
    "sizes": sizes,
    "runs": [[run.start, run.stop] for run in runs_of_one_length(mixed)],
    "rows": len(lengths),
    "same": (lengths[3] - together[3]).abs().max().item(),
}
(folder / "results.json").write_text(json.dumps(results))

"""Whether a LoRA that core has merged into a model does what the student did that was trained beside its layers.

Runs in ComfyUI's Python:  python tests/full_size/effect.py NETWORK MODEL_FILE LORA_FILE RESULT.json

The student's side is this project's training backend: the LoRA beside the frozen layers. The other is core's: its
loader, its merge into the weights, its sampler. Both answer the same noised latent; what the LoRA changes in the answer
is compared. Small files are compared in float32. A file above `LARGE` stays in bfloat16, where core rounds each merged
weight; what two steps change is less than that. So the LoRA is also compared at a strength at which it changes the
answer by about half of it, where the rounding is small beside the change, and a missed or misplaced key is not.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

NETWORK, MODEL, LORA, RESULT = sys.argv[1:]  # entering the host takes them
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "host"))
from launch import enter_host  # noqa: E402

enter_host()

import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402
from full_shapes import SHAPES  # noqa: E402
from host_denoised import host_denoised  # noqa: E402
from pack.distill_core.models.denoiser import Denoiser  # noqa: E402
from pack.distill_core.training.student import rank_of_file, start_from  # noqa: E402
from pack.nodes.host.backend import training_backend  # noqa: E402
from pack.nodes.host.model import training_process_of  # noqa: E402

LARGE = 1.5e9  # bytes
SIDE = 8  # of the latent
DTYPE = torch.bfloat16 if Path(MODEL).stat().st_size > LARGE else torch.float32


def load():
    """The MODEL of the file, as core's loader nodes give it."""
    kept = {"dtype": DTYPE}
    if Path(MODEL).parent.name == "checkpoints":
        return comfy.sd.load_checkpoint_guess_config(MODEL, output_vae=False, output_clip=False, model_options=kept)[0]
    return comfy.sd.load_diffusion_model(MODEL, kept)


def text() -> list:
    shape, generator = SHAPES[NETWORK], torch.Generator().manual_seed(1)
    options = {"pooled_output": torch.randn(1, shape.pooled, generator=generator)} if shape.pooled else {}
    guidance = {"guidance": 3.5} if NETWORK == "flux" else {}
    return [[torch.randn(1, shape.tokens, shape.width, generator=generator), options | guidance]]


def student_changes(model, x: torch.Tensor, sigma: torch.Tensor) -> tuple[list[torch.Tensor], list[float]]:
    """What the LoRA beside the layers adds to the answer, and at which strengths: 1, and one that adds half of it."""
    with training_backend(model) as backend, torch.no_grad():
        lora = backend.new_lora(rank_of_file(LORA))
        start_from(backend, lora, Path(LORA))
        cond = backend.cond(text())
        student, before = Denoiser(backend, lora), Denoiser(backend)(x, sigma, cond)
        change = student(x, sigma, cond) - before
        lora.scale = 0.5 * (before.norm() / change.norm()).item()
        return [change, student(x, sigma, cond) - before], [1.0, lora.scale]


def merged_changes(model, x: torch.Tensor, sigma: torch.Tensor, strengths: list[float]) -> list[torch.Tensor]:
    """What the LoRA changes in the answer once core has merged it at each strength; last, the answer without it."""
    before, state, found = host_denoised(model, text(), x, sigma), comfy.utils.load_torch_file(LORA), []
    for strength in strengths:
        merged, _ = comfy.sd.load_lora_for_models(model, None, state, strength, 0.0)
        found.append(host_denoised(merged, text(), x, sigma) - before)
    return [*found, before]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def main() -> None:
    with torch.inference_mode():
        model = load()
    process = training_process_of(model)
    noise = torch.randn(1, SHAPES[NETWORK].latent[0], SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    sigma = process.sigma_at_flow_time(torch.tensor([0.7]))
    x = process.noise_scaling(sigma, noise, noise.flip(-1))
    student, strengths = student_changes(model, x, sigma)
    with torch.inference_mode():
        *merged, answer = merged_changes(model, x, sigma, strengths)
    result = {
        "compared in": str(DTYPE).removeprefix("torch."),
        "change": (student[0].norm() / answer.norm()).item(),
        "error": relative(merged[0], student[0]),
        "strong change": (student[1].norm() / answer.norm()).item(),
        "strong error": relative(merged[1], student[1]),
    }
    Path(RESULT).write_text(json.dumps(result))


if __name__ == "__main__":
    main()

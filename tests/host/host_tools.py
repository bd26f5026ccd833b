"""What several of the training probes need; they import it first. `load` loads as nodes do, under inference mode."""

from as_host import folder

# isort: split
import json
import logging
import os
from collections.abc import Callable

import comfy.sd
import tiny_models
import torch
from host_denoised import host_denoised  # noqa: F401  of the probes
from pack.distill_core.data.dataset import Batch
from pack.distill_core.discriminators.latent import LatentDiscriminator
from pack.distill_core.methods.ladd import LADD, LADDConfig
from pack.distill_core.models.denoiser import Cond, Denoiser
from pack.distill_core.training.loop import Run, TrainConfig
from pack.nodes.host.backend import training_backend

torch.set_num_threads(1)
PATHS = {family: tiny_models.write(family, folder) for family in tiny_models.BUILDERS}
DIRECT = list(tiny_models.CONFIGS)  # families whose files cannot be tiny: made without a loader


def load(family: str):
    """A MODEL as nodes get it: loaded under inference mode."""
    with torch.inference_mode():
        if family in DIRECT:
            return tiny_models.model(family)
        return comfy.sd.load_diffusion_model(PATHS[family])


def latents(family: str, batch: int = 2, seed: int = 0) -> torch.Tensor:
    """Latents [B, C, H, W] in model space, not square."""
    channels = tiny_models.empty_latent(family).shape[1]
    size = (4, 6) if family == "flux2" else (8, 12)
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(seed))


def excite(path, seed: int = 5) -> None:
    """Give the path an effect that depends only on the seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for down, up in zip(path.down, path.up, strict=True):
            down.copy_(torch.randn(down.shape, generator=generator) / down.shape[1] ** 0.5)
            up.copy_(0.1 * torch.randn(up.shape, generator=generator))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def a_lora(family: str, model, seed: int = 3) -> dict:
    with training_backend(model) as backend:
        path = backend.new_lora(2)
        excite(path, seed)
        return backend.export(path)


class OneBatch:
    """A dataset of one batch, enough for a step."""

    def __init__(self, batch: Batch) -> None:
        self.content = batch

    def batch(self, *args) -> Batch:
        return self.content


def a_run(backend, positive: list, x: torch.Tensor, cond: Cond | None = None, **settings) -> Run:
    """cond: in the place of the CONDITIONING."""
    teacher, student = Denoiser(backend), Denoiser(backend, backend.new_lora(4))
    dataset = OneBatch(Batch(x, cond or backend.cond(positive * len(x))))
    heads = LatentDiscriminator.for_teacher(teacher, backend.default_taps(), dataset.content, width=8, blocks=1)
    method = LADD(student, teacher, heads, taps=backend.default_taps(), config=LADDConfig(warmup_steps=0))
    return Run(method, dataset, TrainConfig(batch_size=len(x), steps=4, **settings))


class Warnings(logging.Handler):
    """Collects what the host warns of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record) -> None:
        self.texts.append(record.getMessage())

    def __enter__(self):
        logging.getLogger().addHandler(self)
        return self

    def __exit__(self, *args) -> None:
        logging.getLogger().removeHandler(self)


def write(name: str, measures: list[Callable]) -> None:
    """Take each measure (or those named in $MEASURES) and write folder/NAME.json."""
    wanted = os.environ.get("MEASURES", "").split(",")
    results = {measure.__name__: measure() for measure in measures if wanted == [""] or measure.__name__ in wanted}
    (folder / f"{name}.json").write_text(json.dumps(results))

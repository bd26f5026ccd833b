"""A training run inside the host: progress, live preview, cancel, resume, and what is left on disk whatever happens.

The run itself is the core's (`training.run`), the same as the command line's. What is the host's: the backend, the
words of its messages, and a watcher that shows the run on its node.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from PIL import Image

from ...distill_core.data.dataset import LatentDataset
from ...distill_core.diffusion.samplers import sample
from ...distill_core.diffusion.schedules import explicit_sigmas
from ...distill_core.evaluation import live_plots
from ...distill_core.methods.config import MethodConfig
from ...distill_core.training.loop import Event, Run, TrainConfig
from ...distill_core.training.monitor import Condition
from ...distill_core.training.preflight import preflight
from ...distill_core.training.run import RunConfig, RunFolder, StudentConfig, new_run, train_to_end
from .backend import ComfyBackend, training_backend
from .conditioning import cond_of
from .datasets import open_dataset
from .folders import lora_file, run_folder
from .identity import identity
from .parts import Parts, check_dataset_pairs
from .results import TurboLora, decode, read_turbo_lora, with_turbo_lora

CURVES_EVERY = 2.0  # seconds between pictures of the curves on the node
PREVIEW_MOST = 6  # pictures of a preview
# How far a path run again may end from the stored latent. Noise in bfloat16 and a half-precision network cost some
# percent at high guidance; another solver or noise gives about 1, and whether the teacher is the same a hash tells.
PATH_TOLERANCE = 0.25


@dataclass(frozen=True)
class Request:
    """Everything a run is asked to be.

    pairs_if_stored: leave the pairs term out where the dataset keeps no pairs.  parts: what the method takes beside the
    model.  guidance: of the teacher, None for that of the dataset.
    """

    model: Any
    dataset: Path
    run_name: str
    method: MethodConfig
    train: TrainConfig
    student: StudentConfig
    parts: Parts = Parts()
    checkpointing: bool = True
    vae: Any = None
    preview_positive: Sequence = ()
    preview_negative: Any = None
    preview_every: int = 50
    pairs_if_stored: bool = False
    guidance: float | None = None

    def run_config(self, dataset: LatentDataset) -> RunConfig:
        """What decides the run, known before anything is copied for it."""
        method = self.method
        if self.pairs_if_stored and not dataset.state_sigmas:
            method = replace(method, terms={**method.terms, "pairs": 0.0})
        identities = {
            "base": identity(self.model),
            "dataset": dataset.digest(),
            "dtype": str(self.model.model.get_dtype()).removeprefix("torch."),
            **self.parts.identities(),
        }
        vision = self.parts.vision_config()
        return RunConfig(method, self.train, self.student, identities, vision=vision, guidance=self.guidance)


def train_in_graph(request: Request) -> tuple[object, TurboLora, dict]:
    """Train, or go on, or find that it is done: the student MODEL, its LORA_MODEL and the LOSS_MAP.

    Raises ValueError for what cannot work, InterruptProcessingException on cancel, torch.OutOfMemoryError and OSError
    with advice; after each of them the checkpoint and, once a step is done, the LoRA are on disk.
    """
    folder, lora_path = RunFolder(run_folder(request.run_name)), lora_file(request.run_name)
    dataset, config = describe(request)
    if folder.finished(config.request()) is None or not lora_path.exists():
        try:
            with training_backend(request.model, request.checkpointing) as backend:
                run = open_run(request, config, dataset, backend, folder)
                preflight(run)
                train_to_end(run, config, folder, lora_path, [LiveView(request, run, folder)])
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise torch.OutOfMemoryError(advice(request)) from error
            raise
        except OSError as error:
            raise OSError(f"{error}. What was saved before is as it was: make room and queue again") from error
    weights = config.method.terms
    losses = [sum(w * entry.get(term, 0.0) for term, w in weights.items()) for entry in folder.logs()]
    return with_turbo_lora(request.model, lora_path), read_turbo_lora(lora_path), {"loss": losses}


def describe(request: Request) -> tuple[LatentDataset, RunConfig]:
    """The opened dataset, checked against the model, and what decides the run."""
    dataset = open_dataset(request.dataset, request.model, request.method.weight("pairs") > 0)
    return dataset, request.run_config(dataset)


def open_run(
    request: Request, config: RunConfig, dataset: LatentDataset, backend: ComfyBackend, folder: RunFolder
) -> Run:
    """The run on the opened backend; resumes later, when its first step is asked for."""
    check_dataset_pairs(config.method, dataset, backend.process)
    run = new_run(
        config,
        request.parts.components(backend, request.train, request.checkpointing),
        dataset,
        folder.path,
        distance=request.parts.distance(backend.channels),
        path_tolerance=PATH_TOLERANCE,
    )
    folder.start(guidance=dataset.manifest()["guidance"], latent_shape=list(dataset.shapes[0]))
    return run


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the device or of the CPU (where torch has no exception of its own for it)."""
    texts = ("not enough memory", "can't allocate memory")
    cpu = isinstance(error, MemoryError) or any(text in str(error) for text in texts)
    return cpu or comfy.model_management.is_oom(error)


def advice(request: Request) -> str:
    """What to change when memory was not enough."""
    train, hints = request.train, []
    if not request.checkpointing:
        hints.append("switch gradient_checkpointing on")
    if train.batch_size > 2:
        hints.append(f"lower batch_size from {train.batch_size} to {train.batch_size // 2} and double accumulation")
    hints += request.parts.hints()
    smaller = f"lower rank from {request.student.rank}" if request.student.rank else "set train to LoRA"
    hints.append(f"{smaller}, or train smaller sizes")
    return (
        f"not enough memory to train: {'; '.join(hints)}. The last checkpoint is kept; changed settings need another "
        "run name"
    )


class LiveView:
    """Shows a run on its node: the bar every step, curves every two seconds, samples every ``preview_every`` steps."""

    def __init__(self, request: Request, run: Run, folder: RunFolder) -> None:
        self.request, self.run, self.logs = request, run, folder.logs()
        self.bar = comfy.utils.ProgressBar(request.train.steps)
        self.samples: Image.Image | None = None
        self.shown = self.started = time.monotonic()
        self.first = None
        positive = request.preview_positive[:PREVIEW_MOST] if request.vae is not None and request.preview_every else ()
        self.conds = [cond_of(conditioning).to(run.device) for conditioning in positive]

    def __call__(self, event: Event, condition: Condition) -> None:
        if self.first is None:
            self.first = event.step
            if event.step > 1:
                logging.info("run %s goes on after step %d", self.request.run_name, event.step - 1)
            self.logs = [entry for entry in self.logs if entry["step"] < event.step]
        self.logs.append(event.logs)
        due = bool(self.conds) and event.step % self.request.preview_every == 0
        if due:
            self.samples = self.draw()
        picture = None
        if due or event.step == event.steps or time.monotonic() - self.shown >= CURVES_EVERY:
            self.shown = time.monotonic()
            picture = ("JPEG", self.picture(event, condition), 1024)
        self.bar.update_absolute(event.step, event.steps, picture)

    def picture(self, event: Event, condition: Condition) -> Image.Image:
        seconds = (time.monotonic() - self.started) / max(1, event.step - self.first + 1)
        left = seconds * (event.steps - event.step)
        title = f"step {event.step} of {event.steps}, {seconds:.2g} s each, {left / 60:.0f} min left; {condition.word}"
        parts = [live_plots.curves(self.logs, title=title)]
        return live_plots.stack([*parts, self.samples] if self.samples else parts)

    def draw(self) -> Image.Image:
        """Samples of the averaged student at its levels, always from the same noise."""
        run, request = self.run, self.request
        student, backend = run.method.student, run.method.student.backend
        shape, sigmas = run.dataset.shapes[0], explicit_sigmas(run.method.levels)
        choice, latents = request.student, []
        with run.ema_weights():
            for item, cond in enumerate(self.conds):
                sampler = {"sampler": choice.sampler, **choice.sampler_options}
                latents.append(sample(student, student.process, sigmas, cond, shape, seed=0, items=[item], **sampler))
        with torch.inference_mode():
            images = torch.cat([decode(request.vae, {"samples": backend.latents_out(x)}) for x in latents])
        # The VAE may have needed the room of the network, which stays where it is for the rest of the run.
        teacher = run.method.teacher.backend.patcher
        comfy.model_management.load_models_gpu([teacher], memory_required=1e20, force_full_load=True)
        return live_plots.grid([(f"student, {len(sigmas) - 1} steps", images)])

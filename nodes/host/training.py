"""A training run inside the host: progress, live preview, cancel, resume, and what is left on disk whatever happens."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import comfy.model_management
import comfy.utils
import torch
from PIL import Image

from ...distill_core.diffusion.samplers import sample
from ...distill_core.diffusion.schedules import explicit_sigmas
from ...distill_core.evaluation import live_plots as charts
from ...distill_core.files import save_lora
from ...distill_core.methods.base import MethodConfig
from ...distill_core.methods.registry import name_of
from ...distill_core.training.loop import Event, Run, TrainConfig
from ...distill_core.training.monitor import Condition
from ...distill_core.training.preflight import preflight
from ...distill_core.training.run import RunFolder, StudentConfig, new_run, pick_targets, student_of
from .backend import training_backend
from .conditioning import cond_of
from .datasets import open_dataset
from .folders import lora_file, run_folder
from .identity import identity
from .parts import check_dataset_pairs, distance_of, extra_identities, memory_advice, parts_of, vision_config
from .results import TurboLora, decode, read_turbo_lora, with_turbo_lora

CURVES_EVERY = 2.0  # seconds between pictures of the curves on the node
PREVIEW_MOST = 6  # pictures of a preview


@dataclass(frozen=True)
class Request:
    """Everything a run is asked to be.

    pairs_if_stored: leave the pairs term out where the dataset keeps no pairs.  clip_vision, vision_size: what ADD's
    discriminator sees with (`host_parts`).  guidance: of the teacher, None for that of the dataset.
    perceptual: the distance of the pairs term, None for the method's ``regression``.
    """

    model: object
    dataset: Path
    run_name: str
    method: MethodConfig
    train: TrainConfig
    student: StudentConfig
    lora_targets: str = ""
    checkpointing: bool = True
    vae: object = None
    preview_positive: Sequence = ()
    preview_negative: object = None
    preview_every: int = 50
    pairs_if_stored: bool = False
    clip_vision: object = None
    vision_size: int = 0
    guidance: float | None = None
    perceptual: object = None

    def asked(self) -> dict:
        """What must agree for a finished run's files to be the answer to this request."""
        method = {name_of(self.method): asdict(self.method)}
        settings = {**method, "train": asdict(self.train), "student": asdict(self.student)}
        made_from = hashlib.sha256((self.dataset / "dataset.json").read_bytes()).hexdigest()[:16]
        found = {"targets": self.lora_targets, "dataset": made_from, "model": identity(self.model)}
        return {**settings, **found, **extra_identities(self)}


def train_in_graph(request: Request) -> tuple[object, TurboLora, dict]:
    """Train, or go on, or find that it is done: the student MODEL, its LORA_MODEL and the LOSS_MAP.

    Raises ValueError for what cannot work, InterruptProcessingException on cancel, torch.OutOfMemoryError and OSError
    with advice; after each of them the checkpoint and, once a step is done, the LoRA are on disk.
    """
    folder, lora_path = RunFolder(run_folder(request.run_name)), lora_file(request.run_name)
    asked = request.asked()
    if folder.finished(asked) is None or not lora_path.exists():
        try:
            run_to_end(request, folder, lora_path)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise torch.OutOfMemoryError(advice(request)) from error
            raise
        except OSError as error:
            raise OSError(f"{error}. What was saved before is as it was: make room and queue again") from error
        folder.finish(asked)
    weights = request.method.terms
    losses = [sum(w * entry.get(term, 0.0) for term, w in weights.items()) for entry in folder.logs()]
    return with_turbo_lora(request.model, lora_path), read_turbo_lora(lora_path), {"loss": losses}


def run_to_end(request: Request, folder: RunFolder, lora_path: Path) -> None:
    """Train to the last step and write the LoRA; whatever ends it early, the LoRA of the last step is written."""
    with training_backend(request.model, request.checkpointing) as backend:
        run = open_run(request, backend, folder)
        preflight(run)
        listener = Listener(request, run, folder)
        try:
            with closing(folder.follow(run)) as events:
                for event, condition in events:
                    listener(event, condition)
        except BaseException:  # cancel is no Exception
            keep_student(run, request.student, lora_path)
            raise
        save_lora(lora_path, *student_of(run, request.student))


def open_run(request: Request, backend, folder: RunFolder) -> Run:
    """The run on the opened backend; resumes later, when its first step is asked for."""
    method = request.method
    dataset = open_dataset(request.dataset, request.model, method.weight("pairs") > 0)
    if request.pairs_if_stored and not dataset.state_sigmas:
        method = replace(method, terms={**method.terms, "pairs": 0.0})
    check_dataset_pairs(method, dataset, backend)
    targets = pick_targets(backend.lora_targets, request.lora_targets) if request.lora_targets else ()
    student = replace(request.student, targets=targets)
    taps = backend.default_taps() if name_of(method) == "ladd" else ()
    run = new_run(
        parts_of(request, backend),
        dataset,
        method,
        request.train,
        student,
        taps,
        folder.path,
        vision=vision_config(request),
        distance=distance_of(request, backend),
        guidance=request.guidance,
        beside=extra_identities(request),
    )
    folder.start(guidance=dataset.manifest()["guidance"], latent_shape=list(dataset.shapes[0]))
    return run


def keep_student(run: Run, student: StudentConfig, path: Path) -> None:
    """The LoRA of a run that stopped early, if it has done a step; a full disk must not hide why it stopped."""
    if run.step == 0:
        return
    try:
        save_lora(path, *student_of(run, student))
    except OSError as error:
        logging.warning("the LoRA of the stopped run could not be written: %s", error)


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
    hints += memory_advice(request)
    smaller = f"lower rank from {request.student.rank}" if request.student.rank else "set train to LoRA"
    hints.append(f"{smaller}, or train smaller sizes")
    return (
        f"not enough memory to train: {'; '.join(hints)}. The last checkpoint is kept; changed settings need another "
        "run name"
    )


class Listener:
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
        parts = [charts.curves(self.logs, title=title)]
        return charts.stack([*parts, self.samples] if self.samples else parts)

    def draw(self) -> Image.Image:
        """Samples of the averaged student at its levels, always from the same noise."""
        run, request = self.run, self.request
        student, backend = run.method.student, run.method.student.backend
        shape, sigmas = run.dataset.shapes[0], explicit_sigmas(run.method.levels)
        choice, latents = request.student, []
        with run.ema_weights():
            for item, cond in enumerate(self.conds):
                sampler = {"sampler": choice.sampler, **choice.sampler_options}
                latents.append(sample(student, student.process, sigmas, cond, shape, 0, [item], **sampler))
        with torch.inference_mode():
            images = torch.cat([decode(request.vae, {"samples": backend.latents_out(x)}) for x in latents])
        # The VAE may have needed the room of the network, which stays where it is for the rest of the run.
        teacher = run.method.teacher.backend.patcher
        comfy.model_management.load_models_gpu([teacher], memory_required=1e20, force_full_load=True)
        return charts.grid([(f"student, {len(sigmas) - 1} steps", images)])

"""A training run inside the host: progress, live preview, cancel, resume, and what is left on disk whatever happens.

The run itself is the core's (`training.run`), the same as the command line's. What is the host's: the backend, the
words of its messages, and a watcher that shows the run on its node.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from PIL import Image

from ...distill_core.data.dataset import LatentDataset
from ...distill_core.data.mix import Mix, mixed
from ...distill_core.evaluation import live_plots
from ...distill_core.evaluation.retention_watch import retention_listeners
from ...distill_core.evaluation.run_page import RunPage, note
from ...distill_core.evaluation.student_pictures import StudentPictures, first_items
from ...distill_core.methods.config import MethodConfig
from ...distill_core.models.offload import NONE
from ...distill_core.models.teachers import Teacher
from ...distill_core.training.aside import put_aside
from ...distill_core.training.changes import OtherSettings
from ...distill_core.training.loop import Event, Run
from ...distill_core.training.loop_config import TrainConfig
from ...distill_core.training.monitor import Condition
from ...distill_core.training.other_teacher import teacher_notes
from ...distill_core.training.preflight import preflight
from ...distill_core.training.progress import StatusLine
from ...distill_core.training.run import RunConfig, StudentConfig, longer, new_run, pairs_notes, train_to_end
from ...distill_core.training.run_folder import RunFolder
from .backend import ComfyBackend, training_backend
from .carried import check_teachable
from .conditioning import cond_of
from .datasets import open_dataset
from .folders import lora_file, run_folder
from .identity import identity
from .kept import TurboSamples
from .other_teacher import check_other, is_itself, open_teacher
from .parts import Parts, check_dataset_pairs
from .plan import check_memory, memory_verdict
from .results import TurboLora, read_turbo_lora, with_turbo_lora
from .shown import keep_items
from .side_by_side import decode
from .widgets import in_widgets, widget_of

CURVES_EVERY = 2.0  # seconds between pictures of the curves on the node
# How far a path run again may end from the stored latent. Noise in bfloat16 and a half-precision network cost some
# percent at high guidance; another solver or noise gives about 1, and whether the teacher is the same a hash tells.
PATH_TOLERANCE = 0.25


@dataclass(frozen=True)
class Request:
    """Everything a run is asked to be.

    pairs_if_stored: leave the pairs term out where the dataset keeps no pairs.  parts: what the method takes beside the
    model.  guidance: of the teacher, None for that of the dataset.  say: shows what is to be known of the run; notes:
    what it has shown.  progress: shows how far the preparation is, for now.  start_again: put a run of this name aside
    unless it is the finished one that is asked for.
    teacher: a MODEL that teaches in the place of ``model``.
    tunes: MODEL changes and is sampled as before, a turbo for one.  kept: its own samples, which are made first.
    keep_share: of the batches, the others are of the dataset (None: there is no other).
    """

    model: Any
    dataset: Path | Mix | None
    run_name: str
    method: MethodConfig
    train: TrainConfig
    student: StudentConfig
    parts: Parts = Parts()
    checkpointing: bool = True
    vae: Any = None
    preview_positive: Sequence = ()
    preview_negative: Any = None
    notes: Sequence[str] = ()
    pairs_if_stored: bool = False
    say: Callable[[str], None] = logging.info
    progress: Callable[[str], None] = logging.info
    guidance: float | None = None
    start_again: bool = False
    tunes: bool = False
    kept: TurboSamples | None = None
    keep_share: float = 0.5
    teacher: Any = None

    @property
    def other_teacher(self) -> Any:
        """Its teacher where that is another MODEL, else None."""
        return None if self.teacher is None or is_itself(self.model, self.teacher) else self.teacher

    def looked_at(self) -> tuple[Any, Any, Sequence, Any, Sequence, Any]:
        """What the report of the run shows: of `results.lasting_report`."""
        kept = self.kept.prompts if self.kept and self.dataset else ()
        negative = self.preview_negative or (self.kept.empty if self.kept else None)
        return self.model, self.vae, self.preview_positive, negative, kept, self.teacher

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
        if (other := self.other_teacher) is not None:
            identities["teacher"] = identity(other)
        vision = self.parts.vision_config()
        return RunConfig(method, self.train, self.student, identities, vision=vision, guidance=self.guidance)


def train_in_graph(request: Request) -> tuple[object, TurboLora, dict]:
    """Train, or go on, or find that it is done: the student MODEL, its LORA_MODEL and the LOSS_MAP.

    Raises ValueError for what cannot work, InterruptProcessingException on cancel, torch.OutOfMemoryError
    with advice, OSError; after each of them the checkpoint and, once a step is done, the LoRA are on disk.
    """
    folder, lora_path = RunFolder(run_folder(request.run_name)), lora_file(request.run_name)
    dataset, config = describe(request)
    report = folder.finished(config.request())
    answered = report is not None and lora_path.exists()
    said = report.get("said", "") if report else ""
    if not answered:
        try:
            check_memory(request, config, dataset)
            with (
                training_backend(request.model, request.checkpointing, request.train, folder.path) as backend,
                open_teacher(request, backend, folder.path) as teacher,
            ):
                run = open_run(request, config, dataset, backend, folder, teacher)
                if request.train.preflight:
                    preflight(run)
                if request.start_again and (aside := put_aside(folder, lora_path)):
                    request.say(f"started again: the run before, and its LoRA, are now called {aside}")
                note_start(folder, run, request)
                name, terms = request.run_name, tuple(config.method.terms)
                line = StatusLine(request.train.log_every, terms, lambda text: logging.info("%s: %s", name, text))
                with run_page(request, run, config, folder) as page:
                    watchers = [page, LiveView(request, folder, page), line]
                    said = train_to_end(run, config, folder, lora_path, watchers, retention_listeners(run, config))
        except OtherSettings as error:
            cure = "choose another run_name, or set existing_run to start again"
            raise ValueError(error.said(widget_of, cure)) from None
        except ValueError as error:
            raise ValueError(in_widgets(str(error))) from error
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                planned = memory_verdict(request, config, dataset)
                raise torch.OutOfMemoryError(advice(request) + (f". {planned}" if planned else "")) from error
            raise
    weights = config.method.terms
    losses = [sum(w * entry.get(term, 0.0) for term, w in weights.items()) for entry in folder.logs()]
    student, lora = with_turbo_lora(request.model, lora_path), read_turbo_lora(lora_path)
    lora.student = student
    if said:
        request.say(said)
        note(folder, said)
    if lora.description["steps"] > request.train.steps:
        request.say(longer(lora.description["steps"], request.train.steps))
    elif answered and request.start_again:
        request.say("this run is finished, with just these settings: it would become the same and is not done again")
    return student, lora, {"loss": losses}


def describe(request: Request) -> tuple[LatentDataset, RunConfig]:
    """The opened dataset, checked against the model, and what decides the run."""
    if request.train.offload != NONE and not request.checkpointing:
        raise ValueError("offload needs gradient_checkpointing: without it, it saves nothing. Switch one of them")
    check_teachable(request.model)  # before the pairs are compared: its message is the better one
    if request.teacher is not None:
        check_other(request.model, request.teacher)
    source = request.dataset if request.kept is None else with_turbo_samples(request, request.kept)
    dataset = open_dataset(source, request.model, request.method.weight("pairs") > 0)
    return dataset, request.run_config(dataset)


def with_turbo_samples(request: Request, kept: TurboSamples) -> Path | Mix:
    """The dataset with the turbo's own samples, which are made where they are not there yet."""
    own = request.dataset
    if own is not None and not kept.complete:
        dataset = open_dataset(own, request.model, pairs=False)
        check_memory(request, request.run_config(dataset), dataset)  # before what may be hours of sampling
    folder = kept.make(request.progress)
    return folder if own is None else mixed(own, folder, request.keep_share)


def open_run(
    request: Request,
    config: RunConfig,
    dataset: LatentDataset,
    backend: ComfyBackend,
    folder: RunFolder,
    teacher: Teacher | None = None,
) -> Run:
    """The run on the opened backend; resumes later, when its first step is asked for."""
    check_dataset_pairs(config.method, dataset, backend.process)
    for sentence in pairs_notes(config.method, dataset, backend.process, backend.limits()):
        levels = len(config.method.levels(backend.process))
        request.say(f"{sentence}: for all of them make it with Teacher Latents and pairs_for_steps = {levels}")
    components = request.parts.components(backend, request.train, request.checkpointing)
    components = replace(components, teacher=teacher)
    run = new_run(
        config,
        components,
        dataset,
        folder.path,
        distance=request.parts.distance(backend.channels),
        path_tolerance=PATH_TOLERANCE,
    )
    for sentence in teacher_notes(components, dataset):
        request.say(sentence)
    return run


def note_start(folder: RunFolder, run: Run, request: Request) -> None:
    """Note what reports need to know of the dataset, and whether the run tunes the model."""
    dataset, manifest = run.dataset, run.dataset.manifest()
    usual = manifest.get("config", {}).get("steps")
    facts = {"teacher_steps": usual} if usual else {}
    facts |= {"tunes": True} if request.tunes else {}
    facts |= {"teacher": run.method.teacher.name} if request.other_teacher is not None else {}
    guidance = manifest["guidance"] if request.guidance is None else request.guidance
    if not request.method.few_steps:
        guidance = request.student.cfg  # it is sampled as the model is
    folder.start(guidance=guidance, latent_shape=list(dataset.shapes[0]), **facts)
    if dataset.conditions:
        keep_items(folder.path, first_items(run), dataset.uncond())


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


def run_page(request: Request, run: Run, config: RunConfig, folder: RunFolder) -> RunPage:
    """The run's page, with pictures of the preview's prompts where there is a VAE, or of items that are to be filled or
    edited."""
    train, pictures = request.train, None
    if request.vae is not None and train.sample_every:
        decoded = lambda latents: images_of(request.vae, run, latents)  # noqa: E731
        conds = [cond_of(conditioning) for conditioning in request.preview_positive]
        if run.dataset.conditions:
            pictures = StudentPictures.of_items(run, request.student, first_items(run), decoded)
        elif conds:
            pictures = StudentPictures(run, request.student, conds, decoded)
    page = RunPage(
        folder,
        config.request(),
        pictures,
        every=train.sample_every,
        write_every=train.checkpoint_every,
        say=logging.warning,
    )
    for text in request.notes:
        note(folder, text)
    return page


def images_of(vae, run: Run, latents: Sequence[torch.Tensor]) -> torch.Tensor:
    """Images [N, H, W, 3] of latents in model space."""
    with torch.inference_mode():
        images = torch.cat([decode(vae, run.method.student.backend.latents_out(x)) for x in latents])
    run.method.teacher.backend.to_device()  # the VAE may have needed its room
    return images


class LiveView:
    """Shows a run on its node: the bar every step, curves every two seconds, and the page's samples when there are new
    ones."""

    def __init__(self, request: Request, folder: RunFolder, page: RunPage) -> None:
        self.request, self.page, self.logs = request, page, folder.logs()
        self.bar = comfy.utils.ProgressBar(request.train.steps)
        self.shown = self.started = time.monotonic()
        self.first = None

    def __call__(self, event: Event, condition: Condition) -> None:
        if self.first is None:
            self.first = event.step
            if event.step > 1:
                logging.info("run %s goes on after step %d", self.request.run_name, event.step - 1)
            self.logs = [entry for entry in self.logs if entry["step"] < event.step]
        self.logs.append(event.logs)
        picture, due = None, self.page.drawn == event.step or event.step == event.steps
        if due or time.monotonic() - self.shown >= CURVES_EVERY:
            self.shown = time.monotonic()
            picture = ("JPEG", self.picture(event, condition), 1024)
        self.bar.update_absolute(event.step, event.steps, picture)

    def picture(self, event: Event, condition: Condition) -> Image.Image:
        seconds = (time.monotonic() - self.started) / max(1, event.step - self.first + 1)
        left = seconds * (event.steps - event.step)
        title = f"step {event.step} of {event.steps}, {seconds:.2g} s each, {left / 60:.0f} min left; {condition.word}"
        parts = [live_plots.curves(self.logs, title=title)]
        return live_plots.stack([*parts, self.page.latest] if self.page.latest else parts)

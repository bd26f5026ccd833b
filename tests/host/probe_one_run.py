"""Runs inside the host's Python: the same tiny run by the command ``train`` and by the button, and its files.

    probe_one_run.py FOLDER

The command is the real one; only its model is the host's MODEL instead of a diffusers pipeline, since two libraries'
networks round differently. Prints JSON; test_one_run.py says what it must be.
"""

from as_host import folder

# isort: split
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import comfy.model_management
import folder_paths
import torch
from pack.distill_core.cli import train as command
from pack.distill_core.cli.main import main
from pack.distill_core.digests import fingerprint
from pack.distill_core.files import load_tensors
from pack.distill_core.training.run_folder import RunFolder
from pack.nodes import mini
from pack.nodes.datasets import TeacherLatents
from pack.nodes.host.backend import training_backend
from pack.nodes.host.folders import lora_file, run_folder
from pack.nodes.trainers.ladd import LADDTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from files_of_a_step import traced  # noqa: E402

folder_paths.set_output_directory(str(folder))
WIDGETS = dict(target_steps=2, steps=4, batch_size=4, student_lr=6e-4, discriminator_lr=4e-3, rank=4, seed=5)
WIDGETS |= dict(renoise_mean=0.5, renoise_std=1.0, checkpoint_every=3)
CONFIG = """
[model]
lora_rank = 4
[train]
steps = 4
batch_size = 4
student_lr = 6e-4
discriminator_lr = 4e-3
seed = 5
checkpoint_every = 3
[ladd]
terms = { adversarial = 1.0, pairs = 4.0 }
student_sigmas = LEVELS
probabilities = [0.5, 0.5]
renoise_mean = 0.5
"""


def conditioning(name: str) -> list:
    return mini.MiniConditioning.execute(name)[0]


def by_button(model, dataset, name: str, **changes) -> None:
    """The node as the host calls it: every input a list."""
    widgets = {**WIDGETS, **changes}
    LADDTrainer.execute(**{key: [v] for key, v in dict(model=model, dataset=dataset, run_name=name, **widgets).items()})


def by_command(model, dataset, out) -> None:
    """``train CONFIG --data DATASET --out OUT`` on the same MODEL."""
    with training_backend(model) as backend:
        levels = list(LADDTrainer.request(model=model, dataset=dataset, run_name="x", **WIDGETS).method.student_sigmas)
        config = folder / "c.toml"
        config.write_text(CONFIG.replace("LEVELS", str(levels)))
        unused = dict(decode_with_gradient=None, encoder=None, device="cpu")
        source = SimpleNamespace(backend=backend, channels=backend.channels, decode=lambda x: x[:, :3], **unused)
        backend.below = []  # LoRAs that the command puts under a student
        backend.digest = lambda: fingerprint(backend.network)  # as the command's own backend has it
        command.open_source = lambda settings, embedded_guidance, on_device: source
        assert main(["train", str(config), "--data", str(dataset), "--out", str(out)]) == 0


with torch.inference_mode():
    model = mini.LoadMiniModel.execute(False)[0]
    dataset = TeacherLatents.execute(
        positive=conditioning("all ten"),
        **{
            key: [value]
            for key, value in dict(
                model=model,
                dataset_name="probe",
                count=16,
                sizes="64x64",
                steps=4,
                cfg=1.5,
                negative=conditioning("none")[0],
                pairs_for_steps=2,
                batch_size=16,
            ).items()
        },
    )[0]
    by_button(model, dataset, "button")
    with traced() as trace:
        by_button(model, dataset, "traced", steps=1)
with torch.inference_mode(False):
    by_command(model, dataset, folder / "command")

graph, headless = run_folder("button"), folder / "command"
(a, about_a), (b, about_b) = load_tensors(lora_file("button")), load_tensors(headless / "student.safetensors")
checkpoints = [load_tensors(path / "checkpoint.safetensors") for path in (graph, headless)]
print(
    json.dumps(
        {
            "names": sorted(a) == sorted(b),
            "weights": [name for name in a if not torch.equal(a[name], b[name])],
            "trained": max(value.abs().max().item() for name, value in a.items() if "lora_B" in name),
            "metadata": {
                k: [about_a.get(k), about_b.get(k)]
                for k in about_a.keys() | about_b.keys()
                if about_a.get(k) != about_b.get(k)
            },
            "log": (graph / "log.jsonl").read_bytes() == (headless / "log.jsonl").read_bytes(),
            "steps": len(RunFolder(graph).logs()),
            "checkpoint": [k for k in checkpoints[0][0] if not torch.equal(checkpoints[0][0][k], checkpoints[1][0][k])],
            "state": checkpoints[0][1] == checkpoints[1][1] and checkpoints[0][0].keys() == checkpoints[1][0].keys(),
            "report": (graph / "report.json").read_bytes() == (headless / "report.json").read_bytes(),
            "files": {which: trace.files(which) for which in ("open", "step", "all")},
            "in_training": comfy.model_management.in_training,
        }
    )
)

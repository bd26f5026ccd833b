"""The files in configs/: each opens, fits the model it names, and those of the mini model train."""

import re
from pathlib import Path

import pytest
import torch

from distill_core.cli.main import main
from distill_core.cli.sample import levels_for, load_student
from distill_core.data.dataset import LatentDataset
from distill_core.diffusion.process import DiscreteProcess, FlowProcess, cumulative_alphas
from distill_core.diffusion.schedules import grid_sigmas, shift_sigmas
from distill_core.lora_files import read_lora
from distill_core.methods.registry import METHODS
from distill_core.models.items import MASK, MASKED_IMAGE
from distill_core.training.config import load_config

FOLDER = Path(__file__).parents[2] / "configs"
FILES = sorted(FOLDER.glob("*.toml"))
MINI = [path for path in FILES if path.stem.startswith("mini_")]
# Of pictures that the command scenes draws; the last one also learns from what the teacher fills in.
EDITORS = ("scenes_inpainting_ladd", "scenes_editing_ladd", "scenes_inpainting_pairs_ladd")
STAGES = ("scenes_aspects_ladd", "scenes_aspects_dmd2")  # the second goes on from what the first makes
TUNED_TEACHER = "mini_dpo_ladd"  # goes on from what mini_dpo makes
STABLE_DIFFUSION = DiscreteProcess(cumulative_alphas(), "eps")
PROCESSES = {
    "sd1.5_diffusion2gan": STABLE_DIFFUSION,
    "sd1.5_editing_ladd": STABLE_DIFFUSION,
    "sd1.5_inpainting_ladd": STABLE_DIFFUSION,
    "sdxl_add": STABLE_DIFFUSION,
    "sdxl_dmd2": STABLE_DIFFUSION,
    "sdxl_pictures_ladd": STABLE_DIFFUSION,
    "sd3.5_medium_ladd": FlowProcess(1000.0, shift_alpha=3.0),
    "flux1_dev_ladd": FlowProcess(1.0, shift_alpha=2.718281828**1.15),
    "flux1_kontext_ladd": FlowProcess(1.0, shift_alpha=2.718281828**1.15),
    "flux1_fill_ladd": FlowProcess(1.0, shift_alpha=2.718281828**1.15),
}


def named(paths: list[Path]) -> list:
    return [pytest.param(path, id=path.stem) for path in paths]


def test_every_method_has_a_mini_and_a_large_model():
    assert {p.stem for p in FILES} == {
        *PROCESSES,
        *(f"mini_{name}" for name in METHODS),
        TUNED_TEACHER,
        *STAGES,
        *EDITORS,
    }


@pytest.mark.parametrize("path", named(FILES))
def test_the_file_opens_and_is_of_the_method_in_its_name(path):
    config = load_config(path)
    assert path.stem.endswith(f"_{config.method}")
    assert (config.model.path == "mini") == (path in MINI)
    text = path.read_text(encoding="utf-8")
    assert max(map(len, text.splitlines())) <= 120
    commands = ("cache", "train", *(["sample"] if path.stem != STAGES[0] else []))
    assert all(f"{command} configs/{path.name}" in text for command in commands)
    assert ("We have not run this file on the real weights" in text) == (
        path not in MINI and path.stem not in (*STAGES, *EDITORS)
    )


@pytest.mark.parametrize("name, process", PROCESSES.items())
def test_the_levels_are_those_of_the_model(name, process):
    """The model's own grid; a file that wrote LADD's flow times for SDXL, or forgot a shift, would fail here."""
    config = load_config(FOLDER / f"{name}.toml")
    levels = torch.tensor(config.method_config.levels(process))
    torch.testing.assert_close(levels, grid_sigmas(process, len(levels))[:-1], rtol=2e-4, atol=0)
    assert levels[0].item() == pytest.approx(process.sigma_max, rel=1e-4)


def test_the_pairs_of_stable_diffusion_begin_at_its_highest_level():
    stored = load_config(FOLDER / "sd1.5_diffusion2gan.toml").cache.state_sigmas
    assert stored == (pytest.approx(STABLE_DIFFUSION.sigma_max, rel=1e-5),)


def shortened(text: str) -> str:
    """The same file with 32 latents and 2 training steps."""
    text, latents = re.subn(r"(?m)^count = \d+", "count = 32", text)
    text = re.sub(r"(?m)^shard_size = \d+", "shard_size = 8", text)
    text = re.sub(r"(?m)^validation = \d+", "validation = 4", text)
    text, steps = re.subn(r"(?m)^(\[train\]\nsteps) = \d+", r"\1 = 2", text)
    assert (latents, steps) == (int("[cache]" in text), 1)
    return text


@pytest.mark.parametrize("path", named([path for path in MINI if path.stem != TUNED_TEACHER]))
def test_a_mini_file_trains_a_student(path, tmp_path):
    pictures = ["--images", str(FOLDER.parent / "distill_core/assets/pictures")] if "tune" in path.stem else []
    description = trained(path, tmp_path, "run", pictures)
    levels = {"mini_diffusion2gan": 1, "mini_dpo": 0}.get(path.stem, 4)
    assert description["steps"] == 2 and len(description.get("sigmas", ())) == levels


def trained(path: Path, folder: Path, run: str, pictures: list[str]) -> dict:
    """What the file of the student says that a shortened ready file makes in ``run``."""
    config, data = folder / path.name, folder / f"data-{path.stem}"
    config.write_text(shortened(path.read_text(encoding="utf-8")), encoding="utf-8")
    assert main(["cache", str(config), *pictures, "--out", str(data)]) == 0
    assert main(["train", str(config), "--data", str(data), "--out", str(folder / run)]) == 0
    return read_lora(folder / run / "student.safetensors")[1]


def test_the_chain_of_a_tuned_teacher(tmp_path, monkeypatch):
    """mini_dpo, mini_dpo_ladd, and one file of the student and the tuning, in the folders that the files name."""
    monkeypatch.chdir(tmp_path)
    trained(FOLDER / "mini_dpo.toml", tmp_path, "dpo", [])
    description = trained(FOLDER / f"{TUNED_TEACHER}.toml", tmp_path, "run", [])
    assert description["teacher"] == "the model with student.safetensors"
    files = ["--lora", "run/student.safetensors", "--add", "dpo/student.safetensors", "--out", "turbo.safetensors"]
    assert main(["merge", f"{TUNED_TEACHER}.toml", *files]) == 0
    assert main(["sample", f"{TUNED_TEACHER}.toml", "--lora", "turbo.safetensors", "--count", "1", "--out", "x"]) == 0


def test_the_stages_of_three_aspects(tmp_path, monkeypatch):
    """A teacher tuned on pictures of three shapes, a student of it for all of them, and its levels for two."""
    monkeypatch.chdir(tmp_path)
    for size in ("64x64", "96x64", "64x96"):
        assert main(["scenes", "--out", f"pictures/{size}", "--count", "3", "--size", size]) == 0
    trained(FOLDER / f"{STAGES[0]}.toml", tmp_path, "tuned", ["--images", "pictures"])
    shapes = {(16, 8, 8), (16, 8, 12), (16, 12, 8)}
    assert set(LatentDataset(tmp_path / f"data-{STAGES[0]}").shapes) == shapes
    description = trained(FOLDER / f"{STAGES[1]}.toml", tmp_path, "run", [])
    assert set(LatentDataset(tmp_path / f"data-{STAGES[1]}").shapes) == shapes
    assert description["reference_pixels"] == 64 * 64 and description["sigmas"] == [1.0, 0.75, 0.5, 0.25]
    config = load_config(f"{STAGES[1]}.toml")
    source, _, said = load_student(config, tmp_path / "run" / "student.safetensors")
    assert levels_for(source.backend, said, (16, 8, 8), 4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    wide = levels_for(source.backend, said, (16, 8, 12), 4)
    torch.testing.assert_close(wide, shift_sigmas(torch.tensor([1, 0.75, 0.5, 0.25, 0]), shift_alpha=1.5**0.5))


def test_a_model_that_fills_pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["scenes", "--out", "pictures", "--count", "3"]) == 0
    description = trained(FOLDER / f"{EDITORS[0]}.toml", tmp_path, "run", ["--images", "pictures"])
    assert description["sigmas"] == [1.0]
    command = ["sample", f"{EDITORS[0]}.toml", "--data", f"data-{EDITORS[0]}", "--lora", "run/student.safetensors"]
    assert main([*command, "--count", "2", "--out", "images"]) == 0


def test_a_model_that_fills_pictures_beside_its_teacher(tmp_path, monkeypatch):
    """Pictures to be judged by and the teacher's fills of them to be tied to, by one file."""
    monkeypatch.chdir(tmp_path)
    path = FOLDER / f"{EDITORS[2]}.toml"
    Path("c.toml").write_text(shortened(path.read_text(encoding="utf-8")), encoding="utf-8")
    assert main(["scenes", "--out", "pictures", "--count", "3"]) == 0
    assert main(["cache", "c.toml", "--images", "pictures", "--out", "data"]) == 0
    assert main(["cache", "c.toml", "--data", "data", "--out", "fills"]) == 0
    pictures, fills = LatentDataset(tmp_path / "data"), LatentDataset(tmp_path / "fills")
    assert fills.state_sigmas == (1.0,) and not pictures.state_sigmas
    seen, given = (data.read(data.largest[:3]).cond.extra for data in (fills, pictures))
    assert all(torch.equal(seen[name], given[name]) for name in (MASK, MASKED_IMAGE))
    assert main(["train", "c.toml", "--out", "run"]) == 0
    assert read_lora("run/student.safetensors")[1]["sigmas"] == [1.0]


def test_a_model_that_edits_pictures_at_strengths(tmp_path, monkeypatch):
    """Pairs of pictures, the teacher's own edits of them at strengths, and a student that is told these."""
    monkeypatch.chdir(tmp_path)
    name = EDITORS[1]
    assert main(["scenes", "--edits", "--out", "pictures", "--count", "3"]) == 0
    Path("c.toml").write_text(shortened((FOLDER / f"{name}.toml").read_text(encoding="utf-8")), encoding="utf-8")
    assert main(["cache", "c.toml", "--images", "pictures/after", "--out", "pairs"]) == 0
    assert main(["cache", "c.toml", "--data", "pairs", "--out", "edits"]) == 0
    assert main(["train", "c.toml", "--data", "edits", "--out", "run"]) == 0
    low, usual, high = read_lora("run/student.safetensors")[1]["strengths"]["text_strength"]
    assert 1 <= low < usual == 2 < high <= 5
    command = ["sample", "c.toml", "--data", "pairs", "--lora", "run/student.safetensors", "--out", "images"]
    assert main([*command, "--count", "2", "--text-strength", "2.5"]) == 0

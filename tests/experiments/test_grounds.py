"""Grounds of the comparison: a second one with two word groups, made of a tiny network and a tiny autoencoder."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderTiny
from networks import LATENT, build_cond, build_network
from PIL import Image

from distill_core.cli.main import main
from distill_core.data.cache import CacheConfig
from distill_core.data.dataset import LatentDataset
from distill_core.data.mix import open_data
from distill_core.diffusion.process import FlowProcess
from distill_core.digests import fingerprint
from distill_core.evaluation.frechet import Gaussian
from distill_core.evaluation.metrics import Evaluator
from distill_core.evaluation.spaces import Space
from distill_core.experiments import compare, grounds, results, tables
from distill_core.experiments.entries import ENTRIES, SIZED
from distill_core.methods.components import Components, VisionConfig
from distill_core.models.backends.diffusers import DiffusersBackend
from distill_core.training.loop import train

WORDS = {"colour": torch.tensor([0, 0, 0, 1, 1, 1]), "shape": torch.tensor([0, 1, 2, 0, 1, 2])}
FEATURES = 5


def space(suffix: str, channels: int, of_images: bool, seed: int) -> Space:
    """Features of a random convolution, with a head for each word group."""
    g = torch.Generator().manual_seed(seed)
    kernel = torch.randn(FEATURES, channels, 3, 3, generator=g) / (9 * channels) ** 0.5
    heads = {group: torch.randn(FEATURES, int(of.max()) + 1, generator=g) for group, of in WORDS.items()}

    def features(latents: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(images if of_images else latents, kernel).relu().mean((2, 3))

    return Space(
        suffix,
        features,
        Gaussian(torch.zeros(FEATURES), torch.eye(FEATURES)),
        {group: lambda x, w=weight: x @ w for group, weight in heads.items()},
    )


def tiny_ground(**changes) -> grounds.Ground:
    widths = {"encoder_block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        autoencoder = AutoencoderTiny(latent_channels=LATENT[0], **widths).eval().requires_grad_(False)

    def components() -> Components:
        backend = DiffusersBackend(build_network("sd3"), FlowProcess(1000.0, shift_alpha=1.0))
        return Components(backend, lambda latents: autoencoder.decode(latents).sample, autoencoder.encoder)

    spaces = [space("", LATENT[0], False, 1), space("_pixels", 3, True, 2)]
    conds = build_cond(6)
    ground = grounds.Ground(
        "shapes",
        components,
        [f"prompt {row}" for row in range(len(conds))],
        conds,
        build_cond(1, seed=1),
        WORDS,
        LATENT,
        1.5,
        CacheConfig(
            count=24, steps=4, guidance=1.5, sizes=(LATENT[1:],), state_sigmas=(1.0, 0.75, 0.5, 0.25), batch_size=24
        ),
        lambda examples: Evaluator(spaces, autoencoder.decoder, repeats=20, examples=examples),
        VisionConfig("encoder", 32),
        teacher_steps=(1, 2),
    )
    return replace(ground, **changes)


@pytest.fixture
def shapes(monkeypatch):
    """Two entries of two steps, on few images of that ground."""
    names = ("LADD + pairs", "ADD")
    short = {
        name: replace(compare.ENTRIES[name], train=replace(compare.ENTRIES[name].train, steps=2, batch_size=4))
        for name in names
    }
    monkeypatch.setattr(compare, "ENTRIES", {**compare.ENTRIES, **short})
    monkeypatch.setattr(compare, "OWN_IMAGES", 12)
    monkeypatch.setattr(compare, "REFERENCE_IMAGES", 12)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setitem(compare.GROUNDS, "shapes", tiny_ground)
    return names


def image_size(path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def command(out, *more: str) -> list[str]:
    return ["compare", "--out", str(out), "--seeds", "7", "--images", "24", "--ground", "shapes", *more]


def test_another_ground_is_compared_like_the_clothes(shapes, tmp_path):
    picture = tmp_path / "pictures" / "samples.png"
    assert main(command(tmp_path, "--entries", *shapes, "--picture", str(picture))) == 0
    assert image_size(picture)[1] > image_size(picture)[0]  # rows: the teacher at 1 and 2, two entries at 1, 2 and 4
    written = json.loads(compare.result_path(tmp_path, shapes[0], 7).read_text())
    assert written["ground"] == "shapes" and written["steps"] == 2
    student = results.read_result(compare.result_path(tmp_path, shapes[0], 7))["scores"]["4"]
    for suffix in ("", "_pixels"):
        each = [student[f"accuracy_{group}{suffix}"].value for group in WORDS]
        assert student[f"alignment{suffix}"].value == pytest.approx(sum(each) / 2, abs=2e-4)  # as written
        assert f"accuracy{suffix}" not in student and student[f"diversity{suffix}"].value > 0
    assert {"coverage", "drift", "detail_ratio"} <= student.keys()
    dataset = LatentDataset(tmp_path / "dataset-7")
    assert len(dataset) == 24 and dataset.state_sigmas == (1.0, 0.75, 0.5, 0.25)
    table = (tmp_path / "table.md").read_text()
    assert table.startswith("Ground: shapes.") and "accuracy colour | accuracy shape" in table
    row = next(line for line in table.splitlines() if line.startswith("| teacher | 2 |"))
    teacher = results.read_result(tmp_path / "teacher.json")
    assert teacher["ground"] == "shapes" and f"{100 * teacher['scores']['2']['alignment'].value:.1f} [" in row


def test_a_picture_shows_what_was_scored(shapes, tmp_path):
    """The latents that are kept are those of the evaluation; a result without any is refused in words."""
    ground = tiny_ground()
    compare.score_teacher(ground, tmp_path, 24)
    shown = results.read_shown(compare.result_path(tmp_path, "teacher"))
    own = compare.teachers_own(ground, tmp_path, 24)["own"][: len(ground.conds)]
    assert list(shown) == ["2", "1"]
    torch.testing.assert_close(shown["2"], own, rtol=2e-3, atol=2e-3)  # kept in 16 bit
    with pytest.raises(ValueError, match="has no samples to show: run its entry again"):
        results.read_shown(compare.result_path(tmp_path, shapes[0], 7))


def test_pairs_of_the_teacher_and_photographs_for_the_discriminator(shapes, tmp_path, monkeypatch):
    """Batches take turns: on the teacher's the pairs count, on photographs the discriminator."""
    name, drawn = "LADD + pairs, judged beside photographs", []

    def photographs(data, count: int, seed: int):
        drawn.append(count)
        latents = torch.randn(count, *LATENT, generator=torch.Generator().manual_seed(seed))
        return list(latents), [build_cond(6)[i % 6 : i % 6 + 1] for i in range(count)]

    entry = compare.ENTRIES[name]
    short = replace(entry, train=replace(entry.train, steps=4, batch_size=4), steps=(1,))
    monkeypatch.setitem(compare.ENTRIES, name, short)
    monkeypatch.setitem(compare.GROUNDS, "shapes", lambda: tiny_ground(photographs=photographs))
    assert main(command(tmp_path, "--entries", name)) == 0
    assert drawn == [24]  # as many as the teacher's
    data = open_data(compare.data_of(entry, tmp_path, 7))
    logs = [event.logs for event in train(compare.prepare(tiny_ground(), short, data, 7))]
    kinds = [data.batch(n, 4, 7).states is not None for n in range(4)]
    assert sorted(kinds) == [False, False, True, True]
    for of_teacher, log in zip(kinds, logs, strict=True):
        assert ("pairs" in log) == of_teacher
        assert ("adversarial" in log) == ("discriminator" in log) == (not of_teacher)


def small_network() -> DiffusersBackend:
    network = build_network("sd3", num_layers=1, num_attention_heads=1, caption_projection_dim=32)
    return DiffusersBackend(network, FlowProcess(1000.0, shift_alpha=1.0))


@pytest.mark.parametrize("name", sorted(SIZED.keys() | {n for n, entry in ENTRIES.items() if entry.small}))
def test_student_teacher_and_data_are_each_of_their_size(shapes, tmp_path, monkeypatch, name):
    entry = replace(ENTRIES[name], train=replace(ENTRIES[name].train, steps=2, batch_size=4))
    monkeypatch.setitem(compare.ENTRIES, name, entry)
    monkeypatch.setitem(compare.GROUNDS, "shapes", lambda: tiny_ground(small=small_network))
    assert main(command(tmp_path, "--entries", name)) == 0
    (made,) = tmp_path.glob("dataset-*")
    assert made.name == ("dataset-7-small" if "data" in entry.small else "dataset-7")
    data = LatentDataset(made)
    run = compare.prepare(tiny_ground(small=small_network), entry, data, 7)
    backends = {"student": run.method.student.backend, "teacher": run.method.teacher.backend}
    whole, less = (fingerprint(b.network) for b in (tiny_ground().components().backend, small_network()))
    base = {role: fingerprint(backend.network) for role, backend in backends.items()}
    base["data"] = data.manifest()["base"]
    assert base == {role: less if role in entry.small else whole for role in ("student", "teacher", "data")}


def test_grounds_are_not_mixed_in_one_folder(shapes, tmp_path, capsys):
    compare.score_teacher(tiny_ground(), tmp_path, 24)
    assert main(["compare", "--out", str(tmp_path), "--entries", "pairs only"]) == 2
    assert "is of the ground 'shapes', not 'clothes'" in capsys.readouterr().err
    (tmp_path / "teacher.json").unlink()  # stopped before the teacher was scored
    with pytest.raises(ValueError, match="teachers_own.safetensors is of the ground 'shapes', not 'clothes'"):
        compare.teachers_own(grounds.clothes(), tmp_path, 24)
    older = tmp_path / "older"
    older.mkdir()
    (older / "LADD-7.json").write_text(json.dumps({"entry": "LADD", "seed": 7, "images": 24, "scores": {}}))
    assert main(command(older, "--entries", "LADD")) == 2
    assert "is of the ground 'clothes', not 'shapes'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "entry, missing",
    [
        ("LADD, real latents", "photographs"),
        ("pairs only, E-LatentLPIPS", "perceptual distance"),
        ("LADD, 1 step, small student", "smaller model"),
    ],
)
def test_a_ground_refuses_entries_that_it_has_nothing_for(shapes, tmp_path, capsys, entry, missing):
    assert main(command(tmp_path, "--entries", entry)) == 2
    assert f"the ground 'shapes' has no {missing} for '{entry}'" in capsys.readouterr().err
    possible = compare.possible_entries(tiny_ground())  # what is run where --entries is left out
    assert entry not in possible and set(shapes) <= set(possible)
    assert compare.possible_entries(grounds.clothes()) == list(compare.ENTRIES)


def test_two_images_of_each_conditioning_are_needed(shapes, tmp_path, capsys):
    assert main([*command(tmp_path, "--entries", shapes[0]), "--images", "11"]) == 2
    assert "--images must be at least 12" in capsys.readouterr().err


def test_items_take_the_conditionings_in_turn():
    ground = tiny_ground()
    assert ground.labels_of(8)["shape"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    teacher = ground.teacher(ground.components().backend)
    several = ground.samples(teacher, 1, 8, sampler="euler")
    shifted = replace(ground, conds=ground.conds[[1, 2, 3, 4, 5, 0]]).samples(teacher, 1, 8, sampler="euler")
    assert several.shape == (8, *LATENT) and not torch.allclose(several, shifted)


def test_accuracy_of_several_word_groups_is_their_mean():
    figures = {"alignment": 1, "accuracy_shape": 2, "fd": 3}
    assert results.figure_of(figures, "accuracy") == 1 and results.figure_of(figures, "drift") is None
    assert results.figure_of({"accuracy": 4, "alignment": 1}, "accuracy") == 4


def test_every_ground_is_complete():
    """The table of results has columns for what its evaluator gives, and its dataset has the states for pairs."""
    for name, make in grounds.GROUNDS.items():
        ground = make()
        assert ground.name == name and len(ground.empty) == 1
        assert all(len(of) == len(ground.conds) for of in ground.labels.values())
        assert max(ground.cache.state_sigmas) == 1.0 and ground.cache.guidance == ground.guidance
        assert "fd" in tables.COLUMNS and tuple(ground.cache.sizes[0]) == ground.shape[1:]

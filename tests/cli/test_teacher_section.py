"""[teacher] in the commands: who makes the dataset, who teaches, what the file says, what a plan counts."""

import pytest
from diffusers import SD3Transformer2DModel
from networks import randomise_path

from distill_core.cli.main import main
from distill_core.cli.plan import plan_of
from distill_core.data.dataset import LatentDataset
from distill_core.files import save_tensors
from distill_core.lora_files import read_lora
from distill_core.models import mini
from distill_core.training.config import load_config

BODY = """
[model]
lora_rank = 2
[cache]
count = 4
steps = 2
guidance = 1.5
sizes = [[8, 8]]
batch_size = 4
[train]
steps = 1
batch_size = 2
[ladd]
terms = { adversarial = 1.0, distillation = 2.5 }
[discriminator]
width = 16
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A LoRA that changes the mini model a little, a wider network, a dataset and a run with that LoRA as teacher."""
    root = tmp_path_factory.mktemp("teacher")
    lora = randomise_path(mini.mini_backend().new_lora(2), size=0.02)
    save_tensors(root / "tuned.safetensors", lora.export(), {})
    config = {**mini.TRANSFORMER_CONFIG, "num_attention_heads": 6, "caption_projection_dim": 384}
    SD3Transformer2DModel(**config).save_pretrained(root / "wide")
    write(root, f'lora = "{root}/tuned.safetensors"')
    assert main(["cache", str(root / "c.toml"), "--out", str(root / "data")]) == 0
    assert main(["train", str(root / "c.toml"), "--data", str(root / "data"), "--out", str(root / "run")]) == 0
    return root


def write(root, teacher: str) -> None:
    (root / "c.toml").write_text(f"{BODY}[teacher]\n{teacher}\n")


def test_dataset_and_student_name_the_teacher(folder):
    base = mini.mini_backend().digest()
    made_by = LatentDataset(folder / "data").manifest()["base"]
    _, description = read_lora(folder / "run" / "student.safetensors")
    assert description["teacher"] == "the model with tuned.safetensors" and description["base"] == base
    assert made_by == description["config"]["teacher"] and made_by.startswith(f"{base}+")


def test_another_teacher_does_not_go_on_with_the_run(folder, tmp_path, capsys):
    (tmp_path / "c.toml").write_text(BODY.replace("steps = 1\n", "steps = 2\n"))
    command = ["train", str(tmp_path / "c.toml"), "--data", str(folder / "data"), "--out", str(folder / "run")]
    assert main(command) == 2
    assert "[teacher] path or lora" in capsys.readouterr().err


@pytest.mark.parametrize(
    "config, message",
    [
        (f'method = "tune"\n{BODY}[teacher]\npath = "mini"\n', "its own teacher"),
        (f'{BODY}[teacher]\npath = "/none/such"\n', "[teacher] path: /none/such is not a folder"),
    ],
)
def test_teachers_that_cannot_be_are_refused(folder, tmp_path, capsys, config, message):
    (tmp_path / "c.toml").write_text(config)
    command = ["train", str(tmp_path / "c.toml"), "--data", str(folder / "data"), "--out", str(tmp_path / "run")]
    assert main(command) == 2 and message in capsys.readouterr().err


def test_a_plan_counts_what_teaches(folder, tmp_path):
    sizes = {}
    lines = {"none": "", "lora": f'lora = "{folder}/tuned.safetensors"', "wide": f'path = "{folder}/wide"'}
    for which, line in lines.items():
        write(tmp_path, line)
        sizes[which] = plan_of(load_config(tmp_path / "c.toml"), card=False).parts["model"]
    wide = sum(p.numel() for p in SD3Transformer2DModel.from_pretrained(folder / "wide").parameters()) * 4
    assert sizes["wide"] - sizes["none"] == pytest.approx(wide, rel=0.02)
    assert 0 < sizes["lora"] - sizes["none"] < 0.2 * sizes["none"]

import hashlib

import pytest
import torch
from networks import METRIC_WIDTHS, build_metric, build_trunk_state
from safetensors.torch import load_file, save_file

from distill_core.diffusion.noise import ItemNoise
from distill_core.perceptual import load_metric
from distill_core.perceptual.trunk import TrunkConfig
from distill_core.perceptual.weights import SPACES, LatentSpace, arrange, convert_published, save_weights

WIDTHS = (64, 128, 256, 512, 512)
TORCHVISION = [0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40]  # indices of VGG16-BN's convolutions
SLICE_ENDS = [7, 14, 24, 34, 44]


def latents():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, 8, 8, generator=g) for _ in range(2)]


def saved(tmp_path):
    state, heads = build_trunk_state(4)
    path = tmp_path / "metric.safetensors"
    save_weights(path, state, heads, LatentSpace(4, 0.18215, 0.1), {"steps": 3})
    return path


def published(channels, widths, layout="slices", seed=0):
    """A state dict laid out as LPIPS-type packages do it, and the same numbers in our layout."""
    ours, heads = build_trunk_state(channels, widths, seed)
    state = {}
    for layer, index in enumerate(TORCHVISION):
        prefix = "features." if layout == "features" else f"net.slice{1 + sum(index >= end for end in SLICE_ENDS)}."
        for kind, offset in (("convs", 0), ("norms", 1)):
            for name, value in ours.items():
                if name.startswith(f"{kind}.{layer}."):
                    state[f"{prefix}{index + offset}.{name.split('.')[-1]}"] = value
    for i, head in enumerate(heads):
        state[f"lin{i}.model.1.weight"] = head.view(1, -1, 1, 1)
        if layout == "slices":
            state[f"lins.{i}.model.1.weight"] = head.view(1, -1, 1, 1)
    return dict(reversed(state.items())), ours, heads


def test_a_file_gives_the_same_metric_and_its_latent_space(tmp_path):
    metric = load_metric(saved(tmp_path), preset="b", draws=2, l1=0.5)
    assert (metric.preset, metric.draws, metric.l1, metric.scale, metric.shift) == ("b", 2, 0.5, 0.18215, 0.1)
    a, b = latents()
    expected = build_metric(preset="b", draws=2, l1=0.5)(a, b, ItemNoise(0, range(2)))
    assert torch.equal(metric(a, b, ItemNoise(0, range(2))), expected)


def test_a_changed_file_is_refused(tmp_path):
    path = saved(tmp_path)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["heads.2"][0] += 1e-3
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match="is damaged"):
        load_metric(path)


def test_other_files_are_refused(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="no E-LatentLPIPS weights"):
        load_metric(tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="there is no file"):
        load_metric(tmp_path / "absent.safetensors")
    for name in ("sd15.pth", "sd15_latent_vgg16.pth.tar"):
        with pytest.raises(ValueError, match="perceptual convert"):
            load_metric(tmp_path / name)


@pytest.mark.parametrize("layout", ["slices", "features"])
def test_layers_are_found_whatever_their_names(layout):
    state, ours, heads = published(4, METRIC_WIDTHS, layout)
    trunk, found = arrange(state, TrunkConfig(4, METRIC_WIDTHS))
    assert all(torch.equal(trunk[name], ours[name]) for name in trunk) and len(trunk) == 13 * 6
    assert all(torch.equal(a, b) for a, b in zip(found, heads, strict=True))


@pytest.mark.parametrize("model", ["sd15", "flux"])
def test_a_published_checkpoint_of_full_width_is_converted_once(tmp_path, model):
    channels = SPACES[model].channels
    state, _, _ = published(channels, WIDTHS)
    state["lin2.model.1.weight"] = state["lins.2.model.1.weight"] = state["lin2.model.1.weight"] - 0.01
    source, out = tmp_path / "published.pth", tmp_path / "ours.safetensors"
    torch.save({"state_dict": state}, source)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    found = convert_published([source], model, out, digest)
    assert found["source_sha256"] == digest and found["negative_head_weights_clamped"] > 0
    metric = load_metric(out, preset="none")
    assert metric.channels == channels and (metric.scale, metric.shift) == (SPACES[model].scale, SPACES[model].shift)
    x = torch.randn(1, channels, 8, 8)
    assert metric(x, x + 0.1).item() > 0


def test_conversion_refuses_what_it_should(tmp_path):
    state, _, _ = published(4, METRIC_WIDTHS)
    narrow, out = tmp_path / "narrow.pth", tmp_path / "out.safetensors"
    torch.save(state, narrow)
    with pytest.raises(ValueError, match="not a checkpoint of a VGG16-BN metric for 4-channel latents: found 13"):
        convert_published([narrow], "sd15", out)
    with pytest.raises(ValueError, match="not the expected 00"):
        convert_published([narrow], "sd15", out, "00")
    with pytest.raises(ValueError, match="model must be one of"):
        convert_published([narrow], "sd9", out)
    with pytest.raises(ValueError, match="cannot be read"):
        convert_published([tmp_path / "absent.pth"], "sd15", out)
    assert not out.exists()


class Malicious:
    def __reduce__(self):
        return print, ("code of the file was run",)


def test_code_in_a_pickle_is_not_run(tmp_path, capsys):
    torch.save({"lin0": Malicious()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="not a file of plain tensors"):
        convert_published([tmp_path / "evil.pth"], "sd15", tmp_path / "out.safetensors")
    assert "code of the file" not in capsys.readouterr().out


@pytest.mark.case("methods A1", "of the published pair the file that holds trunk and heads is used alone, in any order")
@pytest.mark.parametrize("first", [0, 1])
def test_the_published_pair_is_the_whole_file_and_its_trunk(tmp_path, first):
    whole, _, _ = published(4, WIDTHS)
    begun, _, _ = published(4, WIDTHS, "features", seed=1)
    trunk = {f"module.{name}": value for name, value in begun.items() if name.startswith("features")}
    names = [tmp_path / "sd15_latent_vgg16.pth.tar", tmp_path / "sd15_latest_vgg16_tuned.pth"]
    torch.save({"state_dict": trunk, "best_acc1": 1.0}, names[0])
    torch.save(whole, names[1])
    pair, alone = tmp_path / "pair.safetensors", tmp_path / "alone.safetensors"
    found = convert_published([names[first], names[1 - first]], "sd15", pair)
    assert found == convert_published([names[1]], "sd15", alone)
    assert all(torch.equal(value, load_file(pair)[name]) for name, value in load_file(alone).items())
    heads = {name: value for name, value in whole.items() if name.startswith("lin")}
    torch.save(heads, names[1])  # and where the heads have a file of their own, the two are one metric
    convert_published([names[first], names[1 - first]], "sd15", pair)
    assert torch.equal(load_file(pair)["trunk.convs.3.weight"], trunk["module.features.10.weight"])


@pytest.mark.case("methods A2", "a .pth.tar given as a metric is told to be converted, not to be damaged")
@pytest.mark.case("methods A3", "a network that pools elsewhere has the same shapes and other numbers, and is refused")
def test_a_network_that_pools_elsewhere_is_refused():
    state, _, _ = published(4, METRIC_WIDTHS)
    moved = {}
    for name, value in state.items():  # one max-pool fewer before slice 4: all that follows counts one less
        parts = name.split(".")
        later = parts[0] == "net" and int(parts[2]) >= 24
        moved[".".join([*parts[:2], str(int(parts[2]) - 1), *parts[3:]]) if later else name] = value
    with pytest.raises(ValueError, match="another network: its convolutions are numbered .* 23"):
        arrange(moved, TrunkConfig(4, METRIC_WIDTHS))

import json

import pytest
import torch
from scipy.stats import spearmanr

from distill_core.diffusion.noise import ItemNoise
from distill_core.perceptual.autoencoders import open_autoencoder
from distill_core.perceptual.calibration import CalibrationConfig, spearman, train_metric
from distill_core.perceptual.distortions import IN_LATENTS, IN_PIXELS, UNSEEN
from distill_core.perceptual.images import Images, open_images
from distill_core.perceptual.pairs import KINDS, SIZE, Pairs, cached_pairs, kind_of, make_pairs
from distill_core.perceptual.pixel import PIXEL_DISTANCES

WIDTHS = (4, 4, 6, 6, 8)


def pictures(count=3, height=32, width=32, seed=0):
    """Smooth random images in [-1, 1]."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 5, generator=g) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")


def image_folder(path, count=30, classes=2):
    from PIL import Image

    for i, picture in enumerate(pictures(count, 40, 48)):
        folder = path / f"class{i % classes}" if classes else path
        folder.mkdir(exist_ok=True, parents=True)
        pixels = ((picture + 1) * 127.5).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return path


def toy_pairs(count=64, seed=0):
    """The distance is the size of the difference; the class is the sign of the first channel."""
    g = torch.Generator().manual_seed(seed)
    reference = torch.randn(count, 4, 8, 8, generator=g)
    strength = torch.rand(count, generator=g)
    label = torch.randint(2, (count,), generator=g)
    reference[:, 0] += (2.0 * label - 1).view(-1, 1, 1)
    distorted = reference + strength.view(-1, 1, 1, 1) * torch.randn(reference.shape, generator=g)
    return Pairs(reference, distorted, strength, torch.zeros(count).long(), label)


@pytest.mark.parametrize("name", IN_PIXELS)
@pytest.mark.parametrize("height, width", [(32, 32), (33, 50)])
def test_a_distortion_grows_with_its_strength(name, height, width):
    x = pictures(3, height, width)
    weak, strong = (IN_PIXELS[name](x, torch.full((3,), strength), ItemNoise(0, range(3))) for strength in (0.05, 0.9))
    assert weak.shape == strong.shape == x.shape and torch.isfinite(strong).all()
    error = [(y - x).square().mean((1, 2, 3)) for y in (weak, strong)]
    assert (error[1] > error[0]).all() and (error[1] > 1e-5).all()


@pytest.mark.parametrize("name", [name for name in {**IN_PIXELS, **IN_LATENTS} if not name.endswith("blend")])
def test_an_items_distortion_depends_on_its_seed_alone(name):
    distort, x = {**IN_PIXELS, **IN_LATENTS}[name], pictures(3)
    strength = torch.tensor([0.3, 0.6, 0.9])
    whole = distort(x, strength, ItemNoise(5, range(3)))
    for i in range(3):
        alone = distort(x[i : i + 1], strength[i : i + 1], ItemNoise(5, [i]))
        torch.testing.assert_close(whole[i : i + 1], alone, rtol=0, atol=1e-5)


def test_training_sees_every_kind_but_the_unseen():
    trained = {kind for n in range(60) for kind in kind_of(n, unseen=False) if kind}
    assert trained == set(KINDS) - set(UNSEEN)
    assert {kind_of(n, unseen=True)[0] for n in range(len(KINDS))} == set(KINDS)


@pytest.fixture(scope="module")
def autoencoder():
    return open_autoencoder("mini")


def squared(a, b):
    return (a - b).square().mean((1, 2, 3))


def test_pairs_come_from_their_seed_and_keep_image_latent_and_distance_together(autoencoder):
    stock = pictures(40, 64, 64)
    images = Images(40, lambda pick: stock[list(pick)], torch.arange(40))
    seen = []

    def distance(a, b):
        seen.append((a, b))
        return squared(a, b)

    for number in (0, list(kind_of(n, True)[0] for n in range(14)).index("latent_noise")):
        first = make_pairs(images, autoencoder, distance, 3, number, unseen=True)
        again = make_pairs(images, autoencoder, distance, 3, number, unseen=True)
        other = make_pairs(images, autoencoder, distance, 4, number, unseen=True)
        for name, value in vars(first).items():
            assert torch.equal(value, getattr(again, name)), name
        assert not torch.equal(first.distorted, other.distorted)
        assert len(first) == SIZE and len(first.label.unique()) == SIZE
    a, b = seen[0]  # a distortion of pixels: the latents are those of the two images
    noise = make_pairs(images, autoencoder, distance, 3, 0, unseen=True)
    torch.testing.assert_close(noise.reference, autoencoder.encode(a))
    torch.testing.assert_close(noise.distorted, autoencoder.encode(b))
    torch.testing.assert_close(a, stock[noise.label])
    a, b = seen[3]  # a distortion of latents: the images are those of the two latents
    torch.testing.assert_close(b, autoencoder.decode(first.distorted))


def test_a_stopped_gathering_goes_on(tmp_path):
    calls = []

    def make(number):
        calls.append(number)
        return Pairs(*(torch.full((SIZE,), float(number)) for _ in range(5)))

    gathering = cached_pairs(tmp_path, 3 * SIZE, make)
    next(gathering), next(gathering)
    *_, pairs = cached_pairs(tmp_path, 3 * SIZE, make)
    assert calls == [0, 1, 2] and pairs.distance.tolist() == [0.0] * SIZE + [1.0] * SIZE + [2.0] * SIZE


def run(pairs, config, folder, stop=None):
    for state in train_metric(pairs, config, folder):
        if state[0] == stop:
            break
    return state[1:]


def test_it_learns_and_keeps_the_heads_at_0_or_above(tmp_path):
    config = CalibrationConfig(WIDTHS, steps=60, batch_size=16, lr=1e-2)
    first, _ = run(toy_pairs(), config, tmp_path / "first", stop=1)
    last, learner = run(toy_pairs(), config, tmp_path / "all")
    assert last["regression"] < 0.5 * first["regression"] and last["classes"] < first["classes"]
    assert all((head >= 0).all() for head in learner.heads)
    held_out = toy_pairs(seed=1)
    distance, _ = learner.eval()(held_out.reference, held_out.distorted)
    assert spearman(distance.detach(), held_out.distance) > 0.6


def test_a_resumed_training_ends_with_the_weights_of_an_uninterrupted_one(tmp_path):
    config = CalibrationConfig(WIDTHS, steps=8, batch_size=4, save_every=3)
    _, whole = run(toy_pairs(), config, tmp_path / "whole")
    run(toy_pairs(), config, tmp_path / "parts", stop=5)
    _, resumed = run(toy_pairs(), config, tmp_path / "parts")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    with pytest.raises(ValueError, match="other settings"):
        run(toy_pairs(), CalibrationConfig(WIDTHS, steps=9), tmp_path / "parts")


def test_without_classes_only_the_distance_is_learnt(tmp_path):
    pairs = toy_pairs()
    pairs = Pairs(pairs.reference, pairs.distorted, pairs.distance, pairs.kind, torch.full((64,), -1))
    losses, _ = run(pairs, CalibrationConfig(WIDTHS, steps=2, batch_size=4), tmp_path)
    assert losses.keys() == {"regression"}


def test_spearman_is_scipys():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(50, generator=g), torch.randn(50, generator=g)
    assert spearman(a, a + b) == pytest.approx(spearmanr(a, a + b).statistic)


def test_a_folder_of_pictures_is_split_and_its_subfolders_are_classes(tmp_path):
    train, test = open_images(image_folder(tmp_path / "two"), 32, seed=0)
    assert (train.count, test.count) == (27, 3) and set(train.labels.tolist()) == {0, 1}
    assert train.read([0, 5]).shape == (2, 3, 32, 32) and train.read([0]).abs().max() <= 1
    both = torch.cat([train.read(range(27)), test.read(range(3))]).flatten(1)
    assert len(both.unique(dim=0)) == 30, "no picture is in both parts"
    assert open_images(image_folder(tmp_path / "flat", classes=0), 32, 0)[0].labels is None
    with pytest.raises(ValueError, match="holds 0 pictures"):
        open_images(tmp_path / "absent", 32, 0)


def test_the_image_network_gives_a_distance():
    distance = PIXEL_DISTANCES["efficientnet"]()
    x = pictures(2, 64, 64)
    small, large = distance(x, x + 0.02), distance(x, x + 0.5 * torch.randn_like(x))
    assert torch.equal(distance(x, x), torch.zeros(2)) and (0 < small).all() and (small < large).all()
    assert [tap.shape[-1] for tap in distance.taps(x)] == [32, 32, 16, 8, 4, 2]


def test_the_shipped_metric_ranks_pairs_of_pictures_it_never_saw(autoencoder):
    """Pictures that the mini teacher draws, distorted: nearer to the pixel network's order than latent MSE is."""
    from distill_core.experiments import demo
    from distill_core.models import mini
    from distill_core.models.denoiser import Denoiser, Guided
    from distill_core.perceptual import load_metric
    from distill_core.perceptual.weights import SHIPPED

    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) < 3e6
    recorded = json.loads((SHIPPED / "training.json").read_text())["spearman"]
    assert recorded["LatentLPIPS"]["all"] >= 0.8 and recorded["E-LatentLPIPS bg, 4 draws"]["all"] >= 0.8
    classes, empty = demo.mini_conditioning()
    teacher = Guided(Denoiser(demo.mini_backend()), empty, mini.GUIDANCE)
    drawn = autoencoder.decode(demo.draw_samples(teacher, 8, "euler", 1, 40, classes))
    images, distance = Images(40, lambda pick: drawn[list(pick)], None), PIXEL_DISTANCES["efficientnet"]()
    parts = [make_pairs(images, autoencoder, distance, 77, n, unseen=True) for n in (0, 2, 4, 5, 8, 10)]
    pairs = Pairs(*(torch.cat([getattr(p, name) for p in parts]) for name in vars(parts[0])))
    ours = spearman(load_metric(preset="none")(pairs.distorted, pairs.reference), pairs.distance)
    assert ours > 0.8 and ours > spearman(squared(pairs.distorted, pairs.reference), pairs.distance) + 0.03


def test_lpips_is_asked_for_by_name():
    with pytest.raises(ValueError, match="pip install lpips"):
        PIXEL_DISTANCES["lpips-vgg"]()

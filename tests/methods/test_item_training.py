"""Training on items with tensors of their own: real networks with more input channels than their latents have."""

from __future__ import annotations

import pytest
import torch
from networks import build_cond, randomise_path

from distill_core.data.dataset import Batch, LatentDataset
from distill_core.data.real import save_latents
from distill_core.diffusion.noise import ItemNoise
from distill_core.lora_files import read_lora
from distill_core.methods.components import Components, DiscriminatorConfig
from distill_core.methods.diffusion2gan import Diffusion2GANConfig
from distill_core.methods.dmd2 import DMD2Config
from distill_core.methods.ladd import LADDConfig
from distill_core.methods.registry import new_method
from distill_core.training.figures import Figures
from distill_core.training.loop import Run, TrainConfig, accumulate, train
from distill_core.training.preflight import preflight
from distill_core.training.run import RunConfig, StudentConfig, train_to_end
from distill_core.training.run_folder import RunFolder

# Family, channels of the latent, of the input, and the names of what is beside it.
NETWORKS = {
    "sd15 inpainting": ("unet", 4, 9, ("inpaint_mask", "masked_image")),
    "sd3 inpainting": ("sd3", 16, 33, ("inpaint_mask", "masked_image")),
    "instruct-pix2pix": ("unet", 4, 8, ("source_image",)),
    "flux fill": ("flux", 4, 72, ("masked_image", "pixel_mask")),
    "flux kontext": ("flux", 4, 4, ("reference_image",)),
}
SIZE = (4, 6)


@pytest.fixture(params=NETWORKS, scope="module")
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def dataset(kind, tmp_path_factory) -> LatentDataset:
    _, channels, _, names = NETWORKS[kind]
    g, count, folder = torch.Generator().manual_seed(0), 8, tmp_path_factory.mktemp("data")
    conds, empty = build_cond(count), build_cond(1, seed=9)
    every = {
        "inpaint_mask": (torch.rand(count, 1, *SIZE, generator=g) > 0.5).float(),
        "masked_image": torch.randn(count, channels, *SIZE, generator=g),
        "source_image": torch.randn(count, channels, *SIZE, generator=g),
        "reference_image": torch.randn(count, channels, SIZE[0], SIZE[1] + 2, generator=g),
        "pixel_mask": (torch.rand(count, 64, *SIZE, generator=g) > 0.5).float(),
    }
    conds = conds.with_items({name: every[name] for name in names})
    latents = [torch.randn(channels, *SIZE, generator=g) for _ in range(count)]
    save_latents(latents, [conds[[i]] for i in range(count)], empty, folder)
    return LatentDataset(folder)


@pytest.fixture
def make_method(kind, dataset, make_backend):
    """make_method(rank=2, method=LADDConfig, **config) -> it at the model's highest level, its LoRA not 0."""
    family, channels, inputs, names = NETWORKS[kind]

    def make(rank: int = 2, method=LADDConfig, **config):
        values = 4 if family == "flux" else 1  # of a channel that are channels of the network's
        backend = make_backend(family, in_channels=values * inputs, out_channels=values * channels)
        backend.items = names  # which the network of FLUX.1 Kontext does not tell
        settings = {"terms": {"adversarial": 1.0, "denoising": 0.5}, "warmup_steps": 0, **config}
        config = method(student_sigmas=(backend.process.sigma_max,), **settings)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            method = new_method(
                config,
                Components(backend),
                dataset.batch(0, 2, 0),
                rank,
                uncond=dataset.uncond(),
                guidance=3.0,
                discriminator=DiscriminatorConfig(width=8, blocks=1),
            )
        if rank:
            randomise_path(method.student.lora)
        return method

    return make


def test_the_students_gradient_is_that_of_differences(make_method, dataset, float64_rotary_embedding):
    method, batch = make_method(terms={"adversarial": 1.0}), dataset.batch(0, 4, 0)  # others round to float32
    method.student.backend.network.double()
    method.student.lora.double()
    method.discriminator.double()
    batch = Batch(batch.latents.double(), batch.cond.to(dtype=torch.float64))
    parameters = list(method.student.trainable().values())

    def loss() -> torch.Tensor:
        value, _ = method.generator_loss(method.start(batch, ItemNoise(3, range(4)), 0))
        return value

    gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
    g = torch.Generator().manual_seed(1)
    way = [torch.randn(p.shape, generator=g, dtype=torch.float64) for p in parameters]
    along = sum((a * b).sum() for a, b in zip(gradients, way, strict=True) if a is not None)
    values, step = [], 1e-5
    with torch.no_grad():
        for sign in (1, -1):
            for p, direction in zip(parameters, way, strict=True):
                p.add_(sign * step * direction)
            values.append(loss())
            for p, direction in zip(parameters, way, strict=True):
                p.sub_(sign * step * direction)
    difference = (values[0] - values[1]) / (2 * step)
    assert abs(difference) > 1e-4 and abs(along - difference) < 1e-3 * abs(difference)


def test_student_and_discriminator_see_the_items_of_their_row(make_method, dataset, kind):
    """Other per-item tensors in row 1 change row 1 of the student's answer and of the features, and no other."""
    method, batch, (*_, names) = make_method(), dataset.batch(0, 3, 0), NETWORKS[kind]
    changed = {name: value.clone() for name, value in batch.cond.extra.items()}
    for name in names:
        changed[name][1] = 1 - changed[name][1]
    other = Batch(batch.latents, batch.cond.with_items(changed))
    with torch.no_grad():
        steps = [method.start(b, ItemNoise(3, range(3)), 0) for b in (batch, other)]
        fake = steps[0].fake
        pairs = [[step.fake for step in steps]]
        for step in steps:
            step.fake = fake  # the same result is judged
        pairs += zip(*(step.fake_maps for step in steps), strict=True)
        pairs += zip(*(step.real_maps for step in steps), strict=True)
    for a, b in pairs:
        same = [torch.allclose(a[row], b[row], atol=1e-5) for row in range(3)]
        assert same == [True, False, True]


def test_accumulated_and_shared_batches_have_the_gradient_of_one_large_batch(make_method, dataset):
    whole, randoms = dataset.batch(0, 4, 0), [ItemNoise(3, range(4)), *(ItemNoise(3, range(i, i + 2)) for i in (0, 2))]
    halves = [dataset.batch(0, 4, 0, part) for part in ((0, 2), (1, 2))]
    gradients = []
    for parts in ([(whole, randoms[0])], list(zip(halves, randoms[1:], strict=True))):
        method = make_method()
        for batch, random in parts:
            (method.generator_loss(method.start(batch, random, 0))[0] / len(parts)).backward(
                inputs=list(method.student.trainable().values())
            )
        gradients.append(
            torch.cat([p.grad.flatten() for p in method.student.trainable().values() if p.grad is not None])
        )
    assert gradients[0].abs().max() > 1e-6
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("rank", [2, 0], ids=["LoRA", "all weights"])
def test_steps_train_and_the_student_is_saved(make_method, dataset, tmp_path, rank):
    """The guided teacher (consistency, distillation) and dropped captions are among what is trained."""
    terms = {"adversarial": 1.0, "distillation": 2.5, "consistency": 1.0, "denoising": 0.5}
    method = make_method(rank, terms=terms, consistency_levels=4)
    settings = TrainConfig(steps=2, batch_size=4, caption_dropout=0.5, checkpoint_every=1, sample_every=1)
    identities = {"base": method.student.backend.digest(), "dataset": dataset.digest()}
    config = RunConfig(method.config, settings, StudentConfig(rank), identities)
    run = Run(method, dataset, settings, tmp_path, config.description())
    before = {name: value.detach().clone() for name, value in run.student_parameters.items()}
    file = tmp_path / "student.safetensors"
    train_to_end(run, config, RunFolder(tmp_path), file)
    assert any(not torch.equal(before[name], value) for name, value in run.student_parameters.items())
    state, description = read_lora(file)
    assert state and all(value.isfinite().all() for value in state.values()) and description["steps"] == 2
    if rank:
        backend = method.student.backend
        again = backend.export(backend.open_lora(state))
        with run.ema_weights():
            trained = backend.export(method.student.lora)
        assert again.keys() == trained.keys() and all(torch.equal(again[name], trained[name]) for name in trained)


def test_a_stopped_run_goes_on_bit_for_bit(make_method, dataset, tmp_path):
    settings = dict(batch_size=4, caption_dropout=0.5, accumulation=2)
    ends = []
    for stops in ((2,), (1, 2)):
        folder = tmp_path / str(len(stops))
        for steps in stops:
            run = Run(make_method(), dataset, TrainConfig(steps=steps, **settings), folder)
            list(train(run))
        ends.append(run.ema)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_discriminator_learns_from_the_same_features(make_method, dataset):
    method = make_method()
    run = Run(method, dataset, TrainConfig(steps=1, batch_size=4))
    step, figures = method.start(*run.batch(0), 0), Figures()
    assert all(accumulate(run, player, step, figures) for player in run.players)
    assert all(p.grad is not None for p in method.discriminator.parameters())


@pytest.mark.parametrize(
    ("method", "terms"),
    [
        (DMD2Config, {"adversarial": 1.0, "distribution_matching": 1.0}),
        (Diffusion2GANConfig, {"adversarial": 1.0, "consistency": 1.0}),
    ],
    ids=["DMD2", "Diffusion2GAN"],
)
def test_the_networks_that_other_methods_add_see_the_items_too(make_method, dataset, method, terms):
    """The fake score and a discriminator on a copy of the network."""
    run = Run(make_method(method=method, terms=terms), dataset, TrainConfig(steps=1, batch_size=4))
    before = [[p.detach().clone() for p in player.parameters.values()] for player in run.players]
    list(train(run))
    for old, player in zip(before, run.players, strict=True):
        assert any(not torch.equal(a, b) for a, b in zip(old, player.parameters.values(), strict=True)), player.name


def test_preflight_asks_the_network_with_its_items(make_method, dataset):
    """The tiny teacher knows no pictures, and that is what it is told; not that tensors are missing."""
    run = Run(make_method(), dataset, TrainConfig(steps=1, batch_size=4))
    with pytest.raises(ValueError, match="the teacher"):
        preflight(run)

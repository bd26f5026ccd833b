import math

import pytest
import torch
from card import Card
from networks import LATENT, build_cond, build_metric, build_network
from toy import LEVELS, TERMS, cache_toy, toy_run

from distill_core.devices import Table, pick, put, upload
from distill_core.diffusion.noise import ItemNoise
from distill_core.methods.add import ADD, ADDConfig
from distill_core.methods.diffusion2gan import Diffusion2GANConfig
from distill_core.methods.ladd import LADDConfig
from distill_core.methods.tune import TuneConfig
from distill_core.models.backends.diffusers import DiffusersBackend
from distill_core.models.denoiser import Denoiser
from distill_core.perceptual.transforms import LOW_PASS
from distill_core.training.figures import Figures
from distill_core.training.loop import training_step


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return cache_toy(tmp_path_factory.mktemp("data"))


def test_figures_are_read_together_and_keep_their_order():
    figures = Figures()
    figures.add({"a": torch.tensor(0.1), "b": torch.tensor(2.0, dtype=torch.bfloat16)})
    figures.require_finite("first", torch.tensor(1.0))
    figures.add({"a": torch.tensor(math.nan)})
    figures.require_finite("second", torch.tensor(math.inf))
    figures.require_finite("third", torch.tensor(math.nan))
    assert not figures.logs and figures.read() == ["second", "third"] and figures.read() == []
    assert figures.logs["a"][0] == torch.tensor(0.1).item() and math.isnan(figures.logs["a"][1])
    assert figures.logs["b"] == [2.0] and figures.logs.keys() == {"a", "b"}


KINDS = {
    **TERMS,
    "all terms": LADDConfig(
        {"adversarial": 1.0, "pairs": 1.0, "consistency": 0.5, "denoising": 0.5}, own_share=0.5, approximate_r1=0.1
    ),
    "distillation": ADDConfig({"adversarial": 1.0, "distillation": 1.0}, weighting="nfsd", teacher_steps=2),
    "gradient": Diffusion2GANConfig(r1=0.1, r1_every=1, r1_by="gradient"),
    "tune": TuneConfig(
        {
            "adversarial": 1.0,
            "denoising": 1.0,
            "reconstruction": 1.0,
            "keep": 1.0,
            "consistency": 1.0,
            "agreement": 1.0,
        },
        student_sigmas=LEVELS,
        adversarial_on="both",
        augment=("translation", "cutout", "flip"),
    ),
}


def on_the_card(run):
    """What has been there since before the step."""
    for player in run.players:
        yield from (*player.parameters.values(), *player.buffers.values())
        for state in run.optimizers[player.name].state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor) and value.ndim)
    yield from (*run.ema.values(), *run.method.guided_teacher.uncond.tensors().values())
    yield from run.method.teacher.backend.network.parameters()
    if isinstance(run.method, ADD):
        yield from run.method.vision.network.parameters()
        yield from run.method.decode.__closure__[0].cell_contents.parameters()


def waits_of(run):
    training_step(run)  # the optimizers have their state then
    run.step += 1
    with Card(on_the_card(run)) as card:
        training_step(run)
    return card


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("updates", [1, 3])
def test_a_step_waits_for_the_device_once_for_each_update(dataset, kind, updates):
    """It reads its figures, and nothing else; nothing is sent there by a copy that waits."""
    card = waits_of(toy_run(dataset, ladd=KINDS[kind], accumulation=2, discriminator_updates=updates))
    assert card.waits == {"tolist": updates} and card.sent > 4


def test_the_waits_of_what_may_be_added_to_a_step(dataset):
    """Captions that are dropped, a LoRA's dropout, and batches filled up with repeats of an item."""
    run = toy_run(dataset, ladd=TERMS["diffusion2gan"], batch_size=24, caption_dropout=0.5)
    run.method.student.lora.dropout = 0.25
    assert waits_of(run).waits == {"tolist": 1}


@pytest.mark.parametrize("preset", ["bg", "bgco"])
def test_the_perceptual_distance_waits_for_nothing(preset):
    metric = build_metric(preset=preset)
    x, y = (torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    with Card([x, y, *metric.buffers(), LOW_PASS.values]) as card:
        metric(x.requires_grad_(), y, ItemNoise(0, range(3))).sum().backward()
    assert card.waits == {} and card.sent > 4


SDXL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64}


@pytest.mark.parametrize(
    "family, changes", [("sd3", {}), ("flux", {"guidance_embeds": True}), ("unet", {}), ("unet", SDXL)]
)
def test_a_network_of_diffusers_waits_for_nothing(family, changes):
    """Forward, features and backward, with gradient checkpointing."""
    backend = DiffusersBackend(build_network(family, **changes), gradient_checkpointing=True)
    denoiser, cond = Denoiser(backend, backend.new_lora(2)), build_cond(2, guidance=family == "flux")
    x, sigma = torch.randn(2, *LATENT), torch.full((2,), 0.5)
    denoiser(x, sigma, cond)
    held = [*backend.network.parameters(), *backend.network.buffers(), *denoiser.lora.parameters()]
    held += [table.values for table in vars(backend.process).values() if isinstance(table, Table)]  # sent once
    with Card([x, sigma, *held, cond.context, cond.pooled]) as card:
        found = denoiser(x, sigma, cond)
        maps = Denoiser(backend).features(found, sigma, cond, backend.default_taps(2))
        sum(m.square().mean() for m in maps).backward()
    assert card.waits == {}


def test_the_card_notices_what_waits():
    there, here = torch.randn(4), torch.randn(4)
    with Card([there]) as card:
        there + here
        there[[0, 1]]
        there[there > 0]
        there.sum().item()
        there.cpu()
        here.to(there.device)
        torch.tensor([1.0, 2.0], device=there.device)
        there.new_tensor([1.0])
        assert sum(card.waits.values()) == 8
        there + upload(here, there.device)
        pick(there, [1, 0])
        put(there, [1, 0], there[:2])
        there + torch.arange(4, device=there.device)
        there + there.new_full((1,), 2.0)
        assert sum(card.waits.values()) == 8 and card.sent == 6


def test_what_is_sent_to_a_gpu_comes_from_page_locked_memory(monkeypatch):
    """There is no GPU here: the calls are looked at."""
    calls = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: calls.append("pinned") or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **kwargs: calls.append((args, kwargs)) or self)
    upload(torch.ones(2), "cuda", torch.bfloat16)
    card = torch.device("cuda")
    assert calls == [((torch.bfloat16,), {}), "pinned", ((card,), {"non_blocking": True})]
    calls.clear()
    upload(torch.ones(2), "cpu")
    assert "pinned" not in calls

"""Blocks that are compiled, and convolutions laid out channels last: the same outcome but for the rounding."""

import pytest
import torch
import torch._dynamo
from networks import LATENT, build_cond, build_network, randomise_path
from torch._dynamo.testing import CompileCounterWithBackend

from distill_core.data.dataset import Batch
from distill_core.diffusion.noise import ItemNoise
from distill_core.methods.components import Components
from distill_core.methods.diffusion2gan import Diffusion2GANConfig
from distill_core.methods.registry import new_method
from distill_core.models import compiled
from distill_core.models.backends.diffusers import DiffusersBackend
from distill_core.models.denoiser import Denoiser
from distill_core.models.lora import LoraConfig
from distill_core.models.precision import channels_last
from distill_core.training.loop_config import TrainConfig

TRACED = "aot_eager"  # what compile does, but for the kernels: forward and backward as graphs


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(backend, lora):
    """LADD's loss of the student: its output, and the features of the teacher's view of it."""
    x, sigma, cond = torch.randn(2, *LATENT, generator=torch.Generator().manual_seed(1)), torch.full((2,), 0.5), None
    cond = build_cond(2)
    fake = Denoiser(backend, lora)(x, sigma, cond)
    maps = Denoiser(backend).features(fake, sigma, cond, backend.default_taps(2))
    loss = sum(m.square().mean() for m in maps) + fake.square().mean()
    gradients = torch.autograd.grad(loss, list(lora.parameters()), allow_unused=True)
    return fake.detach(), [g for g in gradients if g is not None]


def assert_alike(found, wanted, tolerance: float = 1e-4):
    torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=tolerance * wanted[0].abs().max().item())
    for a, b in zip(found[1], wanted[1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(b.abs().max().item(), 1e-6))


def test_compiled_blocks_are_the_blocks_and_one_graph_serves_many():
    backend = DiffusersBackend(build_network("sd3", num_layers=4), gradient_checkpointing=True)
    lora = randomise_path(backend.new_lora(2))
    wanted, counter = step(backend, lora), CompileCounterWithBackend(TRACED)
    backend.compile(counter)
    assert_alike(step(backend, lora), wanted)
    graphs = counter.frame_count
    assert graphs <= 6, "a first, a middle and a last block, of the student and of the teacher"
    step(backend, lora)
    assert counter.frame_count == graphs, "nothing is compiled again"


def test_a_penalty_does_without_what_is_compiled(monkeypatch):
    """Diffusion2GAN's R1, through a trained copy of the network: torch compiles no gradient of a gradient."""
    ran = []
    monkeypatch.setattr(torch, "compile", lambda forward, backend: lambda *a, **k: ran.append(1) or forward(*a, **k))
    backend = DiffusersBackend(build_network("unet"), gradient_checkpointing=True)
    backend.compile(TRACED)
    torch.manual_seed(0)
    example = Batch(torch.randn(2, *LATENT), build_cond(2))
    config = Diffusion2GANConfig({"adversarial": 1.0}, critic="copy")
    method = new_method(config, Components(backend), example, 2, uncond=build_cond(1), guidance=1.0)
    assert method.discriminator.backbone.backend.compiled_by == TRACED
    began = method.start(example, ItemNoise(0, range(2)), 0)
    assert ran
    ran.clear()
    weights = [p for p in method.discriminator.trained.parameters() if p.requires_grad]
    torch.autograd.grad(method.single_sample_r1(began), weights, allow_unused=True)
    assert not ran
    method.discriminator_loss(began)
    assert ran


def test_channels_last_is_a_layout():
    backend = DiffusersBackend(build_network("unet"))
    lora = randomise_path(backend.new_lora(2))
    wanted = step(backend, lora)
    channels_last(backend.network)
    wide = [p for p in backend.network.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    assert wide and all(p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous() for p in wide)
    assert_alike(step(backend, lora), wanted)


def test_what_cannot_be_compiled_is_refused(monkeypatch):
    backend = DiffusersBackend(build_network("sd3"))
    with monkeypatch.context() as patched:
        patched.setattr(compiled.shutil, "which", lambda name: None)
        with pytest.raises(ValueError, match="needs a C.. compiler, and there is none"):
            backend.compile()
        backend.compile("eager")  # which needs none
    with monkeypatch.context() as patched:
        patched.setattr(compiled.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ValueError, match="needs the package triton"):
            compiled.check_compilable(backend.network, torch.device("cuda"))
    layer = backend.network.transformer_blocks[0].attn.to_q
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="transformer_blocks.0.attn.to_q.weight is quantized"):
        backend.compile()


@pytest.mark.parametrize("name", ["compile", "channels_last"])
@pytest.mark.parametrize("other", [{"offload": "ram"}, {"shard": True}])
def test_neither_goes_with_weights_that_come_and_go(name, other):
    with pytest.raises(ValueError, match=f"{name} is for weights that stay where they are"):
        TrainConfig(**other, **{name: True})


def test_a_run_is_compiled_and_not_with_dropout(monkeypatch):
    from distill_core.methods.ladd import LADDConfig
    from distill_core.models import mini
    from distill_core.models.pipelines import MiniSource, ModelConfig
    from distill_core.training.plan import Shapes
    from distill_core.training.run import RunConfig, StudentConfig, assemble

    asked = []
    monkeypatch.setattr(DiffusersBackend, "compile", lambda self: asked.append(self))
    source = MiniSource(ModelConfig())
    shapes = Shapes(mini.LATENT_SHAPE, source.encode(["bag"])[0], (), 2.0)
    train = TrainConfig(batch_size=2, compile=True, channels_last=True)

    def made(lora):
        config = RunConfig(LADDConfig(), train, StudentConfig(4, lora=lora), {"base": "", "dataset": ""})
        return assemble(config, Components(source.backend), shapes)

    made(LoraConfig())
    assert asked == [source.backend]
    with pytest.raises(ValueError, match="compile goes with no dropout"):
        made(LoraConfig(dropout=0.1))

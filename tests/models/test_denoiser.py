"""The views of a backbone, and the gradient that a generator step sends through both of them."""

import pytest
import torch

from distill_core.diffusion.process import expand_like
from distill_core.discriminators.latent import LatentDiscriminator
from distill_core.models.denoiser import Cond, Denoiser, Guided, cat_conds


def test_denoised_is_the_process_formula_around_the_backend(family, make_backend, batch):
    backend = make_backend(family)
    x, sigma, cond = batch
    process = backend.process
    output = backend.forward(process.calculate_input(sigma, x), process.timestep(sigma), cond)
    torch.testing.assert_close(Denoiser(backend)(x, sigma, cond), x - expand_like(sigma, x) * output)


def test_different_batch_sizes_are_refused(make_backend, batch):
    backend = make_backend("sd3")
    x, sigma, cond = batch
    for wrong in ((x[:1], sigma, cond), (x, sigma[:1], cond), (x, sigma, cond[:1])):
        with pytest.raises(ValueError, match="batch sizes differ"):
            Denoiser(backend)(*wrong)
        with pytest.raises(ValueError, match="batch sizes differ"):
            Denoiser(backend).features(*wrong, backend.tap_names)


def test_a_half_precision_network_gives_float32_latents(make_backend, batch):
    backend = make_backend("sd3")
    full = Denoiser(backend)(*batch)
    backend.network.to(torch.bfloat16)
    half = Denoiser(backend)(*batch)
    assert half.dtype == torch.float32
    assert 0 < (half - full).abs().max() < 0.1


def test_trainable_is_the_path_or_the_whole_network(make_backend):
    backend = make_backend("sd3")
    path = backend.new_lora(2)
    assert set(Denoiser(backend, path).trainable().values()) == set(path.parameters())
    assert set(Denoiser(backend).trainable()) == dict(backend.network.named_parameters()).keys()


def test_features_are_those_of_the_view(family, make_backend, randomise, batch):
    backend = make_backend(family)
    path, taps = randomise(backend.new_lora(2)), backend.tap_names[:2]
    teacher, student = (Denoiser(backend, p).features(*batch, taps) for p in (None, path))
    assert not any(torch.allclose(a, b, atol=1e-2) for a, b in zip(teacher, student, strict=True))
    with backend.switch.on(path):  # whatever view is on around the call
        again = Denoiser(backend).features(*batch, taps)
    assert all(torch.equal(a, b) for a, b in zip(again, teacher, strict=True))


def test_a_rows_result_does_not_depend_on_its_neighbours(family, make_backend, batch):
    backend = make_backend(family)
    x, sigma, cond = batch
    together = Denoiser(backend)(x, sigma, cond)
    torch.testing.assert_close(Denoiser(backend)(x[1:], sigma[1:], cond[1:]), together[1:], atol=1e-5, rtol=1e-5)


def test_conditioning_rows_moves_and_joins(make_cond):
    cond = make_cond(3, guidance=True)
    assert len(cond) == 3 and len(cond[:2]) == 2 and cond.to(dtype=torch.float64).pooled.dtype == torch.float64
    joined = cat_conds([cond[:1], cond[1:]])
    for name in ("context", "pooled", "guidance"):
        assert torch.equal(getattr(joined, name), getattr(cond, name))
    bare = cat_conds([Cond(cond.context), Cond(cond.context)])
    assert len(bare) == 6 and bare.pooled is None and bare.guidance is None


def test_texts_of_different_lengths_join_with_a_mask(make_cond):
    short, long = make_cond(2), make_cond(1)
    short = Cond(short.context[:, :3], short.pooled)
    both = cat_conds([short, long])
    tokens = long.context.shape[1]
    assert both.context.shape[:2] == (3, tokens) and both.mask.sum(1).tolist() == [3, 3, tokens]
    assert torch.equal(both.context[:2, :3], short.context) and not both.context[:2, 3:].any()
    again = cat_conds([both, long])
    assert again.mask.sum(1).tolist() == [3, 3, tokens, tokens] and cat_conds([long, long]).mask is None


def test_extra_tensors_travel_with_their_rows(make_cond):
    plain = make_cond(2)
    cond = Cond(plain.context, plain.pooled, extra={"reference": torch.arange(2.0)})
    assert Cond.from_tensors(cond.tensors()).extra["reference"].tolist() == [0, 1]
    assert cat_conds([cond[1:], cond]).extra["reference"].tolist() == [1, 0, 1]
    assert cond.to(dtype=torch.float64).extra["reference"].dtype == torch.float64
    with pytest.raises(ValueError, match="only some of them have extra.reference"):
        cat_conds([cond, plain])


def test_a_network_of_diffusers_refuses_padded_texts(make_backend, batch):
    x, sigma, cond = batch
    with pytest.raises(ValueError, match="encode all, the empty one too, to one length"):
        Denoiser(make_backend("sd3"))(x, sigma, cond.padded(cond.context.shape[1] + 2))


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.5])
def test_guidance_extrapolates_from_the_unconditional_output(make_backend, make_cond, batch, scale):
    denoiser = Denoiser(make_backend("sd3"))
    x, sigma, cond = batch
    uncond = make_cond(1, seed=9)
    without = denoiser(x, sigma, cat_conds([uncond, uncond]))
    expected = without + scale * (denoiser(x, sigma, cond) - without)
    torch.testing.assert_close(Guided(denoiser, uncond, scale)(x, sigma, cond), expected, atol=1e-5, rtol=1e-5)


def test_guidance_of_1_runs_the_conditional_branch_alone(make_backend, make_cond, batch):
    backend, rows = make_backend("sd3"), []
    backend.network.register_forward_pre_hook(
        lambda m, a, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    for scale in (1.0, 2.0):
        Guided(Denoiser(backend), make_cond(1), scale)(*batch)
    assert rows == [2, 4]


class GeneratorStep:
    """Mean logit of the discriminator on teacher features of the re-noised student output, in float64."""

    def __init__(self, backend, randomise, batch):
        self.x, self.sigma, cond = batch
        self.x, self.sigma, self.cond = self.x.double(), self.sigma.double(), cond.to(dtype=torch.float64)
        self.backend = backend
        backend.network.double()
        self.path = randomise(backend.new_lora(2)).double()
        self.student, self.teacher = Denoiser(backend, self.path), Denoiser(backend)
        g = torch.Generator().manual_seed(3)
        self.noise = torch.randn(self.x.shape, generator=g, dtype=torch.float64)
        self.time = torch.tensor([0.7, 0.3], dtype=torch.float64)
        self.taps = backend.tap_names[:-1]
        with torch.no_grad():
            channels = [m.shape[1] for m in self.features(self.x)]
        torch.manual_seed(0)
        self.heads = LatentDiscriminator(channels, self.cond.pooled.shape[1], width=16).double()

    def features(self, latent):
        process = self.backend.process
        sigma = process.sigma_at_flow_time(self.time)
        return self.teacher.features(process.noise_scaling(sigma, self.noise, latent), sigma, self.cond, self.taps)

    def loss(self):
        maps = self.features(self.student(self.x, self.sigma, self.cond))
        return self.heads(maps, self.time, self.cond.pooled).mean()

    def gradient(self):
        return torch.autograd.grad(self.loss(), list(self.path.parameters()), allow_unused=True, materialize_grads=True)

    @torch.no_grad()
    def slope(self, direction, h):
        """Central difference of the loss along ``direction``."""
        values = []
        for step in (h, -2 * h, h):  # there, to the other side, and back
            for p, d in zip(self.path.parameters(), direction, strict=True):
                p.add_(step * d)
            values.append(self.loss().item())
        return (values[0] - values[1]) / (2 * h)


def test_generator_gradient_agrees_with_finite_differences(
    family, make_backend, randomise, batch, float64_rotary_embedding
):
    grads = {}
    for checkpointing in (False, True):
        step = GeneratorStep(make_backend(family, gradient_checkpointing=checkpointing), randomise, batch)
        grads[checkpointing] = step.gradient()
        g = torch.Generator().manual_seed(5)
        direction = [torch.randn(p.shape, generator=g, dtype=p.dtype) for p in step.path.parameters()]
        by_gradient = sum((a * b).sum() for a, b in zip(grads[checkpointing], direction, strict=True)).item()
        assert step.slope(direction, h=1e-5) == pytest.approx(by_gradient, rel=1e-4)
        assert abs(by_gradient) > 1e-3
        assert all(p.grad is None for p in step.backend.network.parameters())
    for plain, checkpointed in zip(grads[False], grads[True], strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-9, atol=1e-12)


def test_gradient_checkpointing_really_recomputes_the_blocks(family, make_backend, randomise, batch):
    """Otherwise the agreement above would mean nothing."""
    calls = {}
    for checkpointing in (False, True):
        backend = make_backend(family, gradient_checkpointing=checkpointing)
        path = randomise(backend.new_lora(2))
        layer = backend.network.get_submodule(path.targets[0])
        layer.register_forward_hook(lambda *_, key=checkpointing: calls.update({key: calls.get(key, 0) + 1}))
        Denoiser(backend, path)(*batch).sum().backward()
    assert calls == {False: 1, True: 2}

"""What the student starts as and sees: a LoRA from a file, alpha, dropout, captions left out."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from test_optimizers import differing, finish
from toy import ToyBackend, cache_toy, toy_conds, toy_run

from distill_core.diffusion.noise import ItemNoise
from distill_core.models.denoiser import Cond, Denoiser, without_captions
from distill_core.models.lora import Dropout, LoraConfig
from distill_core.models.lora_start import Part, parts_by_name, start_lora
from distill_core.training.loop import train
from distill_core.training.student import StudentConfig, rank_of_file, start_from


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return cache_toy(tmp_path_factory.mktemp("data"))


# Start from a file


def in_layout(state: dict[str, torch.Tensor], layout: str) -> dict[str, torch.Tensor]:
    """A file of this project in another one's names, with an alpha where that has one."""
    if layout == "own":
        return state
    if layout == "generic":
        return {key.replace("transformer.", "diffusion_model."): value for key, value in state.items()}
    if layout == "peft":
        return {f"base_model.model.{key.replace('transformer.', '')}": value for key, value in state.items()}
    result = {}
    for key, value in state.items():
        name, kind = key.removeprefix("transformer.").rsplit(".lora_", 1)
        flat = "lora_unet_" + name.replace(".", "_")
        down = kind.startswith("A")
        result[f"{flat}.lora_{'down' if down else 'up'}.weight"] = value if down else value * 2
        result[f"{flat}.alpha"] = torch.tensor(1.0)  # of rank 2: a scale of a half
    result["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"] = torch.ones(2, 3)
    return result


@pytest.mark.case("training L8", "a student can start from a LoRA file")
@pytest.mark.parametrize("layout", ["own", "generic", "peft", "kohya"])
@pytest.mark.parametrize("rank, alpha", [(2, 0.0), (5, 0.0), (4, 1.0)])
def test_a_student_starts_as_what_the_file_does(make_backend, randomise, batch, tmp_path, layout, rank, alpha):
    backend = make_backend("sd3")
    before = randomise(backend.new_lora(2), size=0.5)
    path = tmp_path / "some.safetensors"
    save_file(in_layout(backend.export(before), layout), path)
    lora = backend.new_lora(rank)
    lora.configure(LoraConfig(alpha=alpha))
    start_from(backend, lora, path)
    with torch.no_grad():
        wanted, found, plain = (Denoiser(backend, which)(*batch) for which in (before, lora, None))
    torch.testing.assert_close(found, wanted)
    assert (wanted - plain).abs().max() > 0.01 and rank_of_file(path) == 2
    for down, up in zip(lora.down, lora.up, strict=True):
        assert up[:, :2].any() and not up[:, 2:].any() and (rank == 2 or down[2:].any())


def test_a_file_that_does_not_fit_is_refused_by_name(make_backend, randomise, tmp_path):
    backend = make_backend("sd3")
    path = tmp_path / "style.safetensors"
    full = backend.export(randomise(backend.new_lora(4), size=0.5))
    layers = backend.lora_targets()

    def said(state, lora) -> str:
        save_file(state, path)
        with pytest.raises(ValueError, match="start_from: .*style.safetensors") as caught:
            start_from(backend, lora, path)
        return str(caught.value)

    other = {key.replace("transformer_blocks", "double_blocks"): value for key, value in full.items()}
    assert "no layer of style.safetensors is one of this model's; its first layer is" in said(
        other, backend.new_lora(4)
    )
    assert "rank 4" in said(full, backend.new_lora(2)) and "at least 4" in said(full, backend.new_lora(2))
    assert "does not train (first:" in said(full, backend.new_lora(4, layers[:3]))
    wrong = {key: value[:, :3].contiguous() if "lora_A" in key else value for key, value in full.items()}
    assert "another shape" in said(wrong, backend.new_lora(4))
    assert "values that are not finite" in said({k: v * float("nan") for k, v in full.items()}, backend.new_lora(4))
    assert "LoHa" in said({"a.hada_w1_a": torch.ones(2, 2)}, backend.new_lora(4))
    assert not any(up.any() for up in backend.new_lora(4).up)


def test_several_loras_on_the_rows_of_one_layer_become_one():
    """As of q, k and v, which a network may keep in one matrix: the same function, whether they share A or not."""
    backend, g = ToyBackend(), torch.Generator().manual_seed(0)
    layer = "blocks.0.inlet"  # 32 -> 32
    downs, ups = torch.randn(2, 2, 32, generator=g), torch.randn(2, 16, 2, generator=g)
    for shared in (True, False):
        parts = [Part(ups[i], downs[0 if shared else i], 16 * i) for i in range(2)]
        lora = backend.new_lora(2 if shared else 4)
        start_lora(lora, {layer: parts}, [], "x")
        index = lora.targets.index(layer)
        wanted = torch.cat([part.up @ part.down for part in parts])
        torch.testing.assert_close(lora.up[index] @ lora.down[index], wanted)
    with pytest.raises(ValueError, match="rank 4"):
        start_lora(backend.new_lora(2), {layer: parts}, [], "x")


def test_layers_of_a_file_by_their_names():
    names = ["blocks.0.attn.to_q", "blocks.0.ff.net.0.proj"]
    state = {
        "unet.blocks.0.attn.to_q.lora.down.weight": torch.ones(2, 3),
        "unet.blocks.0.attn.to_q.lora.up.weight": torch.ones(4, 2),
    }
    parts, strange = parts_by_name(state, names)
    assert list(parts) == names[:1] and strange == []
    _, strange = parts_by_name({key.replace("to_q", "to_k"): value for key, value in state.items()}, names)
    assert strange == ["unet.blocks.0.attn.to_k"]


def test_all_weights_have_no_alpha_dropout_or_start():
    for changes in ({"alpha": 4.0}, {"dropout": 0.1}, {"start_from": "x.safetensors"}):
        with pytest.raises(ValueError, match="of a LoRA"):
            StudentConfig(rank=0, lora=LoraConfig(**changes))


# Alpha and dropout


def test_alpha_scales_the_lora(make_backend, randomise, batch):
    backend = make_backend("sd3")
    lora = randomise(backend.new_lora(4), size=0.2)
    plain, student = Denoiser(backend), Denoiser(backend, lora)
    weights = [up.detach().clone() for up in lora.up]
    with torch.no_grad():
        lora.configure(LoraConfig(alpha=2.0))
        halved = student(*batch)
        lora.configure(LoraConfig())
        for up, before in zip(lora.up, weights, strict=True):
            up.copy_(before / 2)
        torch.testing.assert_close(student(*batch), halved)
    assert (halved - plain(*batch)).abs().max() > 1e-3


def dropping_run(dataset, folder=None, share: float = 0.3, **changes):
    run = toy_run(dataset, folder, **changes)
    run.method.student.lora.configure(LoraConfig(dropout=share))
    return run


def test_a_run_with_dropout_resumes_bit_equal_and_is_another_than_without(dataset, tmp_path):
    whole = finish(dropping_run(dataset))
    for event in train(dropping_run(dataset, tmp_path)):
        if event.step == 2:
            break
    assert differing(finish(dropping_run(dataset, tmp_path)), whole) == []
    assert differing(finish(toy_run(dataset)), whole)
    assert differing(finish(dropping_run(dataset, share=0.0)), finish(toy_run(dataset))) == []


def test_dropout_belongs_to_an_item_and_is_off_outside_of_the_students_forward(dataset):
    """Each item's channels are the same alone and in a batch; about the wanted share is dropped and the mean stays."""
    x = torch.ones(4, 5, 2000)
    together = Dropout(0.3, ItemNoise(0, range(4)))("layer", x)
    alone = Dropout(0.3, ItemNoise(0, [2]))("layer", x[2:3])
    assert torch.equal(together[2:3], alone) and torch.equal(together[:, 0], together[:, 4])
    assert (together == 0).float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert together.mean().item() == pytest.approx(1.0, abs=0.03)
    again = Dropout(0.3, ItemNoise(0, range(4)))
    assert torch.equal(again("layer", x), again("layer", x)) and not torch.equal(again("other", x), together)
    assert torch.equal(again.of([3, 1])("layer", x[:2]), together[[3, 1]])
    run = dropping_run(dataset, share=0.9)
    batch, random = run.batch(0)
    step = run.method.start(batch, random, 0)
    with torch.no_grad():
        assert not torch.allclose(step.fake, run.method.student(step.x, step.sigma, batch.cond))
    assert run.method.student.backend.switch.dropout is None


def test_a_checkpointed_block_drops_the_same_when_it_is_computed_again(make_backend, randomise, batch):
    """Gradients with and without gradient checkpointing are equal, though the backward runs outside of the dropout."""
    gradients = []
    for checkpointing in (False, True):
        backend = make_backend("sd3", gradient_checkpointing=checkpointing)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            lora = randomise(backend.new_lora(2), size=0.3)
        lora.configure(LoraConfig(dropout=0.5))
        with lora.dropping(ItemNoise(0, range(len(batch[0])))):
            out = Denoiser(backend, lora)(*batch)
        out.square().sum().backward()
        gradients.append([p.grad.clone() for p in lora.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)
    assert sum(bool(gradient.any()) for gradient in gradients[0]) > 0.8 * len(gradients[0])


# Captions left out


def test_captions_are_dropped_by_item_and_the_run_resumes_bit_equal(dataset, tmp_path):
    run = toy_run(dataset, caption_dropout=0.5)
    empty, dropped, seen = dataset.uncond(), 0, 0
    for step in range(8):
        run.step = step
        batch, _ = run.batch(0)
        plain = toy_run(dataset, steps=20)
        plain.step = step
        captioned, _ = plain.batch(0)
        for row in range(len(batch.latents)):
            none = torch.equal(batch.cond.context[row], empty.context[0])
            assert none or torch.equal(batch.cond.context[row], captioned.cond.context[row])
            assert none == torch.equal(batch.cond.pooled[row], empty.pooled[0])
            dropped, seen = dropped + none, seen + 1
    assert 0.25 < dropped / seen < 0.75
    whole = finish(toy_run(dataset, caption_dropout=0.5))
    for event in train(toy_run(dataset, tmp_path, caption_dropout=0.5)):
        if event.step == 2:
            break
    assert differing(finish(toy_run(dataset, tmp_path, caption_dropout=0.5)), whole) == []
    assert differing(finish(toy_run(dataset)), whole)


def test_an_empty_text_of_another_length_takes_the_whole_batch():
    cond, empty = toy_conds()
    longer = Cond(torch.randn(1, 5, cond.context.shape[2]), empty.pooled)
    first = without_captions(cond, longer, torch.tensor([True, False, False]))
    assert len(first) == 3 and torch.equal(first.context, longer.context.expand(3, -1, -1))
    assert without_captions(cond, longer, torch.tensor([False, True, True])) is cond

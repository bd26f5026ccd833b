"""What to change so that a run fits: the estimates against plans of the changed settings."""

from dataclasses import replace

import pytest
from test_plan import planned

from distill_core.training.fits import advice, verdict, ways
from distill_core.training.loop_config import TrainConfig
from distill_core.training.plan import CONTEXT, GIB, Plan

TWELVE = 12 * GIB - CONTEXT
BIG = Plan(
    peak=int(16 * GIB),
    parts={"model": 5 * GIB, "student": GIB, "average": GIB, "optimizer": 2 * GIB, "the student's forward": 7 * GIB},
    phases={"the student's forward": 16 * GIB},
    steady=9 * GIB,
    card=True,
)


def test_the_estimate_of_a_smaller_batch_is_its_plan():
    """The mini model at batch 8 and 4."""
    found = ways(planned("ladd checkpointed"), TrainConfig(batch_size=8), 16, checkpointing=True)
    assert found[0].change == "batch_size 4 with accumulation 2"
    assert found[0].needed == pytest.approx(planned("ladd checkpointed", batch=4).peak, rel=0.1)


def test_the_estimate_of_checkpointing_is_not_too_low():
    found = ways(planned("ladd"), TrainConfig(batch_size=8), 16, checkpointing=False)
    assert found[0].change == "gradient_checkpointing on (2.0 forwards more a step)"
    assert found[0].needed > 0.7 * planned("ladd checkpointed").peak


def test_changes_are_told_until_the_run_fits():
    train = TrainConfig(batch_size=8)
    found = ways(BIG, train, 64, checkpointing=True)
    said = verdict(BIG, found, TWELVE)
    assert said.startswith("this run needs about 17.2 GiB and 10.8 GiB are free: batch_size 4 with accumulation 2")
    assert "12.0 GiB; " not in said.split("->")[-1] and "rank" in advice(BIG, found)
    assert found == sorted(found, key=lambda way: -way.needed)
    assert verdict(BIG, found, 18 * GIB) is None


def test_a_base_in_fewer_bits_comes_last():
    plain, fp8 = (ways(BIG, TrainConfig(batch_size=4), 64, True, words) for words in ("", "the model in fp8"))
    assert fp8[:-1] == plain and fp8[-1].change == "the model in fp8"
    assert plain[-1].needed - fp8[-1].needed == pytest.approx(2.5 * GIB)


def test_what_no_setting_can_make_fit_is_said():
    found = ways(BIG, TrainConfig(batch_size=2), 16, checkpointing=True)
    assert [way.change for way in found] == ["ema_in_ram", "optimizer adamw8bit (Training Settings, or [train])"]
    assert "smaller pictures, or a model in fewer bits" in verdict(BIG, found, 8 * GIB)


def test_offloading_is_told_with_what_it_moves():
    """All but three blocks of 0.2 GiB leave the device."""
    blocks = replace(BIG, away=4 * GIB, block=GIB // 5, forwards=3.5, with_gradient=2.0, moved=15 * GIB)
    found = ways(blocks, TrainConfig(batch_size=2), 16, checkpointing=True)
    assert found[-1].change == "offload ram (15.0 GiB copied to the device a step)"
    assert found[-2].needed - found[-1].needed == pytest.approx(3.4 * GIB, rel=0.01)
    plain = ways(blocks, TrainConfig(batch_size=2), 16, checkpointing=False)
    assert plain[0].change == "gradient_checkpointing on (2.0 forwards more a step)"
    assert not any("offload" in way.change for way in ways(blocks, TrainConfig(offload="ram"), 16, True))


def test_inputs_of_blocks_in_host_memory_are_told_with_what_they_move():
    """Figures of FLUX.1 dev in Q4_K, rank 16, batch 2 (docs/memory.md), whose plan with the setting is 11.0 GiB."""
    parts = {"model": 6.33 * GIB, "student": 0.45 * GIB, "inputs": 4.93 * GIB, "the generator's backward": 1.96 * GIB}
    flux = replace(BIG, parts=parts, peak=sum(map(int, parts.values())), kept=int(4.93 * GIB))
    train = TrainConfig(batch_size=2, ema_in_ram=True, optimizer="adamw8bit")
    found = ways(flux, train, 16, checkpointing=True)
    assert [way.change for way in found] == ["offload_activations (4.9 GiB copied to the host and back a step)"]
    assert found[0].needed == pytest.approx(10.97 * GIB, rel=0.02)
    assert not ways(flux, replace(train, offload_activations=True), 16, checkpointing=True)


def test_all_weights_are_too_much_first_of_all():
    found = ways(replace(BIG, parts={**BIG.parts, "student": 20 * GIB}), TrainConfig(batch_size=2), 0, True)
    assert found[-1].change == "a LoRA instead of all weights"

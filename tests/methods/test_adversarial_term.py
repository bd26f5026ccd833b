"""When and on which batches the adversarial term counts, in every method that has one."""

from dataclasses import replace

import pytest
import torch
from toy import CHANNELS, TAPS, cache_toy, toy_conds, toy_method, toy_parts, toy_run

from distill_core.data.mix import mixed, open_data
from distill_core.data.real import save_latents
from distill_core.diffusion.noise import ItemNoise
from distill_core.methods.add import ADDConfig
from distill_core.methods.diffusion2gan import Diffusion2GANConfig
from distill_core.methods.dmd2 import DMD2Config
from distill_core.methods.ladd import LADDConfig
from distill_core.methods.registry import METHODS
from distill_core.training.loop import TrainConfig, train
from distill_core.training.run import RunConfig, StudentConfig, new_run

TERMS = {"pairs": 1.0, "adversarial": 0.5}
CONFIGS = [LADDConfig(TERMS, warmup_steps=0), ADDConfig(TERMS), Diffusion2GANConfig(TERMS), DMD2Config(TERMS)]
NAMES = [config.name for config in CONFIGS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The teacher's latents, and own ones."""
    root = tmp_path_factory.mktemp("data")
    cond, empty = toy_conds()
    g = torch.Generator().manual_seed(8)
    latents = [torch.randn(CHANNELS, 4, 6, generator=g) for _ in range(16)]
    save_latents(latents, [cond[[i % 3]] for i in range(16)], empty, root / "own")
    return cache_toy(root / "teacher").folder, root / "own"


@pytest.fixture
def dataset(folders):
    return open_data(folders[0])


def started(config, dataset, number: int):
    """A method and its step of that number."""
    method = toy_method(dataset, config)
    return method, method.start(dataset.batch(0, 8, 0), ItemNoise(3, range(8)), number)


def gradients(config, dataset, number: int) -> tuple[dict, list[torch.Tensor], list[torch.Tensor]]:
    """Logs of both players at a step, and the gradients of each."""
    method, step = started(config, dataset, number)
    logs, found = {}, []
    for player in method.players(TrainConfig()):
        loss, values = player.loss(step)
        logs |= values
        found.append(torch.autograd.grad(loss, list(player.parameters.values()), materialize_grads=True))
    return logs, *found


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_the_adversarial_term_counts_from_a_step_on(config, dataset):
    late = replace(config, adversarial_from=5)
    logs, student, discriminator = gradients(late, dataset, 4)
    method, step = started(config, dataset, 4)
    pairs = torch.autograd.grad(method.terms()["pairs"](step), list(method.student.trainable().values()))
    assert "adversarial" not in logs and all(map(torch.equal, student, pairs)) and any(g.any() for g in pairs)
    # The discriminator learns meanwhile what it would have learnt anyway; spectral norms (ADD) differ by an iteration.
    _, usual, same = gradients(config, dataset, 4)
    one, other = (torch.cat([g.flatten() for g in of]) for of in (discriminator, same))
    assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.999
    assert not all(map(torch.equal, student, usual))
    logs, student, _ = gradients(late, dataset, 5)
    assert "adversarial" in logs and all(map(torch.equal, student, gradients(config, dataset, 5)[1]))


def test_a_run_with_a_late_discriminator_is_one_of_pairs_until_then(dataset):
    """The student's weights and the logs, step by step."""

    def steps(begin: int) -> list[tuple[list[torch.Tensor], dict[str, float]]]:
        run = toy_run(dataset, ladd=replace(CONFIGS[0], adversarial_from=begin), steps=4)
        return [([p.detach().clone() for p in run.student_parameters.values()], e.logs) for e in train(run)]

    late, never = steps(2), steps(100)
    assert [all(map(torch.equal, a, b)) for (a, _), (b, _) in zip(late, never, strict=True)] == [
        True,
        True,
        False,
        False,
    ]
    assert ["adversarial" in logs for _, logs in late] == [False, False, True, True]
    assert all("discriminator" in logs for _, logs in late + never)


@pytest.mark.parametrize("name", [name for name, cls in METHODS.items() if "adversarial" in cls.known_terms])
def test_a_late_term_needs_another_before_it(name):
    with pytest.raises(ValueError, match="adversarial_from is 10, and until then no other term counts"):
        METHODS[name](terms={"adversarial": 1.0}, adversarial_from=10)
    assert METHODS[name](terms={"adversarial": 1.0, "denoising": 1.0}, adversarial_from=10).adversarial_from == 10


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_own_pictures_alone_are_judged(config, folders):
    dataset = open_data(mixed(*folders, 0.5))
    kinds = {dataset.batch(n, 4, 0).states is not None: dataset.batch(n, 4, 0) for n in range(4)}
    own, both = (toy_method(dataset, replace(config, adversarial_on=which)) for which in ("own", "both"))
    assert own.active(kinds[True]) == ["pairs"] and own.active(kinds[False]) == ["adversarial"]
    assert both.active(kinds[True]) == ["pairs", "adversarial"] and both.active(kinds[False]) == ["adversarial"]
    for of_teacher, batch in kinds.items():
        step = own.start(batch, ItemNoise(3, range(4)), 0)
        _, logs = own.generator_loss(step)
        assert ("pairs" in logs, "adversarial" in logs) == (of_teacher, not of_teacher)
        assert (own.judge(step) is None) == of_teacher


def test_pictures_must_be_there_to_be_judged(folders):
    config = RunConfig(
        replace(CONFIGS[0], adversarial_on="own"),
        TrainConfig(),
        StudentConfig(2),
        {"base": "toy", "dataset": "toy"},
        taps=tuple(TAPS),
    )
    with pytest.raises(ValueError, match='adversarial_on = "own" judges pictures, and .*teacher has none'):
        new_run(config, toy_parts(), open_data(folders[0]))
    new_run(config, toy_parts(), open_data(mixed(*folders, 0.5)))

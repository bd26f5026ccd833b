import pytest
import torch

from distill_core.diffusion.noise import ItemNoise, item_generator


def test_an_item_is_the_same_in_any_batch():
    batch, alone = ItemNoise(3, [0, 1, 2, 5]), ItemNoise(3, [2])
    for _ in range(3):  # the streams stay in step over several draws
        assert torch.equal(batch.normal(4, 5)[2], alone.normal(4, 5)[0])
        assert batch.uniform()[2] == alone.uniform()[0]


def test_seeds_and_items_give_different_noise():
    draws = [ItemNoise(seed, [item]).normal(8)[0] for seed in (0, 1) for item in (0, 1)]  # 0,1 and 1,0 differ, too
    for i, a in enumerate(draws):
        assert not any(torch.equal(a, b) for b in draws[i + 1 :])


def test_further_indices_select_further_streams():
    streams = [item_generator(0, 1), item_generator(0, 1, 1), item_generator(0, 1, 2)]
    assert len({torch.rand((), generator=g).item() for g in streams}) == 3


def test_successive_draws_differ():
    noise = ItemNoise(0, [0])
    assert not torch.equal(noise.normal(8), noise.normal(8))


def test_draws_are_standard_normal_and_uniform():
    noise = ItemNoise(0, range(20))
    normal = noise.normal(5000)
    assert normal.mean().abs() < 0.02 and abs(normal.std() - 1) < 0.02
    assert torch.corrcoef(normal).fill_diagonal_(0).abs().max() < 0.08
    uniform = torch.stack([noise.uniform() for _ in range(500)])
    assert 0 <= uniform.min() and uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.02


def test_normal_like_takes_shape_and_dtype():
    x = torch.zeros(2, 3, 4, dtype=torch.float64)
    drawn = ItemNoise(0, [0, 1]).normal_like(x)
    assert drawn.dtype == x.dtype
    assert torch.equal(drawn, ItemNoise(0, [0, 1]).normal(3, 4).double())


def test_another_batch_size_is_refused():
    with pytest.raises(ValueError, match="2 items.*batch of 3"):
        ItemNoise(0, [0, 1]).normal_like(torch.zeros(3, 1))


@pytest.mark.parametrize("seed, items", [(-1, [0]), (0, [1, -2])])
def test_negative_seeds_and_items_are_refused(seed, items):
    with pytest.raises(ValueError, match="negative"):
        ItemNoise(seed, items)


def test_torchs_global_generator_is_not_touched():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    ItemNoise(0, [0]).normal(3)
    assert torch.equal(torch.get_rng_state(), before)

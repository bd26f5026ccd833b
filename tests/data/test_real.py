import pytest
import torch

from distill_core.data.dataset import LatentDataset
from distill_core.data.real import save_latents
from distill_core.models.denoiser import Cond


def items(count: int, size=(4, 6, 4), tokens: int = 3) -> tuple[list, list]:
    g = torch.Generator().manual_seed(count)
    latents = [torch.randn(size, generator=g) for _ in range(count)]
    return latents, [Cond(torch.randn(1, tokens, 5, generator=g), torch.randn(1, 2, generator=g)) for _ in range(count)]


EMPTY = Cond(torch.zeros(1, 3, 5), torch.zeros(1, 2))


def test_every_latent_keeps_its_conditioning_in_its_own_bucket(tmp_path):
    """Two latent sizes and two text lengths: a batch never mixes them."""
    kinds = [items(3), items(2, (4, 4, 6)), items(2, tokens=7)]
    latents, conds = ([thing for kind in kinds for thing in kind[i]] for i in range(2))
    assert save_latents(latents, conds, EMPTY, tmp_path, {"family": "toy"}) == 7
    dataset = LatentDataset(tmp_path)
    assert len(dataset) == 7 and sorted(dataset.shapes) == [(4, 4, 6), (4, 6, 4)] and len(dataset.buckets) == 3
    found = 0
    for places in dataset.buckets.values():
        batch = dataset.read(places)
        for latent, cond in zip(batch.latents, (batch.cond[i : i + 1] for i in range(len(places))), strict=True):
            (index,) = [
                i for i, other in enumerate(latents) if other.shape == latent.shape and torch.equal(other, latent)
            ]
            assert torch.equal(cond.context, conds[index].context) and torch.equal(cond.pooled, conds[index].pooled)
            found += 1
    assert found == 7 and dataset.manifest()["family"] == "toy" and torch.equal(dataset.uncond().context, EMPTY.context)
    assert {len({tuple(dataset.batch(n, 2, 0).latents.shape[1:])}) for n in range(9)} == {1}


def test_one_conditioning_serves_all(tmp_path):
    latents, conds = items(3)
    save_latents(latents, conds[:1], EMPTY, tmp_path)
    (places,) = LatentDataset(tmp_path).buckets.values()
    context = LatentDataset(tmp_path).read(places).cond.context
    assert torch.equal(context, conds[0].context.expand(3, -1, -1))


def test_the_same_images_are_the_same_dataset_and_others_are_refused(tmp_path):
    latents, conds = items(3)
    save_latents(latents, conds, EMPTY, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    save_latents(latents, conds, EMPTY, tmp_path)
    with pytest.raises(ValueError, match="holds a dataset made with other settings"):
        save_latents(latents[::-1], conds, EMPTY, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, c: (x, c[:2]), "3 latents but 2 conditionings: give one conditioning for each latent"),
        (lambda x, c: ([], []), "0 latents but 0 conditionings"),
        (lambda x, c: ([*x[:2], torch.zeros(16, 6, 4)], c), "of different kinds .* the model's own VAE"),
        (lambda x, c: ([*x[:2], torch.zeros(4, 5, 6, 4)], c), "of different kinds"),
        (lambda x, c: ([x[0], x[1] / 0, x[2]], c), "latent 1 has values that are not finite"),
    ],
)
def test_what_cannot_be_a_dataset_is_refused_before_anything_is_written(tmp_path, change, message):
    latents, conds = change(*items(3))
    with pytest.raises(ValueError, match=message):
        save_latents(latents, conds, EMPTY, tmp_path / "set")
    assert not (tmp_path / "set").exists()

"""Train the scenes model again: ``python -m distill_core.experiments.train_scenes [--out DIR] [--work DIR]``.

The pictures are drawn by `data.scenes`. The stages (pictures, autoencoder, latents, classifiers, teacher) run in this
order; one whose output is there already is skipped and a stopped one goes on, so the command can be started again. The
teacher never sees the combinations of words that `scenes.combinations` holds out.
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange

from ..data.scenes import draw_rows, draw_words, render
from ..models import scenes, shipped
from .fitting import Making, Stage, fit, half, in_batches, makers_parser, noised, save_autoencoder

TRAINING, TEST = 0, 1  # seeds of the pictures
TEST_PICTURES = 5000


def draw(seed: int, count: int, allowed: Tensor | None, size: int = 100) -> tuple[Tensor, Tensor]:
    """Pictures [count, 3, SIZE, SIZE] as bytes, and their words [count, 4]."""
    pictures, words = [], []
    for start in trange(0, count, size, desc="pictures", mininterval=5):
        items = range(start, min(start + size, count))
        words.append(draw_words(seed, items, allowed))
        pictures.append(as_bytes(render(words[-1], draw_rows(seed, items))[0]))
    return torch.cat(pictures), torch.cat(words)


def as_bytes(pictures: Tensor) -> Tensor:
    return ((pictures + 1) * 127.5).round().byte()


def as_floats(pictures: Tensor) -> Tensor:
    return (pictures.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def train_autoencoder(pictures: Tensor, stage: Stage) -> tuple[nn.Module, dict]:
    """L1 + MSE of pixels and L1 of their differences, with small latent noise; latents pulled to mean 0, variance 1."""
    net = shipped.new_autoencoder(scenes.AUTOENCODER_WIDTH).to(memory_format=torch.channels_last)

    def loss_fn(generator: torch.Generator) -> Tensor:
        x = as_floats(pictures[torch.randint(len(pictures), (16,), generator=generator)])
        with torch.autocast("cpu", torch.bfloat16):
            latents = net.encoder(x)
            noise = torch.randn(latents.shape, generator=generator)
            error = net.decoder(latents + 0.05 * noise) - x
        error = error.float()
        var, mean = torch.var_mean(latents.float(), dim=(0, 2, 3))
        standardise = mean.square().mean() + (var + 1e-4).log().square().mean()
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        return error.abs().mean() + error.square().mean() + 0.5 * edges + 0.01 * standardise

    return net, fit(list(net.parameters()), loss_fn, 2e-3, "autoencoder", stage)


def reconstruction_psnr(net: Any, pictures: Tensor) -> float:
    """Peak signal-to-noise ratio (dB, range 2) of decode(encode(x))."""
    error = in_batches(lambda x: net.decoder(net.encoder(as_floats(x))) - as_floats(x), pictures, "reconstruct")
    return (10 * torch.log10(4 / error.square().mean())).item()


def train_classifier(space: str, train: tuple, test: tuple, stage: Stage) -> tuple[dict, dict]:
    """Train an evaluator of all word groups, with the statistics of the test scenes; returns (state, log)."""
    (data, words), (test_data, test_words) = train, test
    net = scenes.new_classifier(space)

    def loss_fn(generator: torch.Generator) -> Tensor:
        pick = torch.randint(len(data), (128,), generator=generator)
        x = as_floats(data[pick]) if data.dtype == torch.uint8 else data[pick].float()
        x = x + 0.1 * torch.randn(x.shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            logits = scenes.by_group(net(x))
        parts = zip(logits.values(), words[pick].T, strict=True)
        return torch.stack([F.cross_entropy(part.float(), w, label_smoothing=0.05) for part, w in parts]).mean()

    log = fit(list(net.parameters()), loss_fn, 2e-3, f"{space} classifier", stage)
    net.eval()
    seen = lambda x: as_floats(x) if x.dtype == torch.uint8 else x.float()  # noqa: E731
    features = in_batches(lambda x: net.features(seen(x)), test_data, "features", 500)
    logits = scenes.by_group(net.head(torch.relu(features)))
    right = {g: (part.argmax(1) == w).float().mean() for (g, part), w in zip(logits.items(), test_words.T, strict=True)}
    log["test_accuracy"] = {group: round(value.item(), 4) for group, value in right.items()}
    moments = {"reference.mean": features.mean(0), "reference.cov": features.double().T.cov().float()}
    state = {name: value.half() for name, value in net.state_dict().items()}
    return {name: value.detach().contiguous() for name, value in {**state, **moments}.items()}, log


def train_teacher(latents: Tensor, words: Tensor, stage: Stage) -> tuple[dict, dict, dict]:
    """Rectified flow on the latents: velocity loss, logit-normal(0, 1) times, weight average of 0.999.

    One prompt in ten is empty, and each word of the others is left out one time in ten.
    """
    from diffusers import SD3Transformer2DModel

    net, text = SD3Transformer2DModel(**scenes.TRANSFORMER_CONFIG), scenes.TextEncoder()
    both = nn.ModuleDict({"net": net, "text": text})
    average = {name: value.detach().clone() for name, value in both.named_parameters()}
    offsets = torch.tensor([0, *(len(g) for g in scenes.GROUPS.values())]).cumsum(0)[:-1] + 1

    def tokens(chosen: Tensor, generator: torch.Generator) -> Tensor:
        keep = torch.rand(chosen.shape, generator=generator) >= 0.1
        keep &= torch.rand(len(chosen), 1, generator=generator) >= 0.1
        order = torch.argsort(~keep, dim=1, stable=True)  # words that stay move to the front
        rows = ((chosen + offsets) * keep).gather(1, order)
        return F.pad(rows, (0, scenes.TOKENS - rows.shape[1]))

    def loss_fn(generator: torch.Generator) -> Tensor:
        pick = torch.randint(len(latents), (64,), generator=generator)
        x0 = latents[pick].float()
        x, sigma, target = noised(x0, generator)
        with torch.autocast("cpu", torch.bfloat16):
            context, pooled = text(tokens(words[pick], generator))
            velocity = net(
                hidden_states=x, timestep=1000 * sigma, encoder_hidden_states=context, pooled_projections=pooled
            ).sample
        return F.mse_loss(velocity.float(), target)

    log = fit(list(both.parameters()), loss_fn, 1e-3, "teacher", stage, list(average.values()))
    transformer = dict(net.state_dict()) | {k[4:]: v for k, v in average.items() if k.startswith("net.")}
    return transformer, {k[5:]: v for k, v in average.items() if k.startswith("text.")}, log


def main() -> None:
    parser = makers_parser(__doc__, scenes.ASSETS, "scenes-work", "pictures and latents")
    parser.add_argument("--pictures", type=int, default=48_000)
    parser.add_argument("--ae-steps", type=int, default=5000)
    parser.add_argument("--classifier-steps", type=int, default=2500)
    parser.add_argument("--teacher-steps", type=int, default=7000)
    parser.add_argument("--until", choices=["autoencoder", "classifiers", "teacher"], default="teacher")
    args = parser.parse_args()
    making = Making(args)

    if not (args.work / "pictures.safetensors").exists():
        pictures = {
            "train": draw(TRAINING, args.pictures, scenes.combinations()),
            "test": draw(TEST, TEST_PICTURES, None),
        }
        named = {part: both[0] for part, both in pictures.items()}
        named |= {f"{part}_words": both[1] for part, both in pictures.items()}
        save_file(named, args.work / "pictures.safetensors")
    data = load_file(args.work / "pictures.safetensors")

    path = args.out / "autoencoder.safetensors"
    if not path.exists():
        net, entry = train_autoencoder(data["train"], making.stage(args.ae_steps))
        net.eval()
        entry["test_psnr_db"] = reconstruction_psnr(net, data["test"][:1000])
        save_autoencoder(net, path)
        making.record("autoencoder", entry)
    if args.until == "autoencoder":
        return

    if not (args.work / "latents.safetensors").exists():
        encoder = shipped.load_autoencoder(args.out, scenes.AUTOENCODER_WIDTH).encoder
        encoded = {k: in_batches(lambda x: encoder(as_floats(x)), data[k], "encode") for k in ("train", "test")}
        save_file({k: v.half().contiguous() for k, v in encoded.items()}, args.work / "latents.safetensors")
    latents = load_file(args.work / "latents.safetensors")

    for space, kind in {"latent": latents, "pixel": data}.items():
        path = args.out / f"{space}_classifier.safetensors"
        if not path.exists():
            train, test = ((kind[part], data[f"{part}_words"]) for part in ("train", "test"))
            steps = args.classifier_steps * (4 if space == "latent" else 1)  # a step on latents is far cheaper
            state, entry = train_classifier(space, train, test, making.stage(steps))
            save_file(state, path)
            making.record(f"{space}_classifier", entry)
    if args.until == "classifiers":
        return

    if not (args.out / "transformer.safetensors").exists():
        transformer, text, entry = train_teacher(
            latents["train"], data["train_words"], making.stage(args.teacher_steps)
        )
        save_file(half(text), args.out / "text_encoder.safetensors")
        save_file(half(transformer), args.out / "transformer.safetensors")
        making.record("teacher", entry)


if __name__ == "__main__":
    main()

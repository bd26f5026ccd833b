"""Train the mini model again: ``python -m distill_core.experiments.train_mini --data DIR [--out DIR] [--seed N]``.

DIR holds the four ``*-ubyte.gz`` files of Fashion-MNIST (Debian's package ``dataset-fashion-mnist`` installs them in
/usr/share/datasets/fashion-mnist). The stages (autoencoder, latents, classifiers, teacher, small teacher) run in this
order; one whose output is already there is skipped and a stopped one goes on, so the command can be started again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.fashion_mnist import DEBIAN_DATA, read_split, upscale
from ..evaluation.metrics import mini_scores
from ..models import mini, shipped
from .fitting import Making, Stage, fit, half, in_batches, makers_parser, noised, save_autoencoder


def train_autoencoder(images: Tensor, stage: Stage) -> tuple[nn.Module, dict]:
    """L1 + MSE reconstruction with small latent noise; latents are pulled to zero mean and unit variance a channel."""
    net = shipped.new_autoencoder(mini.AUTOENCODER_WIDTH).to(memory_format=torch.channels_last)

    def loss_fn(generator: torch.Generator) -> Tensor:
        x = upscale(images[torch.randint(len(images), (16,), generator=generator)])
        latents = net.encoder(x)
        noise = torch.randn(latents.shape, generator=generator)
        error = net.decoder(latents + 0.1 * noise) - x
        var, mean = torch.var_mean(latents, dim=(0, 2, 3))
        standardise = mean.square().mean() + (var + 1e-4).log().square().mean()
        return error.abs().mean() + 0.5 * error.square().mean() + 0.01 * standardise

    return net, fit(list(net.parameters()), loss_fn, 2e-3, "autoencoder", stage)


def reconstruction_psnr(net: Any, images: Tensor) -> float:
    """Peak signal-to-noise ratio (dB, range 2) of decode(encode(x)) over ``images``."""
    recon = in_batches(lambda x: net.decoder(net.encoder(upscale(x))).mean(1, keepdim=True), images, "reconstruct")
    target = in_batches(lambda x: upscale(x)[:, :1], images, "target")
    return (10 * torch.log10(4 / (recon - target).square().mean())).item()


def train_classifier(space: str, train: tuple, test: tuple, stage: Stage) -> tuple[dict, dict]:
    """Train an evaluator and attach the reference statistics of the real test data; returns (state, log)."""
    (data, labels), (test_data, test_labels) = train, test
    net = mini.new_classifier(space)

    def loss_fn(generator: torch.Generator) -> Tensor:
        pick = torch.randint(len(data), (128,), generator=generator)
        x = data[pick]
        x = (
            torch.where(torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5, x.flip(-1), x)
            if space == "pixel"
            else x
        )
        return F.cross_entropy(net(x), labels[pick], label_smoothing=0.05)

    log = fit(list(net.parameters()), loss_fn, 2e-3, f"{space} classifier", stage)
    net.eval()
    predicted = in_batches(lambda x: net(x).argmax(1), test_data, "accuracy", 1000)
    features = in_batches(net.features, test_data, "features", 1000).double()
    log["test_accuracy"] = (predicted == test_labels).float().mean().item()
    state = net.state_dict() | {"reference.mean": features.mean(0), "reference.cov": features.T.cov()}
    return state, log


def train_teacher(
    latents: Tensor, labels: Tensor, stage: Stage, config: dict, name: str = "teacher", known: dict | None = None
) -> tuple[dict, dict, dict]:
    """Rectified flow on the latents: velocity loss, logit-normal(0, 1) times, class dropout 0.1, weight EMA.

    known: the class table of another teacher, which is then not trained; returned are network, table and log.
    """
    from diffusers import SD3Transformer2DModel

    net = SD3Transformer2DModel(**config)
    table = nn.ModuleDict({"context": nn.Embedding(11, 2 * 64), "pooled": nn.Embedding(11, 64)})
    if known is not None:
        table.load_state_dict({f"{key}.weight": rows.flatten(1) for key, rows in known.items()})
        table.requires_grad_(False)
    both = nn.ModuleDict({"net": net, **({"table": table} if known is None else {})})
    average = {name: value.detach().clone() for name, value in both.named_parameters()}

    def loss_fn(generator: torch.Generator) -> Tensor:
        pick = torch.randint(len(latents), (64,), generator=generator)
        x0, label = latents[pick], labels[pick]
        label = torch.where(torch.rand(64, generator=generator) < 0.1, mini.NULL_CLASS, label)
        x, sigma, target = noised(x0, generator)
        velocity = net(
            hidden_states=x,
            timestep=1000 * sigma,
            encoder_hidden_states=table["context"](label).view(64, 2, 64),
            pooled_projections=table["pooled"](label),
        ).sample
        return F.mse_loss(velocity, target)

    log = fit(list(both.parameters()), loss_fn, 1e-3, name, stage, list(average.values()))
    transformer = {name: value for name, value in net.state_dict().items()}
    transformer |= {name[4:]: value for name, value in average.items() if name.startswith("net.")}
    if known is None:
        weights = average["table.context.weight"], average["table.pooled.weight"]
        known = {"context": weights[0].view(11, 2, 64), "pooled": weights[1]}
    return transformer, known, log


def main() -> None:
    parser = makers_parser(__doc__, mini.ASSETS, "mini-work", "encoded latents")
    parser.add_argument("--data", type=Path, default=Path(DEBIAN_DATA), help="folder of the Fashion-MNIST idx.gz files")
    parser.add_argument("--ae-steps", type=int, default=2400)
    parser.add_argument("--classifier-steps", type=int, default=2000)
    parser.add_argument("--teacher-steps", type=int, default=6000)
    args = parser.parse_args()
    making = Making(args)

    train_images, train_labels = read_split(args.data, "train")
    test_images, test_labels = read_split(args.data, "t10k")

    if not (args.out / "autoencoder.safetensors").exists():
        net, entry = train_autoencoder(train_images, making.stage(args.ae_steps))
        entry["test_psnr_db"] = reconstruction_psnr(net.eval(), test_images[:1000])
        save_autoencoder(net, args.out / "autoencoder.safetensors")
        making.record("autoencoder", entry)

    latents_file = args.work / "latents.safetensors"
    if not latents_file.exists():
        encoder = mini.load_autoencoder().encoder
        encode = lambda x: encoder(upscale(x)).contiguous()  # noqa: E731
        train, test = (in_batches(encode, x, "encode") for x in (train_images, test_images))
        save_file({"train": train.half(), "test": test.half()}, latents_file)
    latents = load_file(latents_file)
    train_latents, test_latents = latents["train"].float(), latents["test"].float()

    data = {"latent": [mini.classifier_input("latent", x) for x in (train_latents, test_latents)]}
    as_seen = lambda x: mini.classifier_input("pixel", upscale(x))  # noqa: E731
    data["pixel"] = [in_batches(as_seen, x, "pixels") for x in (train_images, test_images)]
    for space, (train, test) in data.items():
        path = args.out / f"{space}_classifier.safetensors"
        if not path.exists():
            state, entry = train_classifier(
                space, (train, train_labels), (test, test_labels), making.stage(args.classifier_steps)
            )
            save_file({k: v.contiguous() for k, v in state.items()}, path)
            making.record(f"{space}_classifier", entry)

    if "floor" not in making.log:
        pick = torch.cat([(train_labels == c).nonzero()[:100, 0] for c in range(10)])
        making.record("floor", mini_scores(train_latents[pick], train_labels[pick]))

    if not (args.out / "transformer.safetensors").exists():
        stage = making.stage(args.teacher_steps)
        transformer, conditioning, entry = train_teacher(train_latents, train_labels, stage, mini.TRANSFORMER_CONFIG)
        save_file(half(conditioning), args.out / "conditioning.safetensors")
        save_file(half(transformer), args.out / "transformer.safetensors")
        making.record("teacher", entry)

    if not (args.out / mini.SMALL.name).exists():
        stage, known = making.stage(args.teacher_steps), load_file(args.out / "conditioning.safetensors")
        known = {name: rows.float() for name, rows in known.items()}
        small = train_teacher(train_latents, train_labels, stage, mini.SMALL_CONFIG, "small teacher", known)
        save_file(half(small[0]), args.out / mini.SMALL.name)
        making.record("small_teacher", small[2])


if __name__ == "__main__":
    main()

"""Runs inside the host's Python: VAEs and CLIP_VISIONs of the host as what ADD learns through.  probe_parts.py FOLDER

Each function measures one thing and returns what JSON can hold; test_host_parts.py says what it must be. FOLDER
receives the mini model's images and tokens, too, for diffusers.
"""

from host_tools import folder, load, relative, write

# isort: split
import json

import comfy.clip_vision
import comfy.sd
import comfy.taesd.taehv
import comfy.taesd.taesd
import folder_paths
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL
from pack.distill_core.models.vision import encoder_vision
from pack.distill_core.training.figures import Figures
from pack.distill_core.training.loop import accumulate, training_step
from pack.distill_core.training.run_folder import RunFolder
from pack.nodes import mini
from pack.nodes.host import training as host_training
from pack.nodes.host.attention import training_attention
from pack.nodes.host.backend import training_backend
from pack.nodes.host.datasets import make_teacher_latents
from pack.nodes.host.decoder import Decoder
from pack.nodes.host.folders import run_folder
from pack.nodes.host.vision import vision_network
from pack.nodes.perceptual import SHIPPED, LoadELatentLPIPS
from pack.nodes.trainers.add import ADDTrainer
from pack.nodes.trainers.diffusion2gan import Diffusion2GANTrainer
from safetensors.torch import save_file
from tiny_models import random_state
from torch.nn.attention import SDPBackend, sdpa_kernel

import nodes as core

folder_paths.set_output_directory(str(folder))
for kind in ("vae", "vae_approx", "clip_vision"):
    folder_paths.add_model_folder_path(kind, str(folder / kind))
    (folder / kind).mkdir(exist_ok=True)
KL = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
}
SMALLER = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128, "projection_dim": 32}


def conditioning(name: str) -> list:
    return mini.MiniConditioning.execute(name)[0]


def mini_parts():
    with torch.inference_mode():
        return mini.LoadMiniModel.execute(False).result[:2]  # not its text encoder


def vaes() -> dict:
    """VAEs of SD 1.5 as core's Load VAE gives them, with random weights: the tiny one in two files, and a KL one."""
    tiny = comfy.taesd.taesd.TAESD(latent_channels=4)
    for part in ("encoder", "decoder"):
        save_file(random_state(getattr(tiny, f"taesd_{part}")), folder / "vae_approx" / f"taesd_{part}.safetensors")
    large = AutoencoderKL(ddconfig=KL, decoder_ddconfig={**KL, "ch": 32}, embed_dim=4)
    save_file(random_state(large), folder / "vae" / "large.safetensors")
    with torch.inference_mode():
        loaded = {
            name: core.VAELoader().load_vae(file)[0] for name, file in (("taesd", "taesd"), ("kl", "large.safetensors"))
        }
    return loaded


def clip_vision(kind: str):
    """A CLIP_VISION as core's loader gives it of a file. The loader knows networks by their depth only, and all of them
    are large: here it builds them narrower."""
    configs = {
        "dinov2": "image_encoders/dino2_large.json",
        "clip": "clip_vision_config_vitl.json",
        "dinov3": "image_encoders/dino3_large.json",
    }
    real = comfy.clip_vision.ClipVisionModel

    def smaller(path):
        config = {**json.loads(open(path).read()), **SMALLER}
        return real({key: value for key, value in config.items() if kind == "clip" or key != "projection_dim"})

    path = folder / "clip_vision" / f"{kind}.safetensors"
    root = comfy.clip_vision.__file__.rsplit("/", 1)[0]
    with torch.inference_mode(False):
        state = random_state(smaller(f"{root}/{configs[kind]}").model)
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    comfy.clip_vision.ClipVisionModel = smaller
    try:
        with torch.inference_mode():
            return core.CLIPVisionLoader().load_clip(path.name)[0]
    finally:
        comfy.clip_vision.ClipVisionModel = real


def decoders() -> dict:
    """Images against the host's own decoding, the gradient against finite differences, and what is left as it was."""
    mini_model, mini_vae = mini_parts()
    cases = {"mini": (mini_model, mini_vae)} | {name: (load("sd15"), vae) for name, vae in vaes().items()}
    result = {}
    for name, (model, vae) in cases.items():
        before = {key: value.clone() for key, value in vae.first_stage_model.state_dict().items()}
        with training_backend(model) as backend:
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(2, backend.channels, 4, 6, generator=generator).requires_grad_()
            direction = torch.randn(x.shape, generator=generator)
            decoder = Decoder(vae, backend, checkpointing=False)
            images = decoder(x)
            with torch.inference_mode():
                own = vae.decode(backend.latents_out(x.detach().clone())).movedim(-1, 1) * 2 - 1
            weight = torch.randn(images.shape, generator=generator)
            (slope,) = torch.autograd.grad((images * weight).sum(), x)
            again = Decoder(vae, backend, checkpointing=True)
            (recomputed,) = torch.autograd.grad((again(x) * weight).sum(), x)
            decoder.network.double()
            with torch.no_grad():
                inner = [x.detach().double() + sign * 1e-6 * direction for sign in (1, -1)]
                change = [(decoder_double(decoder, z) * weight).sum() for z in inner]
            result[name] = {
                "image": (images.detach().clamp(-1, 1) - own).abs().max().item(),
                "shape": list(images.shape),
                "slope": relative((slope * direction).sum(), (change[0] - change[1]) / 2e-6),
                "checkpointed": relative(recomputed, slope),
                "rows": again.checkpointing,
                "frozen": not any(p.requires_grad for p in decoder.network.parameters()),
                "encoder": decoder.encoder is not None,
            }
        after = vae.first_stage_model.state_dict()
        result[name]["untouched"] = all(torch.equal(before[key], after[key]) for key in before)
    return result


def decoder_double(decoder: Decoder, latents: torch.Tensor) -> torch.Tensor:
    inside = decoder.backend.latents_out(latents)
    return 2 * (decoder.slope * decoder.network.decode(inside) + decoder.offset) - 1


def mini_tokens() -> dict:
    """Images and the encoder's tokens of the mini model's own autoencoder, left for diffusers."""
    model, vae = mini_parts()
    with training_backend(model) as backend, torch.no_grad():
        x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
        decoder = Decoder(vae, backend)
        images = decoder(x)
        tokens = encoder_vision(decoder.encoder, (32, 32))(images)
    save_file(
        {"x": x, "images": images.contiguous()} | {f"tokens{i}": t.contiguous() for i, t in enumerate(tokens)},
        folder / "mini_tokens.safetensors",
    )
    return {"taps": len(tokens)}


def attention() -> dict:
    """Plain attention, as a double backward needs it, against the host's own, in all layouts that its blocks use."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 6, 3 * 8, generator=generator) for _ in range(3))
    heads_last = [x.unflatten(2, (3, 8)) for x in (q, k, v)]
    heads_first = [x.transpose(1, 2) for x in heads_last]
    mask = torch.randn(6, 6, generator=generator)
    cases = {
        "tokens": ((q, k, v), {}),
        "mask": ((q, k, v), {"mask": mask}),
        "sd3": ((q, *heads_last[1:]), {}),
        "batch mask": ((q, k, v), {"mask": mask.expand(2, 6, 6)}),
        "scale": ((q, k, v), {"scale": 0.5}),
        "heads first": (heads_first, {"skip_reshape": True}),
        "and out": (heads_first, {"skip_reshape": True, "skip_output_reshape": True}),
    }
    result = {}
    for name, (inputs, options) in cases.items():
        own = training_attention(*inputs, 3, **options)
        with sdpa_kernel(SDPBackend.MATH):
            plain = training_attention(*inputs, 3, **options)
        result[name] = relative(plain, own) if plain.shape == own.shape else f"{plain.shape} is not {own.shape}"
    x = q.clone().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        (slope,) = torch.autograd.grad(training_attention(x, k, v, 3).square().sum(), x, create_graph=True)
        (again,) = torch.autograd.grad(slope.square().sum(), x)
    return result | {"double backward": bool(again.any())}


def visions() -> dict:
    """Each of the host's image encoders: its tokens against its own output, its gradient, what it is tapped at."""
    result = {}
    for kind in ("dinov2", "dinov3", "clip"):
        vision = clip_vision(kind)
        with torch.inference_mode(False):
            size = {"dinov2": 28, "dinov3": 32}.get(kind, 0)
            network = vision_network(vision, size, torch.device("cpu"), torch.float32)
            side = network.size[0]
            images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)).mul(2).sub(1)
            images.requires_grad_()
            tokens = network(images)
            (slope,) = torch.autograd.grad(sum(t.square().mean() for t in tokens), images)
            shape, last = [list(t.shape) for t in tokens], tokens[-1].detach()
        with torch.inference_mode():
            mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (vision.image_mean, vision.image_std))
            vision.model.float()
            inside = ((images.detach().clone() + 1) / 2 - mean) / std
            seen, block = [], vision.model.get_submodule(network.taps[-1].removeprefix("inner."))
            handle = block.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output.clone()))
            vision.model(inside)
            handle.remove()
            own = seen[0][:, network.prefix_tokens :] + seen[0][:, :1]
        result[kind] = {
            "tokens": relative(last.clone(), own.transpose(1, 2).clone()),
            "shapes": shape,
            "taps": network.taps,
            "gradient": slope.abs().max().item(),
            "size": side,
            "frozen": not any(p.requires_grad for p in network.network.parameters()),
        }
    return result


def requests():
    """A request of either node on the mini model, and its dataset with pairs for one step."""
    model, vae = mini_parts()
    with torch.inference_mode():
        dataset = make_teacher_latents(
            model,
            conditioning("all ten"),
            "parts",
            count=64,
            sizes="64x64",
            steps=2,
            cfg=1.5,
            negative=conditioning("none")[0],
            pairs_for_steps=1,
            batch_size=64,
        )
    common = dict(model=model, dataset=dataset, target_steps=1, steps=2, batch_size=2, rank=2)

    def make(node, name: str, **changes):
        extra = dict(vae=vae, vision_size=32) if node is ADDTrainer else {}
        with torch.inference_mode():
            return node.request(**{**common, "run_name": name, **extra, **changes})

    return make


def gradients() -> dict:
    """By method and phase: which players have a gradient after it, and whether a step moves them and nothing else."""
    make, result = requests(), {}
    with torch.inference_mode():
        metric = LoadELatentLPIPS.execute(SHIPPED, "bg", 1, 0.0).result[0]
    cases = {
        "add": make(ADDTrainer, "g_add"),
        "add with dinov2": make(ADDTrainer, "g_dino", clip_vision=clip_vision("dinov2"), vision_size=28),
        "diffusion2gan lora": make(Diffusion2GANTrainer, "g_lora", critic="lora", perceptual=metric),
        "diffusion2gan copy": make(Diffusion2GANTrainer, "g_copy", critic="copy", gradient_checkpointing=False),
    }
    for name, request in cases.items():
        with training_backend(request.model, request.checkpointing) as backend:
            dataset, config = host_training.describe(request)
            run = host_training.open_run(request, config, dataset, backend, RunFolder(run_folder(request.run_name)))
            method = run.method
            players = {player.name: list(player.parameters.values()) for player in run.players}
            mine = {id(p) for values in players.values() for p in values}
            frozen = [backend.network]
            if request.vae is not None:
                frozen += [method.decode.network, method.vision.network]
            strangers = [p for network in frozen for p in network.parameters() if id(p) not in mine]
            if request.parts.perceptual is not None:
                strangers += list(metric.parameters())
            batch, random = run.batch(0)
            found = {}
            step = method.start(batch, random, 0)
            for player in run.players:
                accumulate(run, player, step, Figures())
                found[player.name] = sorted(
                    who
                    for who, values in {**players, "others": strangers}.items()
                    if any(p.grad is not None and p.grad.any() for p in values)
                )
                for values in (*players.values(), strangers):
                    for p in values:
                        p.grad = None
            before = {
                who: [p.detach().clone() for p in values] for who, values in {**players, "others": strangers}.items()
            }
            training_step(run)
            found["moved"] = sorted(
                who
                for who, values in {**players, "others": strangers}.items()
                if any(not torch.equal(a, b) for a, b in zip(before[who], values, strict=True))
            )
            result[name] = found
    return result


def question(request) -> str:
    """What a finished run must have been asked for, to be the answer to this request."""
    _, config = host_training.describe(request)
    return json.dumps(config.request())


def identities() -> dict:
    """What a run is asked to be, and what it says of itself, differ with the VAE, the vision network and the metric."""
    make = requests()
    with torch.inference_mode():
        metrics = [LoadELatentLPIPS.execute(SHIPPED, preset, 1, 0.0).result[0] for preset in ("bg", "bgco")]
        other = comfy.sd.VAE(sd={k: v * 1.01 for k, v in mini_parts()[1].get_sd().items()})
    dino = clip_vision("dinov2")
    variants = {
        "add": [
            make(ADDTrainer, "i"),
            make(ADDTrainer, "i", vae=other),
            make(ADDTrainer, "i", clip_vision=dino),
            make(ADDTrainer, "i", clip_vision=dino, vision_size=28),
            make(ADDTrainer, "i", teacher_cfg=3.0),
            make(ADDTrainer, "i", weighting="sds"),
        ],
        "diffusion2gan": [
            make(Diffusion2GANTrainer, "i"),
            *(make(Diffusion2GANTrainer, "i", perceptual=m) for m in metrics),
            make(Diffusion2GANTrainer, "i", critic="copy"),
        ],
    }
    with torch.inference_mode():
        asked = {name: [question(request) for request in group] for name, group in variants.items()}
        same = all(
            question(make(n, "i")) == asked[k][0]
            for n, k in ((ADDTrainer, "add"), (Diffusion2GANTrainer, "diffusion2gan"))
        )
    return {"same": same, **{name: [len(set(group)), len(group)] for name, group in asked.items()}}


def finished() -> dict:
    """A run with a DINOv2 through the whole of `train_in_graph`; asked for with another size it is another run."""
    make, dino = requests(), clip_vision("dinov2")
    request = make(ADDTrainer, "dino", clip_vision=dino, vision_size=28)
    with torch.inference_mode():
        _, lora, losses = host_training.train_in_graph(request)
        said = refusal(make(ADDTrainer, "dino", clip_vision=dino, vision_size=42))
    return {"method": lora.description["method"], "losses": len(losses["loss"]), "other size": said}


def refusal(request) -> str:
    try:
        with torch.inference_mode():
            host_training.train_in_graph(request)
    except ValueError as error:
        return str(error)
    return "accepted"


def mistakes() -> dict:
    """What is said to a user who connects the wrong thing; nothing is trained."""
    make, own = requests(), vaes()
    with torch.inference_mode():
        video = comfy.sd.VAE(sd=comfy.taesd.taehv.TAEHV(latent_channels=16).state_dict())
        blind = comfy.sd.VAE(sd=mini_parts()[1].get_sd())
        empty = comfy.sd.VAE(sd=mini_parts()[1].get_sd())
        metric = LoadELatentLPIPS.execute(SHIPPED, "bg", 1, 0.0).result[0]
    empty.first_stage_model = None
    sixteen = {**KL, "z_channels": 16}
    with torch.inference_mode():
        large = comfy.sd.VAE(
            sd=random_state(AutoencoderKL(ddconfig=sixteen, decoder_ddconfig={**sixteen, "ch": 32}, embed_dim=16))
        )
    dino, tagger = clip_vision("dinov2"), clip_vision("clip")
    said = {
        "video": refusal(make(ADDTrainer, "m1", vae=video)),
        "empty": refusal(make(ADDTrainer, "m2", vae=empty)),
        "channels": refusal(make(ADDTrainer, "m3", vae=own["taesd"])),
        "no vision": refusal(make(ADDTrainer, "m4", vae=large)),
        "patch": refusal(make(ADDTrainer, "m5", clip_vision=dino, vision_size=32)),
        "fixed size": refusal(make(ADDTrainer, "m6", clip_vision=tagger, vision_size=32)),
    }
    decode = comfy.taesd.taesd.TAESD.decode
    comfy.taesd.taesd.TAESD.decode = torch.no_grad()(decode)
    try:
        said["no gradient"] = refusal(make(ADDTrainer, "m7", vae=blind))
    finally:
        comfy.taesd.taesd.TAESD.decode = decode
    metric.trunk.config = type(metric.trunk.config)(**{**metric.trunk.config.__dict__, "channels": 4})
    said["other latents"] = refusal(make(Diffusion2GANTrainer, "m8", perceptual=metric))
    said["left over"] = (
        sorted(path.name for path in (folder / "loras" / "turbo_distill").glob("m*"))
        if (folder / "loras").exists()
        else []
    )
    return said


if __name__ == "__main__":
    write("parts", [attention, decoders, mini_tokens, visions, gradients, identities, finished, mistakes])

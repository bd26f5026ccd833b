"""Runs inside the host's Python: networks that are told more of every picture than its latent.  probe_items.py FOLDER

Each function measures one thing and returns what JSON can hold; test_items_in_graph.py says what it must be.
"""

from host_tools import PATHS, Warnings, a_run, excite, folder, host_denoised, latents, load, relative, write

# isort: split
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import comfy.sd
import comfy.utils
import comfy_extras.nodes_train as core_train
import folder_paths
import tiny_models
import torch
from pack.distill_core.data.dataset import Batch, LatentDataset
from pack.distill_core.data.masks import MaskConfig, for_latents, for_pixels
from pack.distill_core.data.pictures import PictureConfig, find, read_file_into
from pack.distill_core.data.real import save_latents
from pack.distill_core.files import load_tensors
from pack.distill_core.lora_files import save_lora
from pack.distill_core.models.denoiser import Cond, Denoiser
from pack.distill_core.models.guidance import GuidedTwice, guided
from pack.distill_core.models.items import (
    IMAGE_STRENGTH,
    MASK,
    MASKED_IMAGE,
    PIXEL_MASK,
    REFERENCE,
    SOURCE_IMAGE,
    TEXT_STRENGTH,
)
from pack.distill_core.models.lora import is_linear
from pack.distill_core.models.strengths import StrengthEmbedding, StrengthsConfig
from pack.distill_core.training.loop import training_step
from pack.nodes.host import pictures as own_pictures
from pack.nodes.host.architectures import architecture_of
from pack.nodes.host.backend import training_backend
from pack.nodes.host.datasets import open_dataset
from pack.nodes.host.edits import make_edits
from pack.nodes.host.items import STRENGTHS, items_of, takes_references
from pack.nodes.host.results import with_turbo_lora
from pack.nodes.host.sampling import ImageByImage
from pack.nodes.host.shown import Shown, keep_items, of_items
from pack.nodes.host.side_by_side import sample_prompts, teacher_recipe
from pack.nodes.host.strengths import KIND, ToldStrengths, with_strengths
from probe_gradients import errors_of_student
from safetensors.torch import save_file

BY_REFERENCE = ("flux", "flux2", "qwen-image")  # of FLUX.1 Kontext's type the first
NETWORKS = [*tiny_models.WITH_ITEMS, *BY_REFERENCE]
EDITING, DEFAULT = ("sd15 editing", "flux control", *BY_REFERENCE), (7.5, 1.5)  # strengths of text and picture
PATHS |= {name: tiny_models.write(name, folder) for name in tiny_models.WITH_ITEMS}


class Pictures:
    """Two pictures: what a dataset has of them (``tensors``), and what the host's nodes write (`conditioning`)."""

    def __init__(self, network: str, model) -> None:
        generator = torch.Generator().manual_seed(7)
        self.network, shape = network, latents(network).shape
        self.raw = torch.randn(shape, generator=generator)
        self.mask = torch.nn.functional.interpolate(
            (torch.rand(2, 1, 8, 12, generator=generator) > 0.5).float(), scale_factor=8
        )
        if network == "flux fill":  # which alone sees single pixels
            self.mask = (torch.rand(2, 1, 64, 96, generator=generator) > 0.5).float()
        if network in BY_REFERENCE:  # of another size than what is made
            self.raw = torch.randn(2, shape[1], 6, 8, generator=generator)
        self.raw = self.raw.unsqueeze(2) if model.model.latent_format.latent_dimensions == 3 else self.raw
        inside = model.model.process_latent_in(self.raw)
        every = {
            REFERENCE: inside[:, :, 0] if inside.ndim == 5 else inside,
            MASKED_IMAGE: inside,
            SOURCE_IMAGE: inside,
            MASK: for_latents(self.mask, 8),
            PIXEL_MASK: for_pixels(self.mask),
        }
        self.tensors = {name: every[name] for name in tensors_of(model)}

    def conditioning(self, row: int) -> list:
        (context, options), *_ = tiny_models.conditioning(self.network, row + 1)
        if REFERENCE in self.tensors:
            return [[context, options | {"reference_latents": [self.raw[[row]]]}]]
        mask = {"concat_mask": self.mask[[row]]} if MASKED_IMAGE in self.tensors else {}
        return [[context, options | {"concat_latent_image": self.raw[[row]], **mask}]]

    def cond(self, backend) -> Cond:
        texts = [entry for row in range(2) for entry in tiny_models.conditioning(self.network, row + 1)]
        return backend.cond(texts).with_items(self.tensors)


def tensors_of(model) -> list[str]:
    return [*items_of(model.model), *([REFERENCE] if takes_references(model.model) else [])]


def names() -> dict:
    """Which tensors each network takes, those of ordinary ones among them."""
    return {name: tensors_of(load(name)) for name in (*NETWORKS, "sd15", "sd3", "wan")}


def guided_by_reference() -> dict:
    """Guidance of text and picture against the host's own answers: with both, with the picture, with neither."""
    result = {}
    for network in BY_REFERENCE:
        model = load(network)
        pictures, x, time = Pictures(network, model), latents(network), torch.tensor([0.8, 0.3])
        strengths = torch.tensor([3.0, 2.0]), torch.tensor([1.5, 1.0])
        empty = tiny_models.conditioning(network, 9)
        with training_backend(model) as backend, torch.no_grad():
            sigma = backend.process.sigma_at_flow_time(time)
            teacher = guided(Denoiser(backend), backend.cond(empty), 1.0)
            told = dict(zip((TEXT_STRENGTH, IMAGE_STRENGTH), strengths, strict=True))
            ours = teacher(x, sigma, pictures.cond(backend).with_items(told))
        with torch.inference_mode():
            both, picture, neither = (
                torch.cat([host_denoised(model, asked(i), x[[i]], sigma[[i]]) for i in range(2)])
                for asked in (
                    pictures.conditioning,
                    lambda i, pictures=pictures, empty=empty: [
                        [empty[0][0], pictures.conditioning(i)[0][1] | empty[0][1]]
                    ],
                    lambda i, empty=empty: empty,
                )
            )
        text, image = (strength.view(2, 1, 1, 1) for strength in strengths)
        theirs = neither + image * (picture - neither) + text * (both - picture)
        result[network] = {
            "difference": relative(ours, theirs),
            "effect": relative(picture, neither),
            "kind": type(teacher) is GuidedTwice,
        }
    return result


def same_as_sampling() -> dict:
    """The teacher on items against the host's own sampling with what its nodes write; and how much these matter."""
    result = {}
    for network in NETWORKS:
        model = load(network)
        pictures, x, time = Pictures(network, model), latents(network), torch.tensor([0.8, 0.3])
        with training_backend(model) as backend, torch.no_grad():
            sigma, cond = backend.process.sigma_at_flow_time(time), pictures.cond(backend)
            ours = Denoiser(backend)(x, sigma, cond)
            swapped = cond.with_items({name: value.flip(0) for name, value in pictures.tensors.items()})
            other = Denoiser(backend)(x, sigma, swapped)
        with torch.inference_mode():
            theirs = torch.cat([host_denoised(model, pictures.conditioning(i), x[[i]], sigma[[i]]) for i in range(2)])
        result[network] = {"difference": relative(ours, theirs), "effect": relative(other, ours)}
    return result


def gradients() -> dict:
    """As in probe_gradients.py, on items."""
    result = {}
    for network in NETWORKS:
        model = load(network)
        result |= errors_of_student(network, model, Pictures(network, model).cond)
    return result


def steps() -> dict:
    """A step of LADD: how far it moved the student."""
    result = {}
    for network in NETWORKS:
        model = load(network)
        pictures = Pictures(network, model)
        with training_backend(model) as backend:
            result[network] = moved_by_a_step(a_run(backend, [], latents(network), pictures.cond(backend)))
    return result


def moved_by_a_step(run) -> float:
    before = [p.detach().clone() for p in run.student_parameters.values()]
    training_step(run)
    return max((a - b).abs().max().item() for a, b in zip(run.student_parameters.values(), before, strict=True))


def exported_loras() -> dict:
    """The student's LoRA through core's two ways of loading one, sampled with what the host's nodes write."""
    result = {}
    for network in NETWORKS:
        model, x = load(network), latents(network)
        pictures = Pictures(network, model)
        with training_backend(model) as backend:
            path = backend.new_lora(3)
            excite(path)
            sigma = backend.process.sigma_at_flow_time(torch.tensor([0.8, 0.3]))
            with torch.no_grad():
                cond = pictures.cond(backend)
                ours, teacher = Denoiser(backend, path)(x, sigma, cond), Denoiser(backend)(x, sigma, cond)
            lora = backend.export(path)
        save_file(lora, folder / "lora.safetensors")
        with torch.inference_mode(), Warnings() as warnings:
            file = comfy.utils.load_torch_file(str(folder / "lora.safetensors"), safe_load=True)
            loaded, _ = comfy.sd.load_lora_for_models(model, None, file, 1.0, 0.0)
            as_model = core_train.LoraModelLoader.execute(model, lora, 1.0)[0]
            images = [
                torch.cat([host_denoised(m, pictures.conditioning(i), x[[i]], sigma[[i]]) for i in range(2)])
                for m in (loaded, as_model)
            ]
        result[network] = {
            "difference": max(relative(image, ours) for image in images),
            "effect": relative(ours, teacher),
            "warnings": warnings.texts,
        }
    return result


def reports() -> dict:
    """What a report shows of a run on pictures to fill: the guided teacher, outside and inside the hole."""
    result = {}
    for network in ("sd15 inpainting", "flux fill"):
        model, x = load(network), latents(network)
        pictures = Pictures(network, model)
        pictures.tensors |= {
            name: value * upper_half(value) for name, value in pictures.tensors.items() if "mask" in name
        }
        shown, asked, made = reported(model, pictures, x)
        with torch.inference_mode():
            alone = sample_prompts(model, shown.prompts[:1], None, negatives=shown.negatives[:1], **first_row(asked))
        hole = (shown.mask > 0).expand_as(made)
        result[network] = {
            "picture": relative(shown.latent, model.model.process_latent_out(x)),
            "given": [text for text, _ in shown.given],
            "outside": torch.equal(made[~hole], shown.latent[~hole]) and not hole.all(),
            "inside": relative(made[hole], shown.latent[hole]),
            "alone": relative(made[:1], alone),
        }
    return result


def reported(model, pictures: Pictures, x: torch.Tensor) -> tuple[Shown, dict, torch.Tensor]:
    """What a report of a run on the pictures shows, how it samples, and what the guided teacher makes."""
    with training_backend(model) as backend:
        empty = backend.cond(tiny_models.conditioning(pictures.network, 9))
        keep_items(folder, Batch(x, pictures.cond(backend)), empty)
    with torch.inference_mode():
        shown = of_items(model, folder, 10)
        asked = dict(latent=shown.latent, mask=shown.mask, recipe=teacher_recipe(model, 2, 2.0), seed=0)
        made = sample_prompts(model, shown.prompts, None, negatives=shown.negatives, **asked)
    return shown, asked, made


def with_other_references(rows: Sequence[list]) -> list[list]:
    """The conditionings, each with what another one goes by."""
    name = "reference_latents"
    return [
        [[tokens, values | {name: other[name]}]]
        for ((tokens, values),), ((_, other),) in zip(rows, rows[::-1], strict=True)
    ]


def reports_by_reference() -> dict:
    """What a report shows of a run on pictures to edit, and how much the teacher goes by them."""
    result = {}
    for network in BY_REFERENCE:
        model, x = load(network), latents(network)
        pictures = Pictures(network, model)
        shown, asked, made = reported(model, pictures, x)
        prompts, negatives = (with_other_references(rows) for rows in (shown.prompts, shown.negatives))
        with torch.inference_mode():
            swapped = sample_prompts(model, prompts, None, negatives=negatives, **asked)
        ((text, given),) = shown.given
        result[network] = {
            "given": text,
            "picture": relative(given, pictures.raw),
            "shape": list(made.shape) == list(shown.latent.shape) == list(tiny_latent(network, x).shape),
            "effect": relative(made, swapped),
        }
    return result


def tiny_latent(network: str, x: torch.Tensor) -> torch.Tensor:
    """Latents in the host's layout."""
    return x.unsqueeze(2) if tiny_models.empty_latent(network).ndim == 5 else x


def upper_half(value: torch.Tensor) -> torch.Tensor:
    return (torch.arange(value.shape[-2]) < value.shape[-2] // 2).float().view(-1, 1)


def first_row(asked: dict) -> dict:
    return asked | {"latent": asked["latent"][:1], "mask": asked["mask"][:1]}


def told_strengths() -> dict:
    """A student that is told strengths, as it is trained; its file by our loader and core's, and Editing Strengths on
    that."""
    result, loras = {}, folder / "loras"
    folder_paths.add_model_folder_path("loras", str(loras))
    for network in EDITING:
        model, x, sigma = load(network), latents(network), torch.tensor([0.8, 0.3])
        pictures, file = Pictures(network, model), loras / f"{network}.safetensors"
        ours = told_answers(model, pictures, x, sigma, file)

        def answer(either, network=network, pictures=pictures, x=x, sigma=sigma) -> torch.Tensor:
            return torch.cat([host_denoised(either, pictures.conditioning(i), x[[i]], sigma[[i]]) for i in range(2)])

        tensors, metadata = load_tensors(file)
        with torch.inference_mode(), Warnings() as own:
            loaded = with_turbo_lora(model, file)
        with torch.inference_mode(), Warnings() as cores:
            half = comfy.sd.load_lora_for_models(model, None, tensors, 0.5, 0.0, lora_metadata=metadata)[0]
        with torch.inference_mode():
            plain, found = answer(loaded), {"warnings": own.texts, "core's warnings": cores.texts}
            found["default"] = relative(plain, ours[DEFAULT])
            told = loaded
            for asked, strengths in (((4.0, 0.0), (4.0, 1.5)), ((0.0, 1.1), (7.5, 1.1))):  # one after the other
                told, said = with_strengths(told, *asked)
                other = {"difference": relative(answer(told), ours[strengths]), "effect": relative(plain, answer(told))}
                found[str(strengths)] = other | {"said": said}
            found["taken back"] = relative(answer(with_strengths(told, 0.0, 0.0)[0]), plain)
            found["left alone"] = relative(answer(loaded), plain)
            added = [wrapper_of(with_strengths(either, 4.0, 0.0)[0]).added for either in (loaded, half)]
            found["at half strength"] = relative(2 * added[1], added[0])
        found["beyond"] = refusal(lambda loaded=loaded: with_strengths(loaded, 11.0, 0.0))
        found["no such lora"] = refusal(lambda model=model: with_strengths(model, 4.0, 0.0))
        result[network] = found
    return result


def told_answers(model, pictures: Pictures, x: torch.Tensor, sigma: torch.Tensor, file: Path) -> dict:
    """{strengths of text and picture: what a student makes of ``x`` when it is told them}; the student's file."""
    layer, spans = architecture_of(model.model.diffusion_model).modulation, {TEXT_STRENGTH: [3.0, 7.5, 10.0]}
    spans |= {IMAGE_STRENGTH: [1.0, 1.5, 2.0]}
    with training_backend(model) as backend, torch.no_grad():
        path, place = backend.new_lora(3), backend.network.get_submodule(layer)
        excite(path, EDITING.index(pictures.network))  # two files of the same LoRA would be taken for each other
        width = [module for module in place.modules() if is_linear(module)][-1].out_features
        told = StrengthEmbedding(place, width, StrengthsConfig(True, *DEFAULT, 16))
        told.out.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(3))
        student, cond, answers = Denoiser(backend, path), pictures.cond(backend), {}
        for strengths in (DEFAULT, (4.0, 1.5), (7.5, 1.1)):
            told.added = told(torch.tensor([strengths, strengths]))  # of each row, as `told.told` has it in training
            answers[strengths] = student(x, sigma, cond)
        said = {"method": "LADD", "sigmas": [1.0], "sampler": "renoise", "strengths": spans}
        save_lora(file, backend.export(path) | told.export(), said)
        told.handle.remove()
    return answers


def wrapper_of(model) -> ToldStrengths:
    (wrapper,) = model.wrappers[KIND][ImageByImage.KEY]
    return wrapper


def refusal(function) -> str:
    try:
        function()
    except ValueError as error:
        return str(error)
    return "accepted"


def small(vae, model, images: torch.Tensor) -> torch.Tensor:
    """For latents: the pictures, an eighth as large."""
    return torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), 8).repeat(1, 16, 1, 1)


def with_small_latents() -> None:
    folder_paths.set_output_directory(str(folder))
    own_pictures.latents_of, own_pictures.autoencoder_of = small, lambda vae: torch.nn.Linear(1, 1)


class SeeingClip:
    """For a text encoder of billions of weights: it keeps what the host's node has it encode."""

    tokenizer = SimpleNamespace(llama_template_images="")

    def __init__(self) -> None:
        self.asked: list[tuple[str, list, bool]] = []

    def tokenize(self, text: str, images: Sequence[torch.Tensor] = (), llama_template: str = "") -> int:
        self.asked.append((text, [image.clone() for image in images], bool(llama_template)))
        return len(self.asked)

    def encode_from_tokens_scheduled(self, tokens: int) -> list:
        """Longer where there was a picture, as such an encoder makes it."""
        length = 5 if self.asked[tokens - 1][1] else 3
        return [[torch.full((1, length, tiny_models.CONTEXT["qwen-image"]), float(tokens)), {}]]


def shown_sources() -> dict:
    """What Picture Folder makes of pictures before and after for models that go by a reference, and what their text
    encoder was shown."""
    with_small_latents()
    config = PictureConfig(
        size=64, step=16, dtype="float32", sources=str(own_pictures.folder_of(own_pictures.SOURCE_EXAMPLES))
    )
    after = own_pictures.EDITED_EXAMPLES
    pictures = [picture for _, picture in sorted(find(own_pictures.folder_of(after)).items())]
    result = {}
    for kind in (own_pictures.TEXT_ALONE, *own_pictures.SEEN):
        clip, name = SeeingClip(), f"seen-{kind}"
        parts = load("qwen-image"), None, after, name, config, MaskConfig(), lambda text: None
        made = own_pictures.make_picture_dataset(*parts, clip=clip, source_in_text=kind)
        dataset = LatentDataset(made)
        items = dataset.read(dataset.largest)
        sources = [Path(config.sources) / path.name for path in pictures]
        expected = torch.cat([small(None, None, read_file_into(path, (64, 64), "white")[None]) for path in sources])
        seen = [(text, images, template) for text, images, template in clip.asked if images]
        result[kind] = {
            "tensors": sorted(dataset.conditions),
            "sources": relative(items.cond.extra[REFERENCE], expected),
            "differ": relative(items.latents, expected),
            "texts": [text for text, _, _ in clip.asked if text][:1],
            "seen": len(seen),
            "sizes": sorted({tuple(image.shape) for _, images, _ in seen for image in images}),
            "templates": [template for *_, template in seen][:1],
            "own": all(
                relative(small(None, None, images[0].movedim(-1, 1)).mean((2, 3)), (source[None] + 1).mean((2, 3)) / 2)
                < 1e-3
                for (_, images, _), source in zip(seen, expected, strict=False)
            ),
            "rows": items.cond.context[:, 0, 0].tolist(),
        }

    def make(name: str, model: str, clip, **more):
        settings = more.pop("config", config)
        masks = more.pop("masks", MaskConfig())
        parts = load(model), None, after, name, settings, masks, lambda text: None
        return refusal(lambda: own_pictures.make_picture_dataset(*parts, clip=clip, **more))

    seen = list(own_pictures.SEEN)[0]
    blind = SeeingClip()
    blind.tokenizer = SimpleNamespace()
    result["refused"] = {
        "another way": make(f"seen-{seen}", "qwen-image", SeeingClip(), source_in_text=list(own_pictures.SEEN)[1]),
        "blind": make("blind", "qwen-image", blind, source_in_text=seen),
        "no sources": make(
            "none", "qwen-image", SeeingClip(), source_in_text=seen, config=PictureConfig(size=64, step=16)
        ),
        "masks": make("masked", "qwen-image", SeeingClip(), masks=MaskConfig(source="random")),
        "no input": make("plain", "sd15", SeeingClip()),
    }
    return result


def edits_by_reference() -> dict:
    """What Teacher Edits makes of the pictures of `shown_sources`, and how far a step on it moves a student."""
    with_small_latents()
    model, pairs = load("qwen-image"), folder / "turbo_distill" / "datasets" / "seen-Qwen-Image-Edit"
    settings = dict(count=14, steps=2, text=(2.0, 3.0), image=(1.0, 1.5), pairs_for_steps=1, dtype="float32")
    made = LatentDataset(make_edits(model, pairs, "edits", **settings))
    items, given = made.read(made.largest), LatentDataset(pairs)
    theirs = given.read(given.largest).cond.extra[REFERENCE][[i % 12 for i in range(14)]]
    with training_backend(model) as backend:
        moved = moved_by_a_step(a_run(backend, [], items.latents[:2], items.cond[[0, 1]]))
        text = backend.cond(tiny_models.conditioning("qwen-image"))
    save_latents(list(items.latents[:2]), [text], text, folder / "texts", {"family": "qwen-image"})
    return {
        "tensors": sorted(made.conditions),
        "sources": relative(items.cond.extra[REFERENCE], theirs),
        "differ": relative(items.latents, theirs),
        "spans": {name: [f(items.cond.extra[name]).item() for f in (torch.min, torch.max)] for name in STRENGTHS},
        "states": list(items.states.shape),
        "moved": moved,
        "texts alone": refusal(lambda: make_edits(model, folder / "texts", "none", **settings)),
        "no editor": refusal(lambda: make_edits(load("sd15"), pairs, "none", **settings)),
    }


def told_guidance() -> dict:
    """What items of Picture Folder, and their empty text, say of the guidance that the network is told."""
    with_small_latents()
    texts = dict(positive=tiny_models.conditioning("flux fill"), negative=tiny_models.conditioning("flux fill", 2))
    parts = own_pictures.EXAMPLES, "told", PictureConfig(size=64, step=16, dtype="float32")
    asked = [*parts, MaskConfig(source="random"), lambda text: None]
    made = LatentDataset(
        own_pictures.make_picture_dataset(load("flux fill"), None, *asked, **texts, embedded_guidance=30.0)
    )
    return {
        "items": made.read(made.largest).cond.guidance.tolist(),
        "empty": made.uncond().guidance.tolist(),
        "tensors": sorted(made.conditions),
        "no input": refusal(lambda: own_pictures.check_told_guidance(load("sd15 inpainting"))),
        "another": refusal(
            lambda: own_pictures.make_picture_dataset(load("flux fill"), None, *asked, **texts, embedded_guidance=3.5)
        ),
    }


def mistakes() -> dict:
    """Items for a model that has no input for them, and none for one that takes some."""
    filling, plain = load("sd15 inpainting"), load("sd15")
    pictures = Pictures("sd15 inpainting", filling)

    with training_backend(plain) as backend:
        masked = pictures.cond(backend)
        rows = [masked[[row]] for row in range(2)]
        texts = [backend.cond([entry]) for entry in tiny_models.conditioning("sd15") * 2]
        result = {"no input": refusal(lambda: Denoiser(backend)(latents("sd15"), torch.ones(2), masked))}
    for name, conds in (("masked", rows), ("plain", texts)):
        save_latents(list(latents("sd15")), conds, texts[0], folder / name, {"family": "sd15"})
    for name, model in (("masked", filling), ("masked", plain), ("plain", filling), ("plain", plain)):
        kind = "filling" if model is filling else "ordinary"
        result[f"{name}, {kind}"] = refusal(lambda name=name, model=model: open_dataset(folder / name, model, False))
    return result


if __name__ == "__main__":
    of_training = [names, same_as_sampling, guided_by_reference, gradients, steps]
    of_data = [shown_sources, edits_by_reference, told_guidance, mistakes]
    write("items", [*of_training, exported_loras, reports, reports_by_reference, told_strengths, *of_data])

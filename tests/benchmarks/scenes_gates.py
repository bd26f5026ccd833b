"""Whether the scenes are a ground on which detail counts: ``scenes_gates.py --out DIR``; figures in docs/scenes.md.

1. The teacher's words, by the held-out classifiers, at each guidance; on seen and on held-out combinations of words.
2. The detail that a student keeps who was trained by regression alone, at one step, beside the teacher's own pictures.
3. Whether a discriminator on the teacher's features tells that frozen student from the teacher.

Each stage is written when it is done, and a stopped command goes on. One thread.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from distill_core.data.cache import CacheConfig, cache_latents
from distill_core.data.dataset import LatentDataset
from distill_core.data.scenes import draw_rows, render
from distill_core.diffusion.schedules import shifted_sigmas
from distill_core.digests import fingerprint
from distill_core.evaluation.detail import detail_columns, detail_figures
from distill_core.evaluation.intervals import Bootstrap, Figure
from distill_core.evaluation.own import distance_columns, image_columns, own_figures
from distill_core.evaluation.plots import sample_grid
from distill_core.evaluation.samples import evaluation_samples
from distill_core.files import save_json
from distill_core.methods.components import Components
from distill_core.methods.config import MethodConfig
from distill_core.methods.diffusion2gan import Diffusion2GANConfig
from distill_core.methods.ladd import LADDConfig
from distill_core.models import scenes
from distill_core.models.denoiser import Denoiser, Guided
from distill_core.models.shipped import images_of
from distill_core.training.loop import Run, copy_into, train
from distill_core.training.loop_config import TrainConfig
from distill_core.training.run import RunConfig, StudentConfig, new_run

SHOWN = list(range(0, 108, 12))  # items of the sheet


def prompts(held_out: bool) -> Tensor:
    return scenes.combinations(held_out)


def samples(model, steps: int, words: Tensor, count: int, sampler: str = "euler") -> Tensor:
    """Latents [count, 16, 8, 8]; item i has prompt i mod their number."""
    conds = scenes.encode_text([scenes.caption(row) for row in words.tolist()])
    sigmas = shifted_sigmas(steps, shift_alpha=1.0)
    return evaluation_samples(model, sigmas, conds, scenes.LATENT_SHAPE, seed=0, count=count, size=216, sampler=sampler)


@torch.no_grad()
def decode(latents: Tensor) -> Tensor:
    decoder = scenes.load_autoencoder().decoder
    return torch.cat([images_of(decoder, part) for part in latents.split(100)])


@torch.no_grad()
def words_found(latents: Tensor, images: Tensor, words: Tensor) -> dict[str, float]:
    """How often each classifier finds the word that was asked for, by group."""
    asked, found = words[torch.arange(len(latents)) % len(words)], {}
    for space, x in {"latent": latents, "pixel": images}.items():
        logits = scenes.by_group(torch.cat([scenes.load_classifier(space)[0](part) for part in x.split(250)]))
        for (group, part), word in zip(logits.items(), asked.T, strict=True):
            found[f"{group}, {space}"] = round((part.argmax(1) == word).float().mean().item(), 3)
    return found


def figures(latents: Tensor, images: Tensor, own: tuple[Tensor, Tensor]) -> dict[str, list[float]]:
    """Detail, and what is kept of the teacher's own pictures: value and 95 % interval."""
    bootstrap = Bootstrap(len(latents), 1)
    found = detail_figures(detail_columns(images), bootstrap)
    found |= own_figures(distance_columns(latents, own[0]), image_columns(images, own[1]), bootstrap)
    return {name: in_numbers(figure) for name, figure in found.items()}


def in_numbers(figure: Figure) -> list[float]:
    return [round(number, 4) for number in (figure.value, *figure.interval())]


def teacher_at(guidance: float) -> Guided:
    return Guided(Denoiser(scenes.scenes_backend()), scenes.encode_text([""]), guidance)


def draw_sheet(path: Path, words: Tensor, students: dict[str, Tensor]) -> None:
    """Prompts above; real pictures, the teacher at 25, 4 and 1 steps, and pictures of students below."""
    chosen, teacher = words[SHOWN], teacher_at(scenes.GUIDANCE)
    rows = {"real": render(chosen, draw_rows(3, SHOWN))[0]}
    for steps in (25, 4, 1):
        rows[f"teacher, {steps} steps"] = decode(samples(teacher, steps, words, SHOWN[-1] + 1)[SHOWN])
    captions = [scenes.caption(row).replace(" ", "\n") for row in chosen.tolist()]
    sample_grid([*rows.items(), *students.items()], captions, path)


def gate_teacher(guidances: list[float], count: int) -> dict:
    report = {}
    for guidance in guidances:
        for name, held_out in (("seen", False), ("held out", True)):
            words = prompts(held_out)
            latents = samples(teacher_at(guidance), 25, words, count)
            report[f"{name}, guidance {guidance:g}"] = words_found(latents, decode(latents), words)
            print(name, guidance, report[f"{name}, guidance {guidance:g}"], flush=True)
    return report


def run_of(method: MethodConfig, loop: TrainConfig, dataset: LatentDataset, rank: int) -> Run:
    backend = scenes.scenes_backend()
    identities = {"base": fingerprint(backend.network), "dataset": dataset.digest()}
    student = StudentConfig(rank, sampler="ancestral", sampler_options={"eta": 1.0})
    config = RunConfig(method, loop, student, identities, taps=tuple(backend.tap_names), guidance=scenes.GUIDANCE)
    return new_run(config, Components(backend), dataset)


def trained(run: Run, name: str) -> list[dict]:
    logs = []
    for event in tqdm(train(run), total=run.config.steps, desc=name, mininterval=5):
        logs.append(event.logs)
    return logs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=432, help="pictures of each model")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.5, 2.0, 3.0])
    parser.add_argument("--items", type=int, default=2160, help="paths of the teacher that the student is trained on")
    parser.add_argument("--steps", type=int, default=420, help="of the regression student")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    report_file = args.out / "gates.json"
    report = json.loads(report_file.read_text()) if report_file.exists() else {}

    def record(name: str, entry: dict) -> None:
        report[name] = entry
        save_json(report_file, report)
        print(json.dumps({name: entry}, indent=1), flush=True)

    if "teacher" not in report:
        record("teacher", gate_teacher(args.guidance, args.count))

    seen, teacher = prompts(False), teacher_at(scenes.GUIDANCE)
    own_latents = samples(teacher, 25, seen, args.count)
    own = own_latents, decode(own_latents)
    if "teacher's detail" not in report:
        entry = {}
        for steps in (25, 8, 4, 1):
            latents = samples(teacher, steps, seen, args.count)
            entry[str(steps)] = figures(latents, decode(latents), own)
        record("teacher's detail", entry)

    cache = CacheConfig(
        count=args.items,
        steps=25,
        guidance=scenes.GUIDANCE,
        sizes=(scenes.LATENT_SHAPE[1:],),
        state_sigmas=(1.0,),
        shard_size=540,
        batch_size=108,
        seed=args.seed + 1,
    )
    conds, folder = scenes.encode_text([scenes.caption(w) for w in seen.tolist()]), args.out / "dataset"
    with tqdm(total=cache.count, desc="paths", mininterval=5) as bar:
        made_from = {"base": fingerprint(scenes.load_transformer())}
        for done, _, _ in cache_latents(teacher, conds, scenes.LATENT_SHAPE[0], cache, folder, made_from):
            bar.update(done - bar.n)
    dataset = LatentDataset(folder)

    loop = TrainConfig(args.steps, 32, student_lr=6e-4 if args.rank else 3e-4, discriminator_lr=4e-3, seed=args.seed)
    pairs = Diffusion2GANConfig({"pairs": 1.0}, regression="mse")
    run, cpu = run_of(pairs, loop, dataset, args.rank), time.process_time()
    logs = trained(run, "regression")
    cpu = time.process_time() - cpu
    with run.ema_weights():
        latents = samples(run.method.student, 1, seen, args.count)
    images = decode(latents)
    entry = {"cpu_s": round(cpu), "loss": logs[-1]["pairs"], **words_found(latents, images, seen)}
    record("regression student, 1 step", entry | figures(latents, images, own))
    draw_sheet(args.out / "scenes.png", seen, {"regression, 1 step": images[SHOWN]})

    probe = LADDConfig({"adversarial": 1.0}, (1.0,), (1.0,), (1.0,), renoise_mean=0.0)
    watch = run_of(
        probe, TrainConfig(150, 32, student_lr=1e-12, discriminator_lr=4e-3, seed=args.seed), dataset, args.rank
    )
    copy_into(watch.student_parameters, run.ema)
    logs = trained(watch, "discriminator")
    accuracy = [sum(entry["accuracy"] for entry in logs[i : i + 30]) / 30 for i in range(0, 150, 30)]
    record("discriminator beside the frozen student", {"accuracy, every 30 steps": [round(a, 3) for a in accuracy]})


if __name__ == "__main__":
    main()

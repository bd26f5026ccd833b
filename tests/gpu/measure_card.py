"""What a card makes of a training step: ``python tests/gpu/measure_card.py`` writes its table into docs/gpu.md.

LADD with a LoRA on the mini model, whose step is short: its kernels are small, so it shows what a large model hides.
Every function takes a device, and those that mean something on a CPU are tested there (test_card_measures.py).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "benchmarks"), str(TESTS.parent)]

from measured import measured_peak  # noqa: E402
from number_formats import in_words, outcomes  # noqa: E402
from perceptual_cost import decode_and_compare, step, variants  # noqa: E402

from distill_core.diffusion.noise import ItemNoise  # noqa: E402
from distill_core.methods.components import Components  # noqa: E402
from distill_core.methods.ladd import LADDConfig  # noqa: E402
from distill_core.models import mini  # noqa: E402
from distill_core.models.backends.diffusers import DiffusersBackend  # noqa: E402
from distill_core.models.pipelines import MiniSource, ModelConfig  # noqa: E402
from distill_core.perceptual import load_metric  # noqa: E402
from distill_core.perceptual.metric import total, unit  # noqa: E402
from distill_core.perceptual.pixel import ImageNetDistance  # noqa: E402
from distill_core.training.ledger import without_data  # noqa: E402
from distill_core.training.loop import Run, training_step  # noqa: E402
from distill_core.training.loop_config import TrainConfig  # noqa: E402
from distill_core.training.plan import Shapes, plan_step  # noqa: E402
from distill_core.training.run import RunConfig, StudentConfig, assemble  # noqa: E402

RANK, WARM = 16, 3
OUTCOME = 60  # steps after which number formats are compared
PAGE = TESTS.parent / "docs" / "gpu.md"


def mini_run(device: str, batch: int, precision: str = "auto", **settings: bool) -> Run:
    """A run of the mini model on a device, on items of noise. settings: of the loop, such as ``compile``."""
    source = MiniSource(ModelConfig())
    source.backend.network.to(device)
    return assemble(describe(batch, precision, **settings), components(source), shapes(source))  # type: ignore[arg-type]


def describe(batch: int, precision: str, **settings: bool) -> RunConfig:
    train = TrainConfig(batch_size=batch, precision=precision, student_lr=1e-3, **settings)
    return RunConfig(LADDConfig(), train, StudentConfig(RANK), {"base": "", "dataset": ""})


def components(source: MiniSource) -> Components:
    return Components(source.backend, source.decode_with_gradient, source.encoder)


def shapes(source: MiniSource) -> Shapes:
    return Shapes(mini.LATENT_SHAPE, source.encode(["bag"])[0], (), 2.0)


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], object], device: str, times: int) -> float:
    """Median seconds of the work when the device has nothing else to do, after `WARM` calls that prepare it."""
    for _ in range(WARM):
        work()
    taken = []
    for _ in range(times):
        wait(device)
        started = time.perf_counter()
        work()
        wait(device)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def step_seconds(run: Run, device: str, times: int = 20) -> float:
    return seconds_of(lambda: training_step(run), device, times)


def peak_bytes(device: str, batch: int, precision: str = "auto") -> int:
    """Most bytes of tensors alive in a step after the first, those of the run included."""
    if device != "cuda":
        return measured_peak(lambda: _second_step(mini_run(device, batch, precision)))
    before = torch.cuda.memory_allocated()
    step = _second_step(mini_run(device, batch, precision))
    torch.cuda.reset_peak_memory_stats()
    step()
    wait(device)
    return torch.cuda.max_memory_allocated() - before


def _second_step(run: Run) -> Callable[[], object]:
    training_step(run)
    return lambda: training_step(run)


def planned_bytes(device: str, batch: int, precision: str = "auto") -> int:
    """What the planner says of the same step, without its allowance for CUDA itself."""
    source = MiniSource(ModelConfig())

    def make(mode) -> Components:
        network = without_data(source.backend.network, mode)
        return Components(DiffusersBackend(network, source.backend.process), source.decode_with_gradient)

    return plan_step(describe(batch, precision), make, shapes(source), card=device == "cuda").peak


def launches(run: Run, device: str) -> int:
    """Kernels that a step starts on a card; on a CPU, operators that it calls."""
    training_step(run)
    kind = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[kind]) as recorded:
        training_step(run)
        wait(device)
    events = recorded.profiler.kineto_results.events()
    names = ("[memory]", "Memcpy", "Memset", "cuda", "Profiler")
    return sum(not event.name().startswith(names) for event in events)


def waits(run: Run) -> int:
    """How often a step makes the CPU wait for the card: torch's own synchronisations, by its debug mode."""
    training_step(run)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            training_step(run)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in said)


def backbone_share(run: Run, device: str, times: int = 20) -> float:
    """The part of a step's time inside the forwards of the backbone, 0 to 1; backwards are not in it."""
    network = run.method.student.backend.network
    spans: list[float] = []

    def before(module, args):
        wait(device)
        spans.append(-time.perf_counter())

    def after(module, args, output):
        wait(device)
        spans[-1] += time.perf_counter()

    for _ in range(WARM):
        training_step(run)
    # A forward for features ends by an exception once the last block has been read: it counts, too.
    handles = [network.register_forward_pre_hook(before), network.register_forward_hook(after, always_call=True)]
    try:
        wait(device)
        started = time.perf_counter()
        for _ in range(times):
            training_step(run)
        wait(device)
        return sum(spans) / (time.perf_counter() - started)
    finally:
        for handle in handles:
            handle.remove()


def perceptual_seconds(device: str, batch: int, times: int = 20) -> float:
    """E-LatentLPIPS of the mini model's latents with the gradient by one of them."""
    metric = load_metric(None).to(device)
    x, y = (
        torch.randn(batch, *mini.LATENT_SHAPE, generator=torch.Generator().manual_seed(i)).to(device) for i in (0, 1)
    )
    x.requires_grad_()

    def work() -> None:
        x.grad = None
        metric(x, y, ItemNoise(0, range(batch))).sum().backward()

    return seconds_of(work, device, times)


def decoded_distance(device: str, batch: int) -> tuple[Callable[[], None], torch.Tensor]:
    """What E-LatentLPIPS does without: decode latents and compare the images, by the mini model's decoder and LPIPS's
    form on EfficientNet-lite0; and the latents, which get the gradient."""
    decode, network = MiniSource(ModelConfig()).decode_with_gradient, ImageNetDistance()
    network.network.to(device)
    x, y = (torch.randn(batch, *mini.LATENT_SHAPE, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    latents = x.to(device).requires_grad_()
    with torch.no_grad():
        aims = [unit(tap) for tap in network.taps(decode(y.to(device)))]

    def work() -> None:
        latents.grad = None
        taps = network.taps(decode(latents))
        total((unit(tap) - aim).square().sum(1).mean() for tap, aim in zip(taps, aims, strict=True)).backward()

    return work, latents


def full_size_perceptual(device: str, times: int = 20) -> tuple[float, float]:
    """Seconds of E-LatentLPIPS on one latent of SD at 512 px, and of decoding it with LPIPS on VGG16; with gradient."""
    ours = variants(4)["ours"].to(device)
    prediction, target = (torch.randn(1, 4, 64, 64, device=device) for _ in range(2))
    prediction.requires_grad_()
    return (
        seconds_of(lambda: step(ours, prediction, target), device, times),
        seconds_of(decode_and_compare(device), device, times),
    )


def two_cards() -> float:
    """Largest difference of the weights that two cards hold after a few steps; they should be the same."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        __file__,
        "--rank",
    ]
    done = subprocess.run(command, env=os.environ, check=True, capture_output=True, text=True, timeout=600)
    return float(done.stdout.split("apart by ")[1].split()[0])


def one_of_two() -> None:
    """What each process of `two_cards` does."""
    from accelerate import Accelerator

    accelerator = Accelerator()
    source = MiniSource(ModelConfig())
    source.backend.network.to(accelerator.device)
    run = assemble(describe(8, "auto"), components(source), shapes(source), accelerator=accelerator)  # type: ignore[arg-type]
    for _ in range(3):
        training_step(run)
        run.step += 1
    mine = torch.cat([value.detach().flatten() for value in run.student_parameters.values()])
    both = accelerator.gather(mine.unsqueeze(0))
    if accelerator.is_main_process:
        print(f"apart by {(both[0] - both[-1]).abs().max().item()}")
    accelerator.wait_for_everyone()


def table(device: str, batch: int, times: int = 20) -> list[tuple[str, str]]:
    """All that can be measured on the device, in words."""
    milliseconds = lambda seconds: f"{1000 * seconds:.1f} ms"  # noqa: E731
    peak, plan = peak_bytes(device, batch), planned_bytes(device, batch)
    rows = [
        ("a step", milliseconds(step_seconds(mini_run(device, batch), device, times))),
        ("a step in float32", milliseconds(step_seconds(mini_run(device, batch, "float32"), device, times))),
        ("peak of tensors", f"{peak / 2**20:.1f} MiB"),
        ("planned peak / measured", f"{plan / peak:.3f}"),
        (
            "kernels started in a step" if device == "cuda" else "operators of a step",
            f"{launches(mini_run(device, batch), device)}",
        ),
        (
            "forwards of the backbone, of the step's time",
            f"{backbone_share(mini_run(device, batch), device, times):.2f}",
        ),
        ("E-LatentLPIPS with its gradient", milliseconds(perceptual_seconds(device, batch, times))),
        (
            "decoding and comparing the images instead",
            milliseconds(seconds_of(decoded_distance(device, batch)[0], device, times)),
        ),
    ]
    rows += [
        (f"Fréchet distance after {OUTCOME} steps, {kind}", in_words(found))
        for kind, found in outcomes(OUTCOME, range(3), device).items()
    ]
    if device == "cuda":
        rows.append(("waits for the card in a step", f"{waits(mini_run(device, batch))}"))
        for name in ("compile", "channels_last"):
            seconds = step_seconds(mini_run(device, batch, **{name: True}), device, times)
            rows.append((f"a step with {name}", milliseconds(seconds)))
        ours, decoded = full_size_perceptual(device, times)
        rows.append(("E-LatentLPIPS, SD's latent of 512 px", milliseconds(ours)))
        rows.append(("SD's decoder and LPIPS-VGG16 instead", milliseconds(decoded)))
        if torch.cuda.device_count() > 1:
            rows.append(("two cards: weights apart by", f"{two_cards():g}"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rank", action="store_true", help="for two_cards, which starts this file itself")
    args = parser.parse_args()
    if args.rank:
        return one_of_two()
    if not torch.cuda.is_available():
        sys.exit("no CUDA card is at hand: nothing was measured")
    card = torch.cuda.get_device_name()
    what = f"torch {torch.__version__}, the mini model, LADD, rank {RANK}, batch {args.batch}"
    section = [what, "", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in table("cuda", args.batch))]
    PAGE.write_text(with_section(PAGE.read_text(), card, "\n".join(section)))
    print(card, *section, sep="\n")


def with_section(page: str, heading: str, text: str) -> str:
    """A Markdown page with the text under a heading of the second rank, in place of what stood there."""
    parts = page.rstrip().split("\n## ")
    kept = [part for part in parts if part.splitlines()[0] != heading]
    return "\n## ".join([*(part.rstrip() + "\n" for part in kept), f"{heading}\n\n{text}\n"])


if __name__ == "__main__":
    main()

"""Anonymous memory of a run whose blocks lie in a file, at full size, and whether its student is that of one without.

Runs in ComfyUI's Python on Linux, with a file of tests/full_size/write_models.py:
    python tests/benchmarks/offload_peak.py FILE NETWORK FOLDER [DTYPE SIDE BATCH RANK]

DTYPE: of MODEL's weights; "default" is what the host chooses on a CPU, float32 for a file in bfloat16.
LADD with a LoRA on a CPU, two steps, first with offload = "file" (its file is made in FOLDER), then, in the same
process and on the same MODEL, without. All figures are over what the process held before the model was loaded.
"""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "host"), str(TESTS / "full_size")]
from real_run import GIB, Watch, anonymous, begin_again, load, run_on, step  # noqa: E402

begin_again()
FILE, NAME, FOLDER, *SIZES = sys.argv[1:]  # entering the host takes the arguments
from launch import enter_host  # noqa: E402

enter_host()

import torch  # noqa: E402
from pack.distill_core.methods.ladd import LADDConfig  # noqa: E402
from pack.distill_core.training.loop_config import TrainConfig  # noqa: E402
from pack.distill_core.training.run import StudentConfig  # noqa: E402


def main(dtype: str = "bfloat16", side: int = 16, batch: int = 2, rank: int = 16) -> None:
    torch.randn(512, 512).requires_grad_().mm(torch.randn(512, 512)).sum().backward()  # threads and libraries
    before, watch = anonymous(), Watch()
    model = load(FILE, dtype)
    size = sum(p.numel() * p.element_size() for p in model.model.diffusion_model.parameters())
    print(f"{NAME}, {side} x {side} latents, batch {batch}, rank {rank}")
    print(f"weights in {model.model.get_dtype()}: {size / GIB:.3f} GiB")

    def said(what: str, amount: int) -> None:
        print(f"{what:45} {amount / GIB:.3f} GiB, {amount / size:.2f} of the weights", flush=True)

    said("loading: peak", watch.peak - before)
    students = []
    for offload in ("file", "none"):
        torch.manual_seed(0)  # of the batches, which `Shapes` draws
        train = TrainConfig(batch_size=batch, offload=offload)
        watch.again()
        with run_on(model, NAME, side, LADDConfig(warmup_steps=0), train, StudentConfig(rank), True, FOLDER) as run:
            said(f"offload {offload}: until the run is ready, peak", watch.peak - before)
            said(f"offload {offload}: when it is ready", anonymous() - before)
            watch.again()
            for number in range(2):
                step(run, number)
            said(f"offload {offload}: two steps, peak", watch.peak - before)
            students.append([value.detach().clone() for value in run.student_parameters.values()])
        del run
        said(f"offload {offload}: after it", anonymous() - before)
    same = all(torch.equal(a, b) for a, b in zip(*students, strict=True))
    moved = max(float(b.abs().max()) for b in students[0][1::2])
    print(f"the student is {'the same to the last bit' if same else 'ANOTHER ONE'} (largest value of a B: {moved:.1e})")


if __name__ == "__main__":
    main(*SIZES[:1], *map(int, SIZES[1:]))

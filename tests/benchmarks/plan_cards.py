"""What fits on which card: runs with one measure after the other until they fit, and what each measure costs.

Runs in ComfyUI's Python, and for GGUF with ComfyUI-GGUF (tests/host/gguf_pack.py):
    python tests/benchmarks/plan_cards.py FOLDER [NAME ...]

No weights and no GPU; a row takes about 20 CPU-seconds. Costs are a step's: forwards of the whole frozen network, and
bytes that come to the device and go from it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

sys.path.append(str(Path(__file__).resolve().parents[1] / "full_size"))

import plan_full_size as full  # enters the host
import torch
from comfy.quant_ops import QuantizedTensor, get_layout_class
from full_shapes import SHAPES
from pack.distill_core.methods.config import MethodConfig
from pack.distill_core.methods.ladd import LADDConfig
from pack.distill_core.models.denoiser import Cond
from pack.distill_core.models.items import REFERENCE
from pack.distill_core.models.lora import LoraConfig
from pack.distill_core.training.loop_config import TrainConfig
from pack.distill_core.training.plan import GIB, Plan, Shapes
from pack.distill_core.training.run import RunConfig, StudentConfig
from pack.nodes.host.architectures import architecture_of
from pack.nodes.host.parts import Parts
from pack.nodes.host.plan import plan_of, set_module

BF16, FP8, SCALED_FP8, Q4 = "bfloat16", "fp8", "scaled fp8", "GGUF Q4_K"
MEASURES = {  # in the order of what they cost
    "8 bit": {"optimizer": "adamw8bit"},
    "average": {"ema_in_ram": True},
    "inputs": {"offload_activations": True},
    "lora": {"lora_dtype": "bfloat16"},
    "swap": {"offload": "ram"},
}
ALL = tuple(MEASURES)
SPARE = GIB // 4  # of a card, which the driver or a screen has


@dataclass(frozen=True)
class Case:
    """A run on a card of so many GiB, and the measures to take one after the other."""

    model: str
    base: str
    rank: int
    batch: int
    card: int
    measures: tuple[str, ...] = ALL
    method: MethodConfig = LADDConfig()
    reference: bool = False  # whether it is shown a picture as large as what it makes


CASES = {
    "sdxl 12": Case("sdxl", BF16, 64, 4, 12),
    "sd35m 12": Case("sd35m", BF16, 64, 4, 12),
    "flux q4 12": Case("flux", Q4, 16, 2, 12),
    "flux scaled 16": Case("flux", SCALED_FP8, 16, 2, 16),
    "flux 24": Case("flux", BF16, 64, 2, 24, ("swap", "8 bit", "average", "inputs", "lora")),
    "zimage 16": Case("zimage", BF16, 16, 2, 16, ("swap",)),
    "zimage all 16": Case("zimage", BF16, 16, 2, 16),
    "zimage fp8 16": Case("zimage", FP8, 16, 2, 16),
    "qwen 24": Case("qwen", FP8, 16, 2, 24, ("swap", "8 bit", "average", "inputs", "lora")),
    "qwen q4 24": Case("qwen", Q4, 16, 2, 24),
    "kontext 24": Case("flux", BF16, 64, 2, 24, ("swap", "8 bit", "average", "inputs", "lora"), reference=True),
    "qwen edit 24": Case("qwen", FP8, 16, 2, 24, ("swap", "8 bit", "average", "inputs", "lora"), reference=True),
    "sd15 d2gan 8": Case("sd15", BF16, 64, 8, 8, (), full.D2GAN),
}


def model_of(name: str, base: str):
    """A MODEL of that size on the meta device, its blocks' linear layers in the format ``base``."""
    model = full.unloaded(name, full.FP8 if base == FP8 else full.BF16)
    if base in (SCALED_FP8, Q4):
        network = model.model.diffusion_model
        for layer in architecture_of(network).lora_targets(network):
            quantize(network, layer, base)
    return model


def quantize(network: torch.nn.Module, name: str, base: str) -> None:
    """Put a layer as its loader makes it in the place of a linear layer; weights on the meta device."""
    layer = network.get_submodule(name)
    if base == SCALED_FP8:
        layout = "TensorCoreFP8E4M3Layout"
        scale = torch.empty((), device="meta")
        params = get_layout_class(layout).Params(scale, full.BF16, tuple(layer.weight.shape))
        weight = QuantizedTensor(torch.empty(layer.weight.shape, dtype=full.FP8, device="meta"), layout, params)
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        return
    import gguf
    from gguf_pack import pack

    kind, ops = gguf.GGMLQuantizationType.Q4_K, pack().ops
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    raw = torch.empty(layer.out_features, layer.in_features // elements * size, dtype=torch.uint8, device="meta")
    stored = ops.GGMLTensor(raw, tensor_type=kind, tensor_shape=layer.weight.shape)
    other = ops.GGMLOps.Linear(layer.in_features, layer.out_features)
    other.weight, other.bias = torch.nn.Parameter(stored, requires_grad=False), layer.bias
    set_module(network, name, other)


def planned(case: Case, measures: tuple[str, ...]) -> Plan:
    """The plan of the case with those measures."""
    settings = {name: value for measure in measures for name, value in MEASURES[measure].items()}
    lora = LoraConfig(lora_dtype=settings.pop("lora_dtype", "float32"))
    train = replace(TrainConfig(batch_size=case.batch, precision="bfloat16"), **settings)
    student = StudentConfig(case.rank, lora=lora)
    config = RunConfig(case.method, train, student, {"base": "", "dataset": ""})
    latent, width, tokens, pooled = SHAPES[case.model]
    guidance = torch.full((1,), 3.5) if case.model == "flux" else None
    cond = Cond(torch.zeros(1, tokens, width), torch.zeros(1, pooled) if pooled else None, guidance)
    cond = cond.with_items({REFERENCE: torch.zeros(1, *latent)} if case.reference else {})
    model = model_of(case.model, case.base)
    request = SimpleNamespace(
        model=model, train=train, student=student, parts=Parts(), checkpointing=True, other_teacher=None
    )
    return plan_of(request, config, Shapes(latent, cond))


def cost(measure: str, plan: Plan, before: Plan) -> str:
    """What a measure costs a step. before: the plan without it."""
    moved = {
        "average": lambda: f"{before.parts['average'] / GIB:.2f} GiB to the host",
        "inputs": lambda: f"{plan.kept / GIB:.1f} GiB to the host and back",
        "swap": lambda: f"{plan.moved / GIB:.1f} GiB to the device",
    }
    return moved[measure]() if measure in moved else "-"


def main() -> None:
    print("| run | card | measure | peak with CUDA's own, GiB | fits | forwards a step | costs a step |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for name in full.WANTED or CASES:
        case, before = CASES[name], None
        shown = " with a reference" * case.reference
        run = f"{case.model}{shown} {case.method.name}, {case.base}, rank {case.rank}, batch {case.batch}"
        for count in range(len(case.measures) + 1):
            measures = case.measures[:count]
            plan = planned(case, measures)
            fits = plan.needed <= case.card * GIB - SPARE
            last = measures[-1] if measures else ""
            what = ", ".join(f"{k} {v}" for k, v in MEASURES[last].items()) if last else "none"
            forwards = f"{plan.forwards:.1f} ({plan.with_gradient:.1f} with a gradient)"
            costs = cost(last, plan, before) if before else "-"
            verdict = "yes" if fits else "no"
            print(
                f"| {run} | {case.card} | {what} | {plan.needed / GIB:.2f} | {verdict} | {forwards} | {costs} |",
                flush=True,
            )
            before = plan
            if fits:
                break
        print(plan.said(), flush=True)


if __name__ == "__main__":
    main()

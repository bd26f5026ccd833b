"""LoRAs on a shared backbone, added beside its layers, and the switch that says which of them is on.

Teacher, student and the discriminator's features are views of one network: a view turns its LoRA on (or all off)
around its forward. It is computed beside the frozen layer, f(x) + B A x, never as a changed weight, which would
cost a full weight gradient. Gradient checkpointing recomputes a block later, possibly under another view; the
checkpoint function of the switch restores the view that was on in the forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint


class LoraSwitch:
    """Which LoRA of a backbone is on; at most one is, None means the plain backbone."""

    def __init__(self) -> None:
        self.active: Lora | None = None
        # (owner, latents [B, C, H, W]): what a trainable discriminator feeds to the blocks (`discriminators`).
        self.inputs: tuple[object, Tensor] | None = None
        self.inside_checkpoint = False
        self.after_checkpoint: Callable[[], None] | None = None  # called when a checkpointed block has returned

    @contextmanager
    def on(self, lora: Lora | None, inputs: tuple[object, Tensor] | None = None) -> Iterator[None]:
        previous, (self.active, self.inputs) = (self.active, self.inputs), (lora, inputs)
        try:
            yield
        finally:
            self.active, self.inputs = previous

    def checkpoint(self, block: Callable, *args):
        """Run ``block(*args)`` under gradient checkpointing; the recompute sees the LoRA that is on now."""
        again = _RestoredView(self)
        self.inside_checkpoint = True
        try:
            result = checkpoint(block, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), again))
        finally:
            self.inside_checkpoint = False
        if self.after_checkpoint is not None:
            self.after_checkpoint()
        return result


class _RestoredView:
    """The view and the attention kernels of now, for a recompute later; a penalty's double backward enters it twice."""

    def __init__(self, switch: LoraSwitch) -> None:
        self.switch, self.view, self.kernels = switch, (switch.active, switch.inputs), attention_kernels()
        self.entered: list[ExitStack] = []

    def __enter__(self) -> None:
        stack = ExitStack()
        stack.enter_context(self.switch.on(*self.view))
        stack.enter_context(sdpa_kernel(self.kernels))
        self.entered.append(stack)

    def __exit__(self, *error) -> None:
        self.entered.pop().close()


def attention_kernels() -> list[SDPBackend]:
    """The kernels that torch's attention may choose from now; each saves other tensors for the backward."""
    cuda = torch.backends.cuda
    enabled = {
        SDPBackend.FLASH_ATTENTION: cuda.flash_sdp_enabled(),
        SDPBackend.MATH: cuda.math_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: cuda.mem_efficient_sdp_enabled(),
        SDPBackend.CUDNN_ATTENTION: cuda.cudnn_sdp_enabled(),
    }
    return [kernel for kernel, on in enabled.items() if on]


class Lora(nn.Module):
    """Matrices A [rank, in] and B [out, rank] per target linear layer; B starts at 0, so it starts without effect.

    network: the frozen backbone.  targets: names of ``nn.Linear`` modules in it.  rank: at least 1.
    alpha: its output is scaled by alpha / rank (default: rank, scale 1).  switch: the backbone's.
    Raises ValueError for an empty target list, a name that is not a linear layer, or a rank below 1.
    """

    def __init__(
        self, network: nn.Module, targets: Iterable[str], rank: int, switch: LoraSwitch, alpha: float | None = None
    ) -> None:
        super().__init__()
        self.targets = list(targets)
        if rank < 1 or not self.targets:
            raise ValueError("a LoRA needs a rank of at least 1 and at least one target layer")
        self.rank, self.scale = rank, (rank if alpha is None else alpha) / rank
        modules = dict(network.named_modules())
        wrong = [name for name in self.targets if not isinstance(modules.get(name), nn.Linear)]
        if wrong:
            raise ValueError(f"LoRA targets that are not linear layers of this network: {wrong}")
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        self.handles = []
        for index, name in enumerate(self.targets):
            layer = modules[name]
            down = torch.empty(rank, layer.in_features, device=layer.weight.device)
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))
            self.down.append(nn.Parameter(down))
            self.up.append(nn.Parameter(torch.zeros(layer.out_features, rank, device=layer.weight.device)))
            self.handles.append(layer.register_forward_hook(self._hook(index, switch)))

    def _hook(self, index: int, switch: LoraSwitch) -> Callable:
        def add_output(layer: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            if switch.active is not self:
                return None
            x = args[0].to(self.down[index].dtype)
            added = nn.functional.linear(nn.functional.linear(x, self.down[index]), self.up[index] * self.scale)
            return output + added.to(output.dtype)

        return add_output

    def remove(self) -> None:
        """Take the hooks off the backbone; it is as before."""
        for handle in self.handles:
            handle.remove()

    def export(self, prefix: str = "transformer") -> dict[str, Tensor]:
        """The LoRA in diffusers' and peft's layout, which core ComfyUI maps by itself; the scale is folded into B.

        A copy: training that goes on does not change it.
        """
        state = {}
        for name, down, up in zip(self.targets, self.down, self.up, strict=True):
            state[f"{prefix}.{name}.lora_A.weight"] = down.detach().clone().cpu().contiguous()
            state[f"{prefix}.{name}.lora_B.weight"] = (up.detach() * self.scale).cpu().contiguous()
        return state

    def load_export(self, state: dict[str, Tensor], prefix: str = "transformer") -> None:
        """Read an `export`. Raises ValueError when layers or shapes are not those of this LoRA."""
        mine = self.export(prefix)
        wrong = [k for k in mine.keys() ^ state.keys()] or [k for k in mine if mine[k].shape != state[k].shape]
        if wrong:
            raise ValueError(f"this LoRA does not fit the model (first differing key: {sorted(wrong)[0]})")
        with torch.no_grad():
            for name, down, up in zip(self.targets, self.down, self.up, strict=True):
                down.copy_(state[f"{prefix}.{name}.lora_A.weight"])
                up.copy_(state[f"{prefix}.{name}.lora_B.weight"] / self.scale)


def linear_layers(network: nn.Module, under: tuple[str, ...]) -> list[str]:
    """Names of all linear layers inside the named submodules, e.g. ``("transformer_blocks",)``."""
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in names if any(part in name.split(".") for part in under)]


def difference_names(network: nn.Module, prefix: str) -> dict[str, str]:
    """Parameter -> its name in a file of differences, as core ComfyUI's LoRA loaders spell it.

    ``LAYER.weight`` is ``PREFIX.LAYER.diff``, the bias beside it ``.diff_b``, anything else ``PREFIX.NAME.diff``.
    """
    names = [name for name, _ in network.named_parameters()]
    layers = {name.removesuffix(".weight") for name in names if name.endswith(".weight")}
    found = {}
    for name in names:
        layer, _, kind = name.rpartition(".")
        own = {"weight": f"{layer}.diff", "bias": f"{layer}.diff_b" if layer in layers else f"{name}.diff"}
        found[name] = f"{prefix}.{own.get(kind, f'{name}.diff')}"
    return found


def weight_differences(network: nn.Module, original: nn.Module, prefix: str) -> dict[str, Tensor]:
    """What must be added to the weights of ``original`` to have those of ``network``, float32 on the CPU.

    Weights that are the same in both are left out.
    """
    state, before = {}, dict(original.named_parameters())
    names = difference_names(network, prefix)
    for name, value in network.named_parameters():
        difference = (value.detach() - before[name].detach().float()).cpu()
        if difference.any():
            state[names[name]] = difference.contiguous()
    return state


@torch.no_grad()
def add_differences(network: nn.Module, state: dict[str, Tensor], prefix: str) -> None:
    """Add a file of `weight_differences` to a network. Raises ValueError for names or shapes that it does not have."""
    places = {key: network.get_parameter(name) for name, key in difference_names(network, prefix).items()}
    wrong = [key for key, value in state.items() if key not in places or places[key].shape != value.shape]
    if wrong:
        raise ValueError(f"these differences do not fit the model (first differing key: {sorted(wrong)[0]})")
    for key, value in state.items():
        places[key].add_(value.to(places[key]))

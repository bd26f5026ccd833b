"""LoRAs on a shared backbone, added beside its layers, and the switch that says which of them is on.

Teacher, student and the discriminator's features are views of one network: a view turns its LoRA on (or all off)
around its forward. It is computed beside the frozen layer, f(x) + B A x, never as a changed weight, which would
cost a full weight gradient. Gradient checkpointing recomputes a block later, possibly under another view; the
checkpoint function of the switch restores the view that was on in the forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from ..devices import like
from ..diffusion.noise import ItemNoise
from ..settings import Checked, setting
from .offload import KeptInputs
from .sharding import is_answered, whole


@dataclass(frozen=True)
class LoraConfig(Checked):
    """The student's LoRA beside its rank and its layers."""

    alpha: float = setting(
        0.0,
        "The LoRA's output is scaled by alpha / rank. 0 takes the rank, so nothing is scaled.",
        added=True,
        low=0,
        high=4096,
    )
    dropout: float = setting(
        0.0,
        "Part (0 to below 1) of each layer's inputs that the LoRA does not see in a step, drawn for each item.",
        added=True,
        low=0,
        below=1,
    )
    start_from: str = setting(
        "",
        "A LoRA file that the student starts from (this project's, diffusers' or kohya's names). Its layers must be "
        "among the student's; a higher rank of the student is filled up. Empty: a new LoRA, without effect at first.",
        decides=False,
        added=True,
    )
    lora_dtype: str = setting(
        "float32",
        'Number format of the LoRA and its gradients while it is trained: "float32", or "bfloat16" for half the '
        "memory. Each update is then rounded up or down at random, so that small ones are not lost; the average is "
        "kept in float32.",
        choices=("float32", "bfloat16"),
        added=True,
    )
    adapter: str = setting(
        "",
        "A training adapter (command `adapter`): a LoRA that takes the few steps out of a turbo model. It is on while "
        "the student learns to denoise, and off when it is sampled, so that the few steps are still there. Empty: "
        "none.",
        decides=False,
        added=True,
    )


class LoraSwitch:
    """Which LoRA of a backbone is on; at most one is, None means the plain backbone."""

    def __init__(self) -> None:
        self.active: Lora | None = None
        self.dropout: Dropout | None = None  # in the student's forward of a training step only
        # (owner, latents [B, C, H, W]): what a trainable discriminator feeds to the blocks (`discriminators`).
        self.inputs: tuple[object, Tensor] | None = None
        # What a recompute is to be run inside, whose modes torch does not keep for it (`training.plan`).
        self.around_recompute: Callable[[], AbstractContextManager] = nullcontext
        # What brings the inputs of checkpointed blocks into host memory; None: they stay where they are.
        self.keep_inputs: Callable[[Tensor], Tensor] | None = None
        self.plain = False  # compiled blocks run as they were (`models.compiled`)
        self.inside_checkpoint = False
        self.before_checkpoint: Callable[[tuple], None] | None = None  # called with the inputs of a checkpointed block
        self.after_checkpoint: Callable[[], None] | None = None  # called when a checkpointed block has returned

    @contextmanager
    def on(self, lora: Lora | None, inputs: tuple[object, Tensor] | None = None) -> Iterator[None]:
        previous, (self.active, self.inputs) = (self.active, self.inputs), (lora, inputs)
        try:
            yield
        finally:
            self.active, self.inputs = previous

    @contextmanager
    def dropping(self, dropout: Dropout | None) -> Iterator[None]:
        """Forwards of a LoRA see only part of their inputs, the same part in a recompute."""
        previous, self.dropout = self.dropout, dropout
        try:
            yield
        finally:
            self.dropout = previous

    @contextmanager
    def plainly(self, plain: bool = True) -> Iterator[None]:
        """Blocks run without what was compiled for them: it has no gradient of a gradient."""
        previous, self.plain = self.plain, plain
        try:
            yield
        finally:
            self.plain = previous

    def checkpoint(self, block: Callable, *args, **kwargs):
        """Run ``block(...)`` under gradient checkpointing; the recompute sees the LoRA that is on now."""
        again = _RestoredView(self)
        if self.before_checkpoint is not None:
            self.before_checkpoint((*args, *kwargs.values()))
        if self.keep_inputs is not None:
            block, args, kwargs = KeptInputs(block, args, kwargs, self.keep_inputs), (), {}
        self.inside_checkpoint = True
        try:
            context = lambda: (nullcontext(), again)  # noqa: E731
            result = checkpoint(block, *args, use_reentrant=False, context_fn=context, **kwargs)
        finally:
            self.inside_checkpoint = False
        if self.after_checkpoint is not None:
            self.after_checkpoint()
        return result


class _RestoredView:
    """The view and the attention kernels of now, for a recompute later; a penalty's double backward enters it twice."""

    def __init__(self, switch: LoraSwitch) -> None:
        self.switch, self.view, self.kernels = switch, (switch.active, switch.inputs), attention_kernels()
        self.dropout, self.plain = switch.dropout, switch.plain
        self.entered: list[ExitStack] = []

    def __enter__(self) -> None:
        stack = ExitStack()
        stack.enter_context(self.switch.on(*self.view))
        stack.enter_context(self.switch.dropping(self.dropout))
        stack.enter_context(self.switch.plainly(self.plain))
        stack.enter_context(sdpa_kernel(self.kernels))
        stack.enter_context(self.switch.around_recompute())
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


class Dropout:
    """Drops inputs of LoRA layers: for each item a share of the channels, the same for all its tokens.

    share: from 0 to below 1; what is left is made larger by 1 / (1 - share).  random: of the items of the batch.
    rows: those of the batch that are in the forward, None for all. A layer's draw is made once and kept, so a block
    that is computed again in the backward drops the same.
    """

    def __init__(self, share: float, random: ItemNoise, rows: list[int] | None = None) -> None:
        self.share, self.random, self.rows = share, random, rows
        self.kept: dict[str, Tensor] = {}

    def of(self, rows: list[int]) -> Dropout:
        """The same draws, for a forward of these rows of the batch."""
        part = Dropout(self.share, self.random, rows)
        part.kept = self.kept
        return part

    def __call__(self, layer: str, x: Tensor) -> Tensor:
        if layer not in self.kept:
            threshold = NormalDist().inv_cdf(self.share)
            self.kept[layer] = (self.random.named(layer).normal(x.shape[-1]) >= threshold) / (1 - self.share)
        kept = self.kept[layer]  # [items, channels]
        kept = like(kept if self.rows is None else kept[self.rows], x)
        return x * kept.view(len(kept), *[1] * (x.ndim - 2), -1)


class Lora(nn.Module):
    """Matrices A [rank, in] and B [out, rank] per target linear layer; B starts at 0, so it starts without effect.

    network: the frozen backbone.  targets: names of linear layers in it (`is_linear`).  rank: at least 1.
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
        self.switch, self.dropout = switch, 0.0
        self.over: tuple[Lora, ...] = ()  # frozen ones that are on whenever this one is (a tuple: not its parameters)
        modules, device = dict(network.named_modules()), next(network.parameters()).device
        wrong = [name for name in self.targets if not is_linear(modules.get(name))]
        if wrong:
            raise ValueError(f"LoRA targets that are not linear layers of this network: {wrong}")
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        self.handles = []
        for index, name in enumerate(self.targets):
            layer = modules[name]
            down = torch.empty(rank, layer.in_features, device=device)
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))
            self.down.append(nn.Parameter(down))
            self.up.append(nn.Parameter(torch.zeros(layer.out_features, rank, device=device)))
            self.handles.append(layer.register_forward_hook(self._hook(name, self.down[index], self.up[index])))

    def _hook(self, name: str, down: nn.Parameter, up: nn.Parameter) -> Callable:
        switch = self.switch

        # Of a layer it knows its weights alone, so that what is compiled for one block serves all that are like it.
        def add_output(layer: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            mine = switch.active is self
            if not mine and (switch.active is None or self not in switch.active.over):
                return None
            x = args[0].to(torch.promote_types(args[0].dtype, down.dtype))
            if switch.dropout is not None and mine:
                x = switch.dropout(name, x)
            added = nn.functional.linear(nn.functional.linear(x, down.to(x.dtype)), (up * self.scale).to(x.dtype))
            return output + added.to(output.dtype)

        return add_output

    def configure(self, config: LoraConfig) -> None:
        """Alpha, dropout and number format of the config."""
        self.scale, self.dropout = (config.alpha or self.rank) / self.rank, config.dropout
        for weight in self.parameters():
            weight.data = weight.data.to(getattr(torch, config.lora_dtype))

    def dropping(self, random: ItemNoise) -> AbstractContextManager[None]:
        """The student's forward of a training step: its dropout, drawn from ``random``."""
        return self.switch.dropping(Dropout(self.dropout, random) if self.dropout else None)

    @torch.no_grad()
    def put_into(self, network: nn.Module) -> None:
        """Add it to the weights of a network with the same layers."""
        for name, down, up in zip(self.targets, self.down, self.up, strict=True):
            weight = network.get_parameter(f"{name}.weight")
            weight.add_((up * self.scale @ down).to(weight))

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
            state[f"{prefix}.{name}.lora_A.weight"] = down.detach().float().clone().cpu().contiguous()
            state[f"{prefix}.{name}.lora_B.weight"] = (up.detach().float() * self.scale).cpu().contiguous()
        return state

    def load_export(self, state: dict[str, Tensor], prefix: str = "transformer") -> None:
        """Read an `export`; a layer of a lower rank is filled up with zeros.

        Raises ValueError when layers or shapes are not those of this LoRA.
        """
        names = [(f"{prefix}.{name}.lora_A.weight", f"{prefix}.{name}.lora_B.weight") for name in self.targets]
        wrong = {name for pair in names for name in pair} ^ state.keys()
        for (a, b), down, up in zip(names, self.down, self.up, strict=True) if not wrong else ():
            rank = min(len(state[a]), self.rank)
            if state[a].shape != (rank, down.shape[1]) or state[b].shape != (len(up), rank):
                wrong.add(a)
        if wrong:
            raise ValueError(f"this LoRA does not fit the model (first differing key: {min(wrong)})")
        with torch.no_grad():
            for (a, b), down, up in zip(names, self.down, self.up, strict=True):
                rank = len(state[a])
                down.zero_()[:rank] = state[a]
                up.zero_()[:, :rank] = state[b] / self.scale


def is_linear(module: nn.Module | None) -> bool:
    """Whether a LoRA can stand beside a module: a linear layer, also one whose class keeps its weight quantized."""
    if module is None or isinstance(module, nn.Linear):
        return module is not None
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return all(isinstance(size, int) for size in sizes) and "weight" in dict(module.named_parameters(recurse=False))


def linear_layers(network: nn.Module, under: tuple[str, ...]) -> list[str]:
    """Names of all linear layers inside the named submodules, e.g. ``("transformer_blocks",)``."""
    names = [name for name, module in network.named_modules() if is_linear(module)]
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

    Weights that are the same in both are left out. Where they are shared out among processes all must ask, and the
    first has the answer.
    """
    state, before = {}, dict(original.named_parameters())
    names = difference_names(network, prefix)
    for name, value in network.named_parameters():
        difference = whole(value.detach()) - whole(before[name].detach()).float()
        if is_answered(value) and (difference := difference.cpu()).any():
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

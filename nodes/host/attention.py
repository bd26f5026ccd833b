"""The attention of a network in training: torch's, with the same chunks in every forward, and twice differentiable
where a penalty needs that."""

from __future__ import annotations

import comfy.ldm.modules.attention
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from ...distill_core.models.lora import attention_kernels


def training_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, **options) -> Tensor:
    """The host's ``attention_pytorch``, except where torch is set to use its plain kernel only.

    The host chooses fast kernels itself, whatever torch is set to, and those cannot be differentiated twice, which a
    penalty on a network's input needs (`diffusion2gan`). q, k, v: [B, N, heads D], or [B, heads, N, D] with the
    host's ``skip_reshape``; the result is [B, N, heads D], or with ``skip_output_reshape`` [B, heads, N, D].
    """
    # A penalty runs blocks without what is compiled of them.
    if torch.compiler.is_compiling() or attention_kernels() != [SDPBackend.MATH]:
        return comfy.ldm.modules.attention.attention_pytorch(q, k, v, heads, mask, **options)
    if not options.get("skip_reshape"):
        width = q[0, 0].numel() // heads
        q, k, v = (x.reshape(*x.shape[:2], -1, width).transpose(1, 2) for x in (q, k, v))
    while mask is not None and mask.ndim < 4:
        mask = mask.unsqueeze(0 if mask.ndim == 2 else 1)
    known = {name: options[name] for name in ("scale", "enable_gqa") if name in options}
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, **known)
    return out if options.get("skip_output_reshape") else out.transpose(1, 2).flatten(2)

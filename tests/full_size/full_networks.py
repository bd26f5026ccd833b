"""ComfyUI's own networks at full size: the host's class and its settings. Runs inside the host's Python.

Those of `FEW` have the full width and few of the blocks; whatever happens in a block happens in them, in less time.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[1] / "host"))
import comfy.supported_models as supported  # noqa: E402
import tiny_models  # noqa: E402
import torch  # noqa: E402

UNET = dict(
    image_size=32,
    in_channels=4,
    out_channels=4,
    model_channels=320,
    use_spatial_transformer=True,
    legacy=False,
    use_temporal_attention=False,
)
SD15 = UNET | dict(
    num_res_blocks=[2, 2, 2, 2],
    channel_mult=[1, 2, 4, 4],
    transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
    transformer_depth_output=[1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    transformer_depth_middle=1,
    context_dim=768,
    num_heads=8,
    use_linear_in_transformer=False,
    adm_in_channels=None,
)
SDXL = UNET | dict(
    num_res_blocks=[2, 2, 2],
    channel_mult=[1, 2, 4],
    transformer_depth=[0, 0, 2, 2, 10, 10],
    transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10],
    transformer_depth_middle=10,
    context_dim=2048,
    num_head_channels=64,
    use_linear_in_transformer=True,
    adm_in_channels=2816,
    num_classes="sequential",
)
SD35M = dict(
    input_size=None,
    patch_size=2,
    in_channels=16,
    depth=24,
    num_blocks=24,
    adm_in_channels=2048,
    num_patches=384**2,
    pos_embed_max_size=384,
    pos_embed_scaling_factor=None,
    qk_norm="rms",
    x_block_self_attn_layers=list(range(13)),
    context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 1536}},
)
WIDE = dict(hidden_size=3072, num_heads=24)
FLUX = tiny_models.FLUX | WIDE | dict(vec_in_dim=768, context_in_dim=4096, depth=19, depth_single_blocks=38)
FLUX |= {"guidance_embed": True}
SCHNELL = FLUX | {"guidance_embed": False}
KLEIN = tiny_models.FLUX2 | WIDE | dict(context_in_dim=7680, depth=5, depth_single_blocks=20)
NOT_CHROMAS = ("guidance_embed", "vec_in_dim")
CHROMA = {name: value for name, value in FLUX.items() if name not in NOT_CHROMAS} | dict(
    image_model="chroma",
    in_channels=64,
    out_channels=64,
    in_dim=64,
    out_dim=3072,
    hidden_dim=5120,
    n_layers=5,
    vec_in_dim=None,
)
ZIMAGE = tiny_models.CONFIGS["lumina"][1] | dict(
    dim=3840, n_layers=30, n_refiner_layers=2, n_heads=30, n_kv_heads=30, cap_feat_dim=2560, multiple_of=256
)
ZIMAGE |= dict(axes_dims=[32, 48, 48], axes_lens=[1536, 512, 512])
QWEN = tiny_models.CONFIGS["qwen-image"][1] | dict(num_layers=60, num_attention_heads=24, joint_attention_dim=3584)
WAN = dict(image_model="wan2.1", model_type="t2v", dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
WAN |= dict(in_dim=16, out_dim=16, text_dim=4096)
FEW_OF_FLUX = dict(depth=2, depth_single_blocks=2)


class Network(NamedTuple):
    """kind: class of the host.  settings: of its network."""

    kind: type
    settings: dict

    def on_meta(self, dtype: torch.dtype):
        """The host's model_base object, without memory for its weights, and its config. fp8 computes in bfloat16."""
        config = self.kind({**self.settings, "dtype": dtype})
        config.manual_cast_dtype = torch.bfloat16 if dtype.itemsize == 1 else None
        with torch.device("meta"):
            return config.get_model({}, device=torch.device("meta")), config


NETWORKS = {  # of `full_shapes.SHAPES`
    "sd15": Network(supported.SD15, SD15),
    "sdxl": Network(supported.SDXL, SDXL),
    "sd35m": Network(supported.SD3, SD35M),
    "schnell": Network(supported.FluxSchnell, SCHNELL),
    "flux": Network(supported.Flux, FLUX),
    "klein": Network(supported.Flux2, KLEIN),
    "chroma": Network(supported.Chroma, CHROMA),
    "zimage": Network(supported.ZImage, ZIMAGE),
    "qwen": Network(supported.QwenImage, QWEN),
    "wan": Network(supported.WAN21_T2V, WAN),
}
NETWORKS["sdxl 512"] = NETWORKS["sdxl"]
FEW = {  # of the settings, what makes few blocks of many
    "schnell": FEW_OF_FLUX,
    "flux": FEW_OF_FLUX,
    "chroma": FEW_OF_FLUX,
    "klein": dict(depth=1, depth_single_blocks=2),
    "zimage": dict(n_layers=2),
    "qwen": dict(num_layers=2),
    "wan": dict(num_layers=4),
}


def with_few_blocks(name: str) -> Network:
    """The network that is written to a file: all of it where it is small, else few blocks of it."""
    network = NETWORKS[name]
    return network._replace(settings=network.settings | FEW.get(name, {}))

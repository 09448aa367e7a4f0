"""Names of Wan transformer checkpoints: official Wan 2.1 / 2.2, TurboDiffusion, diffusers.

TurboDiffusion's files differ from the official ones by a linear patch embedding, SLA's `proj_l`, `int8_weight` and
`scale` in place of `weight`, a `net.` prefix in training checkpoints and `_checkpoint_wrapped_module.` inside names.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from turbojax.errors import CheckpointError
from turbojax.kernels.int8 import QuantConfig
from turbojax.models.wan import WanConfig
from turbojax.weights.rules import Rule, TensorKey, count_layers, patch_linear, shorten

# Prefixes of training checkpoints, and what PyTorch's remat and compiler wrappers leave inside names.
DECORATION = re.compile(
    r"^(?:net\.|module\.|model\.|diffusion_model\.|transformer\.)+|_checkpoint_wrapped_module\.|_orig_mod\."
)


def without_batch(weight: np.ndarray) -> np.ndarray:
    """[1, n, D] to [n, D]."""
    return weight.reshape(weight.shape[-2:])


BOOKKEEPING = Rule(r"(?:.*\.)?_extra_state|accum_\w+", None)  # left by training, no weights of the network

_BLOCK = r"blocks\.(?P<layer>\d+)\."
_PART, _AFFINE = r"(?P<part>weight|bias|scale)", r"(?P<part>weight|bias)"

# Linear layers and norms outside the blocks: our names, and those of the official files and of diffusers' files.
_EMBEDDER, _IMAGE = r"condition_embedder\.", r"condition_embedder\.image_embedder\."
_OUTER = {
    r"\1_embedding.fc1": (r"(text|time)_embedding\.0", _EMBEDDER + r"(text|time)_embedder\.linear_1"),
    r"\1_embedding.fc2": (r"(text|time)_embedding\.2", _EMBEDDER + r"(text|time)_embedder\.linear_2"),
    "time_projection": (r"time_projection\.1", _EMBEDDER + "time_proj"),
    "head.proj": (r"head\.head", "proj_out"),
    "image_embedding.norm_in": (r"img_emb\.proj\.0", _IMAGE + "norm1"),
    "image_embedding.mlp.fc1": (r"img_emb\.proj\.1", _IMAGE + r"ff\.net\.0\.proj"),
    "image_embedding.mlp.fc2": (r"img_emb\.proj\.3", _IMAGE + r"ff\.net\.2"),
    "image_embedding.norm_out": (r"img_emb\.proj\.4", _IMAGE + "norm2"),
}


def outer_rules(column: int) -> tuple[Rule, ...]:
    rules = (Rule(names[column] + r"\." + _AFFINE, rf"{ours}.\g<part>") for ours, names in _OUTER.items())
    return Rule(r"patch_embedding\.(weight|bias)", r"patch_embedding.\1", patch_linear), *rules


OFFICIAL: tuple[Rule, ...] = (
    BOOKKEEPING,
    *outer_rules(0),
    Rule(r"img_emb\.emb_pos", "image_embedding.positions", without_batch),
    Rule(r"head\.modulation", "head.modulation", without_batch),
    Rule(_BLOCK + "modulation", "blocks.modulation", without_batch),
    Rule(_BLOCK + r"norm3\.(weight|bias)", r"blocks.norm3.\2"),
    Rule(_BLOCK + r"(self_attn|cross_attn)\.(norm_\w+)\.weight", r"blocks.\2.\3.weight"),
    Rule(_BLOCK + r"self_attn\.attn_op\.local_attn\.proj_l\." + _PART, r"blocks.self_attn.proj_l.\g<part>"),
    Rule(_BLOCK + r"(self_attn|cross_attn)\.([qkvo]|k_img|v_img)\.(?:int8_)?" + _PART, r"blocks.\2.\3.\g<part>"),
    Rule(_BLOCK + r"ffn\.0\.(?:int8_)?" + _PART, r"blocks.ffn.fc1.\g<part>"),
    Rule(_BLOCK + r"ffn\.2\.(?:int8_)?" + _PART, r"blocks.ffn.fc2.\g<part>"),
)

_DIFFUSERS_ATTENTION = {"attn1": "self_attn", "attn2": "cross_attn"}
_DIFFUSERS_LAYER = {
    **{"to_q": "q", "to_k": "k", "to_v": "v", r"to_out\.0": "o", "add_k_proj": "k_img", "add_v_proj": "v_img"},
    **{"norm_q": "norm_q", "norm_k": "norm_k", "norm_added_k": "norm_k_img"},
}

DIFFUSERS: tuple[Rule, ...] = (
    *outer_rules(1),
    Rule(r"condition_embedder\.image_embedder\.pos_embed", "image_embedding.positions", without_batch),
    Rule("scale_shift_table", "head.modulation", without_batch),
    Rule(_BLOCK + "scale_shift_table", "blocks.modulation", without_batch),
    Rule(_BLOCK + r"norm2\.(weight|bias)", r"blocks.norm3.\2"),
    *(
        Rule(_BLOCK + rf"{theirs}\.{layer}\.{_PART}", rf"blocks.{ours}.{name}.\g<part>")
        for theirs, ours in _DIFFUSERS_ATTENTION.items()
        for layer, name in _DIFFUSERS_LAYER.items()
    ),
    Rule(_BLOCK + r"attn1\.(?:.*\.)?proj_l\." + _PART, r"blocks.self_attn.proj_l.\g<part>"),
    Rule(_BLOCK + r"ffn\.net\.0\.proj\." + _PART, r"blocks.ffn.fc1.\g<part>"),
    Rule(_BLOCK + r"ffn\.net\.2\." + _PART, r"blocks.ffn.fc2.\g<part>"),
)


RELEASED = {(c.dim, c.ffn_dim, c.num_layers) for c in (WanConfig.t2v_1_3b(), WanConfig.t2v_14b())}


def clean_name(name: str) -> str:
    """Removes training prefixes and wrappers from a name."""
    return DECORATION.sub("", name)


def wan_rules(names: Iterable[str], *, what: str) -> tuple[Rule, ...]:
    """The table for a checkpoint with these (cleaned) names."""
    names = set(names)
    if "time_embedding.0.weight" in names or "blocks.0.self_attn.q.bias" in names:
        return OFFICIAL
    if any(name.startswith("condition_embedder.") for name in names):
        return DIFFUSERS
    raise CheckpointError(
        f"{what} is not a Wan transformer: it holds {shorten(sorted(names))}. "
        "Give the file of the diffusion model, not of the VAE or the text encoder."
    )


def detect_wan_config(
    shapes: Mapping[TensorKey, tuple[int, ...]], *, quantized: bool, num_heads: int | None, what: str
) -> WanConfig:
    """Detects the configuration that parameters of these shapes belong to.

    A size is what most of the tensors that show it say, and a released model is known by a few of them, so that a
    missing or misshapen tensor does not pass for another model.
    num_heads: from the checkpoint's own configuration; None takes `usual_num_heads`.
    """

    def size(*axes: tuple[str, int]) -> int | None:
        lengths = Counter(
            shape[axis]
            for key, shape in shapes.items()
            for target, axis in axes
            if key.target == target and axis < len(shape) and shape[axis] > 0
        )
        return lengths.most_common(1)[0][0] if lengths else None

    dim = size(("blocks.norm3.weight", 0), ("blocks.norm3.bias", 0), ("patch_embedding.bias", 0))
    ffn_dim = size(("blocks.ffn.fc1.weight", 0), ("blocks.ffn.fc1.bias", 0), ("blocks.ffn.fc2.weight", 1))
    if dim is None or ffn_dim is None:
        raise CheckpointError(f"{what} has no blocks.0.norm3 or blocks.0.ffn, so the model's size is unknown")
    head_dim = size(("blocks.self_attn.proj_l.weight", 0), ("blocks.self_attn.proj_l.bias", 0))
    config = WanConfig(
        dim=dim,
        ffn_dim=ffn_dim,
        num_heads=num_heads or usual_num_heads(dim, head_dim),
        num_layers=count_layers(key.layer for key in shapes if key.layer is not None),
        clip_dim=size(("image_embedding.norm_in.weight", 0), ("image_embedding.norm_in.bias", 0)),
        clip_images=2 if TensorKey("image_embedding.positions", None) in shapes else 1,
        attention_type="sla" if head_dim else "original",
        quant=detect_quantization(shapes) if quantized else None,
    )
    channels_in = (size(("patch_embedding.weight", 1)) or 0) // config.patch_features
    changes: dict[str, Any] = {
        "in_channels": channels_in,
        "out_channels": (size(("head.proj.weight", 0), ("head.proj.bias", 0)) or 0) // config.patch_features,
        "freq_dim": size(("time_embedding.fc1.weight", 1)),
        "text_dim": size(("text_embedding.fc1.weight", 1)),
    }
    if (dim, ffn_dim, config.num_layers) in RELEASED:  # all the rest is known, too
        changes = {"in_channels": 36 if channels_in == 36 or config.clip_dim else 16}
    return dataclasses.replace(config, **{name: value for name, value in changes.items() if value})


def usual_num_heads(dim: int, head_dim: int | None) -> int:
    """The number of heads where nothing says it: by the width of SLA's projection, else 128 as all released sizes."""
    return max(1, dim // (head_dim or 128))


def detect_quantization(shapes: Mapping[TensorKey, tuple[int, ...]]) -> QuantConfig:
    """Detects the int8 scheme by the scales: a matrix for 128 x 128 blocks, a vector for channels."""
    axes = Counter(len(shape) for key, shape in shapes.items() if key.target.endswith(".scale"))
    return QuantConfig("channel" if axes[1] > axes[2] else "block128")

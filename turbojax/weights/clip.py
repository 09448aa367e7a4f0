"""Names of CLIP image encoders: Wan 2.1's official file, and transformers (diffusers' image_encoder folders).

Both also hold what does not run: the last layer and what follows it, and the official one the text encoder.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from turbojax.errors import CheckpointError
from turbojax.models.clip import CLIPConfig
from turbojax.weights.rules import LAYER_NUMBER, Rule, count_layers, patch_linear, shorten

HEAD_DIM = 80  # of ViT-H; shapes do not show it


_LAYER = r"visual\.transformer\.(?P<layer>\d+)\."

CLIP_OFFICIAL: tuple[Rule, ...] = (
    Rule(r"textual\..*|log_scale|visual\.(head|post_norm\.(weight|bias))", None),
    Rule(r"visual\.patch_embedding\.weight", "patch_embedding.weight", patch_linear),
    Rule(r"visual\.cls_embedding", "class_token", np.ravel),
    Rule(r"visual\.pos_embedding", "positions", lambda positions: positions[0]),
    Rule(r"visual\.pre_norm\.(weight|bias)", r"norm.\1"),
    Rule(_LAYER + r"(norm[12])\.(weight|bias)", r"blocks.\2.\3"),
    Rule(_LAYER + r"attn\.([qkv])\.(weight|bias)", r"blocks.attn.\2.\3"),  # from to_qkv, see `clip_tensors`
    Rule(_LAYER + r"attn\.proj\.(weight|bias)", r"blocks.attn.o.\2"),
    Rule(_LAYER + r"mlp\.0\.(weight|bias)", r"blocks.mlp.fc1.\2"),
    Rule(_LAYER + r"mlp\.2\.(weight|bias)", r"blocks.mlp.fc2.\2"),
)

_ENCODER_LAYER = r"vision_model\.encoder\.layers\.(?P<layer>\d+)\."

CLIP_TRANSFORMERS: tuple[Rule, ...] = (
    Rule(r"vision_model\.post_layernorm\.(weight|bias)|visual_projection\.weight|.*\.position_ids", None),
    Rule(r"vision_model\.embeddings\.patch_embedding\.weight", "patch_embedding.weight", patch_linear),
    Rule(r"vision_model\.embeddings\.class_embedding", "class_token"),
    Rule(r"vision_model\.embeddings\.position_embedding\.weight", "positions"),
    Rule(r"vision_model\.pre_layrnorm\.(weight|bias)", r"norm.\1"),
    Rule(_ENCODER_LAYER + r"layer_norm([12])\.(weight|bias)", r"blocks.norm\2.\3"),
    Rule(_ENCODER_LAYER + r"self_attn\.([qkv])_proj\.(weight|bias)", r"blocks.attn.\2.\3"),
    Rule(_ENCODER_LAYER + r"self_attn\.out_proj\.(weight|bias)", r"blocks.attn.o.\2"),
    Rule(_ENCODER_LAYER + r"mlp\.(fc[12])\.(weight|bias)", r"blocks.mlp.\2.\3"),
)


def clip_rules(tensors: Mapping[str, np.ndarray]) -> tuple[Rule, ...]:
    """The table for a checkpoint's names. Raises CheckpointError if it holds no CLIP image encoder."""
    if "visual.pos_embedding" in tensors:
        return CLIP_OFFICIAL
    if "vision_model.embeddings.class_embedding" in tensors:
        return CLIP_TRANSFORMERS
    raise CheckpointError(
        f"no CLIP image encoder among these tensors: {shorten(sorted(tensors)) or 'none at all'}; give "
        "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth or the image_encoder folder of a diffusers model"
    )


def clip_tensors(tensors: Mapping[str, np.ndarray], config: CLIPConfig) -> dict[str, np.ndarray]:
    """Returns the checkpoint's tensors without the layers that do not run; the official to_qkv as its q, k and v."""
    out: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        if (layer := _layer_of(name)) is not None and layer >= config.num_layers:
            continue
        if match := re.fullmatch(r"(.*\.attn\.)to_qkv(\.weight|\.bias)", name):
            whole = tensor.ndim and tensor.size and len(tensor) % 3 == 0
            parts = tensor.reshape(3, -1, *tensor.shape[1:]) if whole else (tensor,) * 3
            out |= {f"{match[1]}{part}{match[2]}": value for part, value in zip("qkv", parts, strict=True)}
        else:
            out[name] = tensor
    return out


def detect_clip_config(tensors: Mapping[str, np.ndarray], **changes: Any) -> CLIPConfig:
    """Detects the configuration by names and shapes, with `changes` on top. Raises CheckpointError for another file."""
    official = clip_rules(tensors) is CLIP_OFFICIAL
    patch, first = (
        ("visual.patch_embedding.weight", "visual.transformer.0.mlp.0.weight")
        if official
        else ("vision_model.embeddings.patch_embedding.weight", "vision_model.encoder.layers.0.mlp.fc1.weight")
    )
    positions = "visual.pos_embedding" if official else "vision_model.embeddings.position_embedding.weight"
    layers = [layer for name in tensors if (layer := _layer_of(name)) is not None]
    try:
        dim, _, side, _ = tensors[patch].shape
        tokens = tensors[positions].shape[-2]
        if not all(tensors[name].size for name in (patch, first, positions)) or count_layers(layers) < 2:
            raise ValueError
        detected = dict(
            dim=dim,
            mlp_dim=tensors[first].shape[0],
            num_heads=max(1, dim // HEAD_DIM),
            num_layers=count_layers(layers) - 1,  # the last is not run
            image_size=side * round((tokens - 1) ** 0.5),
            patch=side,
        )
    except (LookupError, ValueError) as error:
        raise CheckpointError(f"the CLIP image encoder lacks {patch}, {first}, {positions} or layers") from error
    return CLIPConfig(**(detected | changes))


def _layer_of(name: str) -> int | None:
    match = re.match(_LAYER, name) or re.match(_ENCODER_LAYER, name)
    return int(match["layer"]) if match and LAYER_NUMBER.fullmatch(match["layer"]) else None

"""Names of umT5 encoder checkpoints: Wan's official file, and transformers (diffusers' text_encoder folders).

The token embedding is in both files but is no parameter of the encoder: `token_table` hands it out as it lies
in the file, the rules pass over it.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from turbojax.errors import CheckpointError
from turbojax.models.umt5 import UMT5Config
from turbojax.weights.rules import Rule, TensorKey, count_layers, rename, same_kind, shorten

_OFFICIAL_BLOCK = r"(?:encoder\.)?blocks\.(?P<layer>\d+)\."
_OFFICIAL_TABLE = r"(?:encoder\.)?token_embedding\.weight"

UMT5_OFFICIAL: tuple[Rule, ...] = (
    Rule(_OFFICIAL_TABLE, None),
    Rule(_OFFICIAL_BLOCK + r"(norm1|norm2|attn\.[qkvo]|ffn\.fc1|ffn\.fc2)\.weight", r"blocks.\2.weight"),
    Rule(_OFFICIAL_BLOCK + r"ffn\.gate\.0\.weight", "blocks.ffn.gate.weight"),
    Rule(_OFFICIAL_BLOCK + r"pos_embedding\.embedding\.weight", "blocks.attn.position_bias"),
    Rule(r"(?:encoder\.)?norm\.weight", "norm.weight"),
)

_TRANSFORMERS_BLOCK = r"encoder\.block\.(?P<layer>\d+)\.layer\."
_TRANSFORMERS_TABLE = r"shared\.weight|encoder\.embed_tokens\.weight"  # one tensor, under either name or both

UMT5_TRANSFORMERS: tuple[Rule, ...] = (
    Rule(_TRANSFORMERS_TABLE, None),
    Rule(_TRANSFORMERS_BLOCK + r"0\.layer_norm\.weight", "blocks.norm1.weight"),
    Rule(_TRANSFORMERS_BLOCK + r"0\.SelfAttention\.([qkvo])\.weight", r"blocks.attn.\2.weight"),
    Rule(_TRANSFORMERS_BLOCK + r"0\.SelfAttention\.relative_attention_bias\.weight", "blocks.attn.position_bias"),
    Rule(_TRANSFORMERS_BLOCK + r"1\.layer_norm\.weight", "blocks.norm2.weight"),
    Rule(_TRANSFORMERS_BLOCK + r"1\.DenseReluDense\.wi_0\.weight", "blocks.ffn.gate.weight"),
    Rule(_TRANSFORMERS_BLOCK + r"1\.DenseReluDense\.wi_1\.weight", "blocks.ffn.fc1.weight"),
    Rule(_TRANSFORMERS_BLOCK + r"1\.DenseReluDense\.wo\.weight", "blocks.ffn.fc2.weight"),
    Rule(r"encoder\.final_layer_norm\.weight", "norm.weight"),
)


def umt5_rules(tensors: Mapping[str, np.ndarray]) -> tuple[Rule, ...]:
    """The rules for this checkpoint, by its names. Raises CheckpointError if it holds no umT5 encoder."""
    for rules in (UMT5_OFFICIAL, UMT5_TRANSFORMERS):
        keys = {hit[0] for name in tensors if (hit := rename(name, rules))}
        if TensorKey("blocks.attn.position_bias", 0) in keys:
            return rules
    raise CheckpointError(
        f"no umT5 encoder among these tensors: {shorten(list(tensors)) or 'none at all'}; use "
        "models_t5_umt5-xxl-enc-bf16.pth or the text_encoder folder of a diffusers repository"
    )


def detect_umt5_config(tensors: Mapping[str, np.ndarray], **changes: Any) -> UMT5Config:
    """Detects the configuration by names and shapes, with `changes` (for instance dtype) on top.

    max_distance leaves no trace in a checkpoint; it is 128 in every released umT5.
    Raises CheckpointError if this is no umT5 encoder or a tensor it goes by is missing or misshapen.
    """
    rules = umt5_rules(tensors)
    shapes = {hit[0]: tensor.shape for name, tensor in tensors.items() if (hit := rename(name, rules))}

    def size(target: str) -> tuple[int, int]:
        shape = shapes.get(TensorKey(target, 0), ())
        if len(shape) != 2 or 0 in shape:
            raise CheckpointError(f"the umT5 checkpoint's first {target} has shape {list(shape)}, not two axes")
        return shape

    vocab_size, dim = token_table(tensors).shape
    num_buckets, num_heads = size("blocks.attn.position_bias")
    detected = dict(
        vocab_size=vocab_size,
        dim=dim,
        attention_dim=size("blocks.attn.q.weight")[0],
        ffn_dim=size("blocks.ffn.fc1.weight")[0],
        num_heads=num_heads,
        num_layers=count_layers(key.layer for key in shapes if key.layer is not None),
        num_buckets=num_buckets,
    )
    return UMT5Config(**(detected | changes))


def token_table(tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """The token embedding `[vocab, D]` as it lies in the file, memory-mapped if `tensors` is.

    Raises CheckpointError if there is none, or it cannot be one.
    """
    table_rule = umt5_rules(tensors)[0]
    for name in sorted(tensors, reverse=True):  # "shared" before its duplicate "encoder.embed_tokens"
        if rename(name, (table_rule,)):
            table = tensors[name]
            if table.ndim != 2 or 0 in table.shape or not same_kind(table.dtype, np.float32):
                found = f"{table.dtype}{list(table.shape)}"
                raise CheckpointError(f"{name} is {found} and must be floating point numbers [vocab, width]")
            return table
    raise CheckpointError("the umT5 checkpoint has no token_embedding.weight or shared.weight")

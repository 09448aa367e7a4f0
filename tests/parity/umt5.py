"""Recomputes the umT5 fixture with our encoder, in float32."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.golden_io import Incomplete
from turbojax.models.umt5 import UMT5Encoder, embed_tokens, encode_text, position_buckets, relative_buckets
from turbojax.weights.rules import TensorKey, assign
from turbojax.weights.umt5 import detect_umt5_config, token_table, umt5_rules

LAYERS = 5e-5, 1e-5  # least, and of the largest value


def build(tensors: dict[str, np.ndarray], dtype=jnp.float32) -> UMT5Encoder:
    """The encoder that a checkpoint in memory describes, with its weights."""
    config = detect_umt5_config(tensors, dtype=dtype)
    graph, state = nnx.split(nnx.eval_shape(lambda: UMT5Encoder(config, rngs=nnx.Rngs(0))))
    expected: dict[TensorKey, jax.ShapeDtypeStruct] = {}
    for path, value in nnx.to_flat_state(state):
        name = ".".join(path)
        if path[0] == "blocks":
            layer = jax.ShapeDtypeStruct(value.shape[1:], value.dtype)
            expected |= {TensorKey(name, i): layer for i in range(value.shape[0])}
        else:
            expected[TensorKey(name, None)] = jax.ShapeDtypeStruct(value.shape, value.dtype)
    found = assign(tensors, umt5_rules(tensors), expected, what="umt5")
    filled = []
    for path, value in nnx.to_flat_state(state):
        name = ".".join(path)
        values = [found[entry] for entry in expected if entry.target == name]
        array = np.stack(values) if path[0] == "blocks" else values[0]
        filled.append((path, value.replace(jnp.asarray(array, value.dtype))))
    return nnx.merge(graph, nnx.from_flat_state(filled))


def recompute(config: dict, t: dict[str, np.ndarray]) -> dict[str, tuple[np.ndarray, float]]:
    """Every `out.*` of the fixture: our value and the absolute tolerance."""
    if config.get("args", {}).get("shared_pos"):
        raise Incomplete("its layers share one position embedding (shared_pos), which turbojax' encoder does not")
    weights = {name[2:]: value for name, value in t.items() if name.startswith("w.")}
    with (
        jax.default_matmul_precision("highest"),
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
    ):
        encoder, table = build(weights), token_table(weights)
        ours = run(encoder, table, t["in.ids"], t["in.mask"], config["text_len"])
    sizes = dict(num_buckets=encoder.config.num_buckets, max_distance=encoder.config.max_distance)
    if "in.rel_pos" in t:
        ours["out.rel_buckets_far"] = relative_buckets(t["in.rel_pos"], **sizes)
    expected = {name: value for name, value in t.items() if name.startswith("out.")}
    return {name: (np.asarray(ours[name]), tolerance(name, x)) for name, x in expected.items() if name in ours}


def run(encoder: UMT5Encoder, table: np.ndarray, ids: np.ndarray, mask: np.ndarray, length: int) -> dict:
    """The encoder's results; the intermediate ones layer by layer, the final ones from its own scan."""
    x = jnp.asarray(embed_tokens(table, ids))
    tokens = jnp.asarray(mask)
    buckets = jnp.asarray(position_buckets(ids.shape[1], encoder.config))
    out = {
        "out.x": encoder(x, tokens),
        "out.embedding": encode_text(encoder, table, ids, mask, length=length),
        "out.rel_buckets": np.asarray(buckets),
    }
    graph, layers = nnx.split(encoder.blocks)
    for layer in range(encoder.config.num_layers):
        block = nnx.merge(graph, jax.tree.map(lambda a, layer=layer: a[layer], layers))
        out[f"out.block{layer}.pos_bias"] = block.attn.bias(buckets)
        x = block(x, tokens.astype(jnp.bool_), buckets)
        out[f"out.block{layer}"] = x
    return out


def tolerance(name: str, expected: np.ndarray) -> float:
    if re.fullmatch(r"out\.rel_buckets\w*", name):
        return 0.0
    least, relative = LAYERS if re.fullmatch(r"out\.(block\d+|x)", name) else (0.0, 1e-5)
    return max(least, relative * float(np.abs(expected).max()))

"""Measurements of int8 linear layers, alone and in a transformer block."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from absl import logging
from flax import nnx
from jax import lax

from turbojax.bench.measure import seconds_per_call, temporary_bytes
from turbojax.kernels import int8
from turbojax.kernels.int8 import QUANT_SCHEMES, QuantConfig
from turbojax.models import wan
from turbojax.models.layers import contract, rotary_table
from turbojax.models.published import MODELS
from turbojax.models.sizes import tree_bytes
from turbojax.weights.options import NetworkOptions

# Rows, out-features and in-features of the linear layers: 1.3B at 480p, 14B at 720p.
LINEAR_SHAPES = tuple(
    (rows, *features)
    for rows, dim, ffn_dim in ((32768, 1536, 8960), (75648, 5120, 13824))
    for features in ((dim, dim), (ffn_dim, dim), (dim, ffn_dim))
)
CHECKED_ROWS = 1024  # rows compared with float32


def measure_linear_layers(*, schemes: tuple[str, ...], shapes=LINEAR_SHAPES) -> dict[str, Any]:
    """Measures int8 linear layers beside bfloat16 through XLA (cuBLAS): ms, TOPS, and relative error against float32.

    ms and tops: quantization of the activations, matmul and bias; matmul_*: from activations quantized already.
    """
    result: dict[str, Any] = {}
    for m, n, k in shapes:
        keys = jax.random.split(jax.random.key(m + n + k), 4)
        inputs = [jax.random.normal(key, (m, k), jnp.bfloat16) for key in keys[:2]]  # in turn: no reuse of the cache
        weight = jax.random.normal(keys[2], (n, k), jnp.bfloat16) * k**-0.5
        bias = jax.random.normal(keys[3], (n,), jnp.bfloat16)
        exact = jnp.dot(
            inputs[0][:CHECKED_ROWS].astype(jnp.float32), weight.T.astype(jnp.float32), precision=lax.Precision.HIGHEST
        )
        exact = exact + bias.astype(jnp.float32)[None]
        operations = 2 * m * n * k
        rows: dict[str, Any] = {}
        dense = jax.jit(lambda x, w, b: contract(x, w) + b[None])
        rows["bfloat16"] = measured(dense, [(x, weight, bias) for x in inputs], operations, exact)
        for name in schemes:
            rows[name] = int8_layer(QUANT_SCHEMES[name], inputs, weight, bias, operations, exact)
            rows[name]["speed_over_bfloat16"] = rows["bfloat16"]["ms"] / rows[name]["ms"]
        result[f"{m} x {n} x {k}"] = rows
        logging.info("%d x %d x %d: %s", m, n, k, {name: round(row["ms"], 3) for name, row in rows.items()})
    return result


def int8_layer(quant: QuantConfig, inputs, weight, bias, operations: int, exact) -> dict[str, Any]:
    """Returns figures of an int8 layer; of its matmul and its quantization apart where it has both."""
    w_q, w_scale = jax.jit(int8.quantize_weight, static_argnums=1)(weight, quant.scheme)
    if quant.weight_only:
        full = jax.jit(lambda x: int8.dequantizing_matmul(x, w_q, w_scale, bias, quant))
        return measured(full, [(x,) for x in inputs], operations, exact)
    quantize = jax.jit(lambda x: int8.quantize(x, quant))
    full = jax.jit(lambda x: int8.matmul(int8.quantize(x, quant), w_q, w_scale, bias, quant))
    matmul = jax.jit(lambda x: int8.matmul(x, w_q, w_scale, bias, quant))
    quantized = [(quantize(x),) for x in inputs]
    matmul_seconds = seconds_per_call(matmul, quantized)
    return measured(full, [(x,) for x in inputs], operations, exact) | {
        "matmul_ms": 1e3 * matmul_seconds,
        "matmul_tops": operations / matmul_seconds / 1e12,
        "quantize_ms": 1e3 * seconds_per_call(quantize, [(x,) for x in inputs]),
    }


def measured(function: Callable, arguments: list[tuple], operations: int, exact: jax.Array) -> dict[str, float]:
    """Returns ms, TOPS and the relative error of the first rows, for which the exact result is given."""
    seconds = seconds_per_call(function, arguments)
    error = function(*arguments[0])[: len(exact)].astype(jnp.float32) - exact
    relative = float(jnp.linalg.norm(error) / jnp.linalg.norm(exact))
    return {"ms": 1e3 * seconds, "tops": operations / seconds / 1e12, "relative_error": relative}


def measure_block(*, model: str, tokens: tuple[int, int, int], schemes: tuple[str | None, ...]) -> dict[str, Any]:
    """Measures a transformer block without its attention: ms and bytes of linear layers, norms, rotary and gates."""
    result: dict[str, dict[str, Any]] = {}
    for name in schemes:
        config = NetworkOptions(quant_linear=name is not None, quant_scheme=name).apply(MODELS[model](num_layers=1))
        block = wan.Block(config, rngs=nnx.Rngs(0))
        graph, state = nnx.split(block)
        length = tokens[0] * tokens[1] * tokens[2]
        keys = jax.random.split(jax.random.key(0), 3)
        x = jax.random.normal(keys[0], (1, length, config.dim), config.dtype)
        e0 = 0.1 * jax.random.normal(keys[1], (1, 6, config.dim), jnp.float32)
        text = jax.random.normal(keys[2], (1, config.text_len, config.dim), config.dtype)
        context = wan.Context(*block.cross_attn.keys(text, None), rotary_table(tokens, config.head_dim))

        @jax.jit
        def run(state, x, graph=graph, e0=e0, context=context):
            with mock.patch.object(wan, "dot_product_attention", sum_of_operands):
                return nnx.merge(graph, state)(x, e0, *context)

        weights = tree_bytes(state)
        temporary = temporary_bytes(run.lower(state, x).compile())
        seconds = seconds_per_call(run, [(state, x)], calls=5)
        result[name or "bfloat16"] = {"ms": 1e3 * seconds, "weight_bytes": weights, "temporary_bytes": temporary}
    for row in result.values():
        row["speed_over_bfloat16"] = result["bfloat16"]["ms"] / row["ms"]
        row["weights_over_bfloat16"] = row["weight_bytes"] / result["bfloat16"]["weight_bytes"]
    return result


def sum_of_operands(q, k, v, **settings):
    """Stands in for attention while a network is traced; nothing else of the block changes."""
    del settings
    return q + jnp.mean(k + v, axis=1, keepdims=True)

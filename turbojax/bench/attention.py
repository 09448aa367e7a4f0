"""Measurements of self-attention: dense, SLA and SageSLA at the shapes of the published models."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from turbojax.bench.measure import seconds_per_call
from turbojax.kernels import sage, sla
from turbojax.kernels.attention import dot_product_attention
from turbojax.kernels.sizes import cdiv

# Heads, tokens, topk: 1.3B and 14B at 480p, 14B at 720p, 81 frames; head dim 128.
SHAPES = ((12, 32760, 0.10), (12, 32760, 0.15), (40, 32760, 0.10), (40, 75600, 0.10), (40, 75600, 0.15))
IMPLEMENTATIONS: tuple[sla.Implementation, ...] = ("mosaic", "triton")
WITH_PARTS = (SHAPES[0], SHAPES[3])
DIM = 128
GRIDS = {32760: (21, 30, 52), 75600: (21, 45, 80)}  # tokens by frames, rows and columns


def measure_attention(keep: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """Measures speed, gradients and errors; keep gets what there is after each part, since all of it takes minutes."""
    result: dict[str, Any] = {}
    for heads, tokens, topk in SHAPES:
        parts = (heads, tokens, topk) in WITH_PARTS
        result[f"{heads} x {tokens}, topk {topk}"] = measure_op(heads, tokens, topk, parts=parts)
        keep(result)
    result["backward 12 x 32760, topk 0.1"] = measure_backward()
    keep(result)
    result["errors 4 x 32760"] = measure_errors()
    return result


def measure_op(heads: int, tokens: int, topk: float, *, parts: bool) -> dict[str, Any]:
    """Measures the whole op, from rotated q, k, v to the sum with the linear branch, and its parts; milliseconds."""
    inputs = random_inputs(heads, tokens)
    q, k, *others = inputs
    long_key = [q, k.at[:, 0].multiply(16), *others]  # one of a head, so that norms do not bound its scores
    rows: dict[str, Any] = {"dense_ms": milliseconds(dot_product_attention, inputs[:3], calls=1)}
    for implementation in IMPLEMENTATIONS:
        whole = functools.partial(sla.sparse_linear_attention, topk=topk, implementation=implementation)
        rows[f"sla_{implementation}_ms"] = milliseconds(whole, inputs)
        rows[f"sla_{implementation}_long_key_ms"] = milliseconds(whole, long_key)
    rows["sagesla_ms"] = milliseconds(functools.partial(sage.sage_sparse_linear_attention, topk=topk), inputs)
    if parts:
        rows["sla_parts"] = sla_parts(inputs, topk)
        rows["sagesla_parts"] = sage_parts(inputs, topk)
    logging.info("%d heads, %d tokens, topk %s: %s", heads, tokens, topk, rows)
    return rows


def random_inputs(heads: int, tokens: int, seed: int = 0) -> list[jax.Array]:
    """Draws normal q, k, v `[1, tokens, heads, 128]`, and a projection with its bias, bfloat16."""
    shapes = [(1, tokens, heads, DIM)] * 3 + [(DIM, DIM), (DIM,)]
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    q, k, v, weight, bias = (jax.random.normal(key, s, jnp.bfloat16) for key, s in zip(keys, shapes, strict=True))
    return [q, k, v, weight * DIM**-0.5, bias]


def milliseconds(function: Callable, inputs, *, calls: int = 5) -> float:
    """Returns the milliseconds of a compiled call."""
    return 1e3 * seconds_per_call(jax.jit(function), [tuple(inputs)], calls=calls)


def sla_parts(inputs: list[jax.Array], topk: float) -> dict[str, Any]:
    """Measures each kernel in milliseconds, and the bytes that the parts around the sparse kernel cannot do without."""
    from turbojax.kernels.sla import fused, mosaic_forward, triton_forward, triton_summary
    from turbojax.kernels.sla.reference import SparseInputs

    q, k, v, weight, bias = inputs
    settings = fused.settings("mosaic", chosen_blocks(q, topk, 64), block_q=128, block_k=64, dim=DIM)
    key_summary = functools.partial(triton_summary.key_summary, block=64, norms=True)
    k_means, state, normalizer, k_norm = jax.jit(key_summary)(k, v)
    table, q_norms = jax.jit(lambda q, k_means: fused.block_table(q, k_means, settings))(q, k_means)
    bounds = fused.score_bounds(q_norms, k_norm, DIM)
    projected = fused.project_state(state, weight)
    operands = [SparseInputs(q, k, v, table, projected, normalizer, bias.astype(jnp.float32), bounds)]
    triton = functools.partial(triton_forward.sparse_forward, settings=settings)
    mosaic = functools.partial(mosaic_forward.sparse_forward, block_k=64)
    pairs = table.size * 128 * 64
    parts = {
        "key_summary_ms": milliseconds(key_summary, (k, v)),
        "block_map_ms": milliseconds(lambda q, k_means: fused.block_table(q, k_means, settings), (q, k_means)),
        "query_means_ms": milliseconds(lambda q: triton_summary.block_means(q, 128), (q,)),
        "sparse_mosaic_ms": milliseconds(mosaic, operands),
        "sparse_triton_ms": milliseconds(lambda *a: triton(*a)[0], operands),
    }
    return parts | {
        "sparse_mosaic_tflops": 4e-9 * pairs * DIM / parts["sparse_mosaic_ms"],
        "sparse_triton_tflops": 4e-9 * pairs * DIM / parts["sparse_triton_ms"],
        "bytes_around": 3 * q.nbytes,
        "bytes_of_sparse": 2 * q.nbytes + 4 * table.size * 64 * DIM,
        "bytes_minimum": 4 * q.nbytes,
    }


def sage_parts(inputs: list[jax.Array], topk: float) -> dict[str, Any]:
    """Measures each kernel of SageSLA, with the blocks and float8 values of published checkpoints on Hopper."""
    from turbojax.kernels.sage import fused, triton_forward, triton_quantize
    from turbojax.kernels.sage.triton_forward import SageInputs
    from turbojax.kernels.sla.fused import project_state, table_of_means
    from turbojax.kernels.sla.triton_summary import key_summary, mean_of_means

    q, k, v, weight, bias = inputs
    settings = fused.settings(chosen_blocks(q, topk, 128), block_q=64, block_k=128, values="float8")
    k_means, state, normalizer, _ = jax.jit(lambda k, v: key_summary(k, v, 128))(k, v)
    k_mean = mean_of_means(k_means, k.shape[1], 128)
    quantize_q = functools.partial(triton_quantize.quantize_rows, block=64, means=True)
    quantize_k = functools.partial(triton_quantize.quantize_rows, block=128)
    q_code, q_scale, q_means = jax.jit(quantize_q)(q)
    k_code, k_scale, _ = jax.jit(lambda k, mean: quantize_k(k, mean=mean))(k, k_mean)
    v_code, v_scale = jax.jit(triton_quantize.quantize_values)(v)

    block_map = functools.partial(table_of_means, count=settings.count)
    table = jax.jit(block_map)(q_means, k_means, k_mean)
    projected = project_state(state, weight)
    codes = q_code, q_scale, k_code, k_scale, v_code, v_scale
    operands = SageInputs(*codes, table, q, projected, normalizer, bias.astype(jnp.float32))
    sparse = functools.partial(triton_forward.sage_forward, settings=settings)
    return {
        "quantize_q_ms": milliseconds(quantize_q, (q,)),
        "quantize_k_ms": milliseconds(lambda k, mean: quantize_k(k, mean=mean), (k, k_mean)),
        "quantize_v_ms": milliseconds(triton_quantize.quantize_values, (v,)),
        "block_map_ms": milliseconds(block_map, (q_means, k_means, k_mean)),
        "sparse_ms": milliseconds(sparse, (operands,)),
        "bytes_of_sparse": 2 * q.nbytes + q.nbytes // 2 + 2 * table.size * 128 * DIM,
    }


def chosen_blocks(q: jax.Array, topk: float, block: int) -> int:
    """Returns the number of key blocks that each query block attends to."""
    return sla.num_selected(topk, cdiv(q.shape[1], block))


def measure_backward(*, heads: int = 12, tokens: int = 32760, topk: float = 0.1) -> dict[str, float]:
    """Measures the gradients of q, k, v and the projection with the forward pass, and that pass alone."""
    inputs = random_inputs(heads, tokens)
    direction = jax.random.normal(jax.random.key(1), inputs[0].shape, jnp.bfloat16)

    def along(*inputs):
        out = sla.sparse_linear_attention(*inputs, topk=topk)
        return jnp.vdot(out.astype(jnp.float32), direction.astype(jnp.float32))

    both = milliseconds(jax.grad(along, argnums=(0, 1, 2, 3, 4)), inputs)
    return {"forward_and_backward_ms": both, "forward_ms": milliseconds(along, inputs)}


def measure_errors(*, heads: int = 4, tokens: int = 32760, topks=(0.05, 0.1, 0.15)) -> dict[str, Any]:
    """Measures how far SLA and SageSLA are from dense attention, and from each other, without their linear branch.

    "random": normal q, k, v. "structured": as a video's, neighbours alike in space and time, and a few channels far
    larger than the others.
    """
    zeros = [jnp.zeros((DIM, DIM), jnp.bfloat16), jnp.zeros(DIM, jnp.bfloat16)]
    result: dict[str, Any] = {}
    kinds = {"random": random_inputs(heads, tokens)[:3], "structured": structured_inputs(heads, GRIDS[tokens])}
    dense = {kind: jax.jit(dot_product_attention)(*qkv) for kind, qkv in kinds.items()}
    for topk in topks:
        sparse = jax.jit(functools.partial(sla.sparse_linear_attention, topk=topk))
        same_blocks = jax.jit(functools.partial(sla.sparse_linear_attention, topk=topk, block_q=64, block_k=128))
        quantized = jax.jit(functools.partial(sage.sage_sparse_linear_attention, topk=topk))
        for kind, qkv in kinds.items():
            by_sage = quantized(*qkv, *zeros)
            result[f"{kind}, topk {topk}"] = {
                "sla_against_dense": difference(sparse(*qkv, *zeros), dense[kind]),
                "sagesla_against_dense": difference(by_sage, dense[kind]),
                "sagesla_against_sla_of_its_blocks": difference(by_sage, same_blocks(*qkv, *zeros)),
            }
    return result


def structured_inputs(heads: int, grid: tuple[int, int, int]) -> list[jax.Array]:
    """Draws q, k, v `[1, tokens, heads, 128]`: waves over frames, rows and columns, 10 % noise, outlier channels."""
    places = jnp.stack(jnp.meshgrid(*(jnp.arange(n) / n for n in grid), indexing="ij"), axis=-1).reshape(-1, 3)
    inputs = []
    for i in range(3):
        keys = jax.random.split(jax.random.key(10 + i // 2), 3)  # q and k share their waves: like attends to like
        frequency = 6 * jax.random.normal(keys[0], (3, heads * DIM))
        phase = 2 * jnp.pi * jax.random.uniform(keys[1], (heads * DIM,))
        waves = jnp.sqrt(2.0) * jnp.sin(places @ frequency + phase[None])
        noise = 0.1 * jax.random.normal(jax.random.key(20 + i), waves.shape)
        outliers = jnp.where(jnp.arange(DIM) % 40 == 7, 6.0, 1.0) if i < 2 else jnp.ones(DIM)
        inputs.append(((waves + noise).reshape(1, -1, heads, DIM) * outliers[None, None, None]).astype(jnp.bfloat16))
    return inputs


def difference(got: jax.Array, expected: jax.Array) -> dict[str, float]:
    """Returns relative error and cosine."""
    a, b = got.astype(jnp.float32), expected.astype(jnp.float32)
    norms = jnp.linalg.norm(a), jnp.linalg.norm(b)
    return {
        "relative_error": float(jnp.linalg.norm(a - b) / norms[1]),
        "cosine": float(jnp.vdot(a, b) / norms[0] / norms[1]),
    }

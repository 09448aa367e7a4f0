"""Triton kernels of sparse-linear attention, backward; the equations are in `reference`.

With scores s = q k^T / sqrt(H), weights p = softmax(s) over the chosen blocks, and their result o = p v:

    dp = do v^T,    ds = p (dp - sum(do o)),    dq = ds k / sqrt(H),    dk = ds^T q / sqrt(H),    dv = p^T do

p comes back from the forward pass's log-sum-exp. dq goes over the blocks that a query block chose, dk and dv over the
query blocks that chose a key block: nothing is summed by atomics.
"""

from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from turbojax.kernels.sizes import cdiv
from turbojax.kernels.sla.triton_forward import Settings, Tiles
from turbojax.kernels.sla.triton_summary import LOG2_E
from turbojax.kernels.triton_call import output, sizes_of, triton_call


def tiles(capability: tuple[int, int] | None, *, block_q: int, block_k: int, dim: int) -> tuple[Tiles, Tiles]:
    """Tiles for dq, and for dk and dv; few registers are spilled, and on Hopper none (tests/kernels)."""
    crowded = dim == 128 and capability != (9, 0)
    for_queries = Tiles(32, warps=8, stages=2) if crowded else Tiles(64, warps=block_q // 16, stages=2)
    for_keys = Tiles(32 if dim == 128 and block_k == 128 else 64, warps=8, stages=2)
    return for_queries, for_keys


def invert_table(table: jax.Array, key_blocks: int) -> tuple[jax.Array, jax.Array]:
    """Finds the query blocks that chose each key block, from table int32 `[B, N, query blocks, chosen]`.

    Query blocks in the order of the key blocks that chose them, int32 `[B, N, query blocks * chosen]`, and where each
    key block's begin, int32 `[B, N, key blocks + 1]`.
    """
    batch, heads, query_blocks, _ = table.shape
    pairs = table * query_blocks + jnp.arange(query_blocks, dtype=jnp.int32)[None, None, :, None]
    pairs = jnp.sort(pairs.reshape(batch, heads, -1), axis=-1)
    first = jnp.arange(key_blocks + 1, dtype=jnp.int32) * query_blocks
    begins = jax.vmap(jax.vmap(lambda row: jnp.searchsorted(row, first)))(pairs)
    return pairs % query_blocks, begins.astype(jnp.int32)


@triton.jit
def query_gradient_step(queries, d_out, k, v, left, lse, delta, dq, KEYS: tl.constexpr, MASKED: tl.constexpr,
                        ROW: tl.constexpr, H: tl.constexpr, SCALE: tl.constexpr):  # fmt: skip
    """Adds ds k of KEYS rows at k and v, ROW elements apart, to dq; MASKED: only `left` rows exist."""
    keys = tl.arange(0, KEYS)
    rows = keys
    if MASKED:  # rows past the end repeat the last one and get no weight
        rows = tl.minimum(keys, tl.maximum(left - 1, 0))
    offsets = rows[:, None] * ROW + tl.arange(0, H)[None, :]
    k_tile = tl.load(k + offsets)
    p = tl.exp2(tl.dot(queries, k_tile.T) * SCALE - lse[:, None])
    if MASKED:
        p = tl.where((keys < left)[None, :], p, 0.0)
    ds = p * (tl.dot(d_out, tl.load(v + offsets).T) - delta[:, None])
    return tl.dot(ds.to(tl.bfloat16), k_tile, dq)


@triton.jit
def query_gradient_kernel(q, k, v, table, sparse, lse, d_out, linear, dq, delta,
                          L: tl.constexpr, N: tl.constexpr, H: tl.constexpr, BLOCK_Q: tl.constexpr,
                          BLOCK_K: tl.constexpr, KEYS: tl.constexpr, COUNT: tl.constexpr,
                          SCALE: tl.constexpr):  # fmt: skip
    """One program a query block of a head: dq, added to `linear`, and delta = sum(do o) for the other kernel."""
    i, head = tl.program_id(0), tl.program_id(1)
    sample = (head // N).to(tl.int64) * L * N * H + (head % N) * H
    rows = i * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = rows < L
    first_row = sample + i.to(tl.int64) * (BLOCK_Q * N * H)
    # Rows past the end repeat the last one, as in the forward pass.
    row_offsets = (tl.minimum(rows, L - 1) - i * BLOCK_Q)[:, None] * (N * H) + tl.arange(0, H)[None, :]
    queries = tl.load(q + first_row + row_offsets)
    gradient = tl.load(d_out + first_row + row_offsets)
    product = gradient.to(tl.float32) * tl.load(sparse + first_row + row_offsets).to(tl.float32)
    row_delta = tl.sum(product, axis=1)
    statistics = head.to(tl.int64) * L + rows
    tl.store(delta + statistics, row_delta, mask=inside)
    row_lse = tl.load(lse + statistics, mask=inside, other=0.0)
    steps: tl.constexpr = BLOCK_K // KEYS
    k += sample
    v += sample
    table += (head * tl.cdiv(L, BLOCK_Q) + i).to(tl.int64) * COUNT
    acc = tl.zeros((BLOCK_Q, H), tl.float32)
    whole = COUNT
    if L % BLOCK_K:  # the partial block first, as in the forward pass
        whole = COUNT - 1
        last = tl.load(table + COUNT - 1) * BLOCK_K
        for step in tl.range(steps, num_stages=1):
            block = tl.minimum(last + step * KEYS, L - 1).to(tl.int64) * (N * H)
            left = L - last - step * KEYS
            acc = query_gradient_step(
                queries, gradient, k + block, v + block, left, row_lse, row_delta, acc, KEYS, True, N * H, H, SCALE
            )
    chosen = tl.load(table)
    for step in range(whole * steps):
        block = (chosen * BLOCK_K + (step % steps) * KEYS).to(tl.int64) * (N * H)
        chosen = tl.load(table + tl.minimum((step + 1) // steps, COUNT - 1))  # a step ahead
        acc = query_gradient_step(
            queries, gradient, k + block, v + block, KEYS, row_lse, row_delta, acc, KEYS, False, N * H, H, SCALE
        )
    acc = acc * (SCALE / LOG2_E) + tl.load(linear + first_row + row_offsets).to(tl.float32)
    tl.store(dq + first_row + row_offsets, acc.to(tl.bfloat16), mask=inside[:, None])


@triton.jit
def key_gradients_kernel(q, k, v, queries, begins, lse, delta, d_out, linear_k, linear_v, dk, dv,
                         L: tl.constexpr, N: tl.constexpr, H: tl.constexpr, BLOCK_Q: tl.constexpr,
                         BLOCK_K: tl.constexpr, ROWS: tl.constexpr, ENTRIES: tl.constexpr,
                         SCALE: tl.constexpr):  # fmt: skip
    """One program a key block of a head: dk and dv from the query blocks that chose it, ROWS queries at a time.

    They are added to linear_k and linear_v.
    """
    j, head = tl.program_id(0), tl.program_id(1)
    sample = (head // N).to(tl.int64) * L * N * H + (head % N) * H
    columns = tl.arange(0, H)
    keys = j * BLOCK_K + tl.arange(0, BLOCK_K)
    key_offsets = sample + tl.minimum(keys, L - 1).to(tl.int64)[:, None] * (N * H) + columns[None, :]
    k_tile, v_tile = tl.load(k + key_offsets), tl.load(v + key_offsets)
    q += sample
    d_out += sample
    lse += head.to(tl.int64) * L
    delta += head.to(tl.int64) * L
    begins += head * (tl.cdiv(L, BLOCK_K) + 1) + j
    begin, end = tl.load(begins), tl.load(begins + 1)
    queries += head.to(tl.int64) * ENTRIES
    steps: tl.constexpr = BLOCK_Q // ROWS
    dk_acc = tl.zeros((BLOCK_K, H), tl.float32)
    dv_acc = tl.zeros((BLOCK_K, H), tl.float32)
    query_block = tl.load(queries + tl.minimum(begin, ENTRIES - 1))
    for step in range((end - begin) * steps):
        first = tl.minimum(query_block * BLOCK_Q + (step % steps) * ROWS, L - 1)
        left = L - query_block * BLOCK_Q - (step % steps) * ROWS
        query_block = tl.load(queries + tl.minimum(begin + (step + 1) // steps, ENTRIES - 1))  # a step ahead
        rows = tl.minimum(tl.arange(0, ROWS), tl.maximum(left - 1, 0))  # past the end: repeated, and without weight
        block = first.to(tl.int64) * (N * H)
        offsets = rows[:, None] * (N * H) + columns[None, :]
        row_lse = tl.where(tl.arange(0, ROWS) < left, tl.load(lse + first + rows), float("inf"))
        row_delta = tl.load(delta + first + rows)
        q_tile, gradient = tl.load(q + block + offsets), tl.load(d_out + block + offsets)
        p = tl.exp2(tl.dot(k_tile, q_tile.T) * SCALE - row_lse[None, :])
        dv_acc = tl.dot(p.to(tl.bfloat16), gradient, dv_acc)
        ds = p * (tl.dot(v_tile, gradient.T) - row_delta[None, :])
        dk_acc = tl.dot(ds.to(tl.bfloat16), q_tile, dk_acc)
    inside = (keys < L)[:, None]
    dk_acc = dk_acc * (SCALE / LOG2_E) + tl.load(linear_k + key_offsets).to(tl.float32)
    dv_acc += tl.load(linear_v + key_offsets).to(tl.float32)
    tl.store(dk + key_offsets, dk_acc.to(tl.bfloat16), mask=inside)
    tl.store(dv + key_offsets, dv_acc.to(tl.bfloat16), mask=inside)


def sparse_backward(
    q, k, v, table, sparse, lse, d_out, linear: tuple[jax.Array, jax.Array, jax.Array], settings: Settings
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v through the sparse softmax plus `linear`, those of another branch; bfloat16.

    q, k, v, d_out and all gradients `[B, L, N, H]`; table, sparse and lse as `triton_forward.sparse_forward` has them.
    """
    batch, length, heads, dim = q.shape
    key_blocks = cdiv(length, settings.block_k)
    blocks = {"BLOCK_Q": settings.block_q, "BLOCK_K": settings.block_k}
    constants: dict[str, Any] = sizes_of(q) | blocks | {"SCALE": dim**-0.5 * LOG2_E.value}
    gradient = output(jnp.bfloat16, *q.shape)
    for_queries, for_keys = settings.backward_tiles
    dq, delta = triton_call(
        query_gradient_kernel,
        *(q, k, v, table, sparse, lse, d_out, linear[0]),
        out_shape=(gradient, output(jnp.float32, *lse.shape)),
        grid=(table.shape[2], batch * heads),
        num_warps=for_queries.warps,
        num_stages=for_queries.stages,
        KEYS=for_queries.step,
        COUNT=table.shape[3],
        **constants,
    )
    queries, begins = invert_table(table, key_blocks)
    dk, dv = triton_call(
        key_gradients_kernel,
        *(q, k, v, queries, begins, lse, delta, d_out, *linear[1:]),
        out_shape=(gradient, gradient),
        grid=(key_blocks, batch * heads),
        num_warps=for_keys.warps,
        num_stages=for_keys.stages,
        ROWS=for_keys.step,
        ENTRIES=queries.shape[2],
        **constants,
    )
    return dq, dk, dv

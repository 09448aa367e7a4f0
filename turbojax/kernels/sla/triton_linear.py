"""Triton kernels of the linear branch's gradients; the equations are in `reference`.

With z = sum phi(k), r = 1e-5 + phi(q) z, y = phi(q) / r and P = phi(k)^T v W^T the branch is y P + b. From g, the
gradient of the output:

    dy = g P^T,   dr = -sum(phi(q) dy) / r^2,   dphi(q) = dy / r + dr z,   dz = sum dr phi(q),   dP = y^T g
    d_state = dP W,   dphi(k) = v d_state^T + dz,   dv = phi(k) d_state,   dW = sum dP^T state,   db = sum g

q and g are read twice, k and v once: dP in the kernel of dq would not fit the registers. Programs add up what they
see; their sums are added in a fixed order.
"""

import functools

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from turbojax.kernels.sla.triton_summary import launch_split, split_groups
from turbojax.kernels.triton_call import output

ROWS = 64  # of a step
launch = functools.partial(launch_split, rows=ROWS, stages=2)


@triton.jit
def softmax_rows(x):
    """phi: softmax over the last axis of a float32 tile."""
    e = tl.exp(x - tl.max(x, axis=1)[:, None])
    return e / tl.sum(e, axis=1)[:, None]


@triton.jit
def linear_queries_kernel(q, d_out, projected, normalizer, dq, d_normalizer, d_bias,
                          L: tl.constexpr, N: tl.constexpr, H: tl.constexpr, ROWS: tl.constexpr,
                          GROUPS: tl.constexpr, SPLITS: tl.constexpr):  # fmt: skip
    """One program GROUPS groups of ROWS queries of a head: dq, and its parts of dz and db."""
    n, split, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    columns = tl.arange(0, H)
    head = b * N + n
    square = columns[:, None] * H + columns[None, :]
    projected += head.to(tl.int64) * H * H
    z = tl.load(normalizer + head * H + columns)[None, :]
    dz_acc = tl.zeros((H,), tl.float32)
    bias_acc = tl.zeros((H,), tl.float32)
    for i in range(split * GROUPS, tl.minimum((split + 1) * GROUPS, (L + ROWS - 1) // ROWS)):
        rows = i * ROWS + tl.arange(0, ROWS)
        inside = (rows < L)[:, None]
        offsets = ((b.to(tl.int64) * L + rows) * N + n)[:, None] * H + columns[None, :]
        phi = softmax_rows(tl.load(q + offsets, mask=inside, other=0.0).to(tl.float32))
        g = tl.load(d_out + offsets, mask=inside, other=0.0)
        r = 1e-5 + tl.sum(phi * z, axis=1)
        dy = tl.dot(g, tl.load(projected + square).T)  # at every step, to spare registers
        dr = -tl.sum(phi * dy, axis=1) / (r * r)
        # Through the softmax of q: sum(phi dphi) is -1e-5 dr.
        tl.store(dq + offsets, (phi * (dy / r[:, None] + dr[:, None] * (z + 1e-5))).to(tl.bfloat16), mask=inside)
        dz_acc += tl.sum(phi * dr[:, None], axis=0)
        bias_acc += tl.sum(g.to(tl.float32), axis=0)
    part = head * SPLITS + split
    tl.store(d_normalizer + part * H + columns, dz_acc)
    tl.store(d_bias + part * H + columns, bias_acc)


@triton.jit
def linear_state_kernel(q, d_out, normalizer, d_projected,
                        L: tl.constexpr, N: tl.constexpr, H: tl.constexpr, ROWS: tl.constexpr,
                        GROUPS: tl.constexpr, SPLITS: tl.constexpr):  # fmt: skip
    """One program GROUPS groups of ROWS queries of a head: its part of dP."""
    n, split, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    columns = tl.arange(0, H)
    head = b * N + n
    z = tl.load(normalizer + head * H + columns)[None, :]
    acc = tl.zeros((H, H), tl.float32)
    for i in range(split * GROUPS, tl.minimum((split + 1) * GROUPS, (L + ROWS - 1) // ROWS)):
        rows = i * ROWS + tl.arange(0, ROWS)
        inside = (rows < L)[:, None]
        offsets = ((b.to(tl.int64) * L + rows) * N + n)[:, None] * H + columns[None, :]
        phi = softmax_rows(tl.load(q + offsets, mask=inside, other=0.0).to(tl.float32))
        y = phi / (1e-5 + tl.sum(phi * z, axis=1))[:, None]
        acc = tl.dot(y.to(tl.bfloat16).T, tl.load(d_out + offsets, mask=inside, other=0.0), acc)
    part = (head * SPLITS + split).to(tl.int64)
    tl.store(d_projected + part * H * H + columns[:, None] * H + columns[None, :], acc)


@triton.jit
def linear_keys_kernel(k, v, d_state, d_normalizer, dk, dv,
                       L: tl.constexpr, N: tl.constexpr, H: tl.constexpr, ROWS: tl.constexpr,
                       GROUPS: tl.constexpr):  # fmt: skip
    """One program GROUPS groups of ROWS keys of a head: dk and dv."""
    n, split, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    columns = tl.arange(0, H)
    head = b * N + n
    square = columns[:, None] * H + columns[None, :]
    d_state += head.to(tl.int64) * H * H
    dz = tl.load(d_normalizer + head * H + columns)[None, :]
    for i in range(split * GROUPS, tl.minimum((split + 1) * GROUPS, (L + ROWS - 1) // ROWS)):
        rows = i * ROWS + tl.arange(0, ROWS)
        inside = (rows < L)[:, None]
        offsets = ((b.to(tl.int64) * L + rows) * N + n)[:, None] * H + columns[None, :]
        state = tl.load(d_state + square)  # at every step, to spare registers
        phi = softmax_rows(tl.load(k + offsets, mask=inside, other=0.0).to(tl.float32))
        d_phi = tl.dot(tl.load(v + offsets, mask=inside, other=0.0), state.T) + dz
        d_k = phi * (d_phi - tl.sum(phi * d_phi, axis=1)[:, None])
        tl.store(dk + offsets, d_k.to(tl.bfloat16), mask=inside)
        tl.store(dv + offsets, tl.dot(phi.to(tl.bfloat16), state).to(tl.bfloat16), mask=inside)


def linear_queries(
    q: jax.Array, d_out: jax.Array, projected: jax.Array, normalizer: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """dq bfloat16 `[B, L, N, H]`; dP `[B, N, H, H]`, dz and db `[B, N, H]`, float32.

    q and d_out bfloat16 `[B, L, N, H]`, projected (P) bfloat16 `[B, N, H, H]`, normalizer (z) float32 `[B, N, H]`.
    """
    batch, length, heads, dim = q.shape
    part = batch, heads, split_groups(length, batch * heads, ROWS)[1], dim
    out_shape = output(jnp.bfloat16, *q.shape), output(jnp.float32, *part), output(jnp.float32, *part)
    dq, d_normalizer, d_bias = launch(
        linear_queries_kernel, q, d_out, projected, normalizer, out_shape=out_shape, partial_sums=True
    )
    square = output(jnp.float32, *part, dim)
    (d_projected,) = launch(linear_state_kernel, q, d_out, normalizer, out_shape=(square,), partial_sums=True)
    return dq, d_projected.sum(axis=2), d_normalizer.sum(axis=2), d_bias.sum(axis=2)


def linear_keys(k: jax.Array, v: jax.Array, d_state: jax.Array, d_normalizer: jax.Array) -> tuple[jax.Array, jax.Array]:
    """dk and dv, bfloat16 `[B, L, N, H]`; d_state bfloat16 `[B, N, H, H]`, d_normalizer (dz) float32 `[B, N, H]`."""
    dk, dv = launch(linear_keys_kernel, k, v, d_state, d_normalizer, out_shape=(output(jnp.bfloat16, *k.shape),) * 2)
    return dk, dv

"""Hopper kernel of the int8 linear layer in Pallas Mosaic GPU; the equations are in `reference`.

One warp group feeds two others by TMA, over the tiles of a persistent grid. While one of the two waits for its tensor
core sums the other scales its own, which hides the conversion to float32: it takes nearly as many cycles. A cluster of
two blocks may share the weight tile by multicast.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from turbojax.errors import UserError
from turbojax.kernels import mosaic
from turbojax.kernels.int8.reference import BLOCK, HOPPER_STAGES
from turbojax.kernels.norms import Residual

CONSUMERS = 2  # warp groups that compute


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Rows and columns of one warp group's tile, tiles in flight, and the width of a band of tiles in the grid."""

    rows: int
    columns: int
    stages: int
    band: int = 8
    cluster: int = 1


# The fastest of those tried at the shapes of the 1.3B and the 14B model, see docs/notes/linear.md.
BLOCK_TILES = Tiles(rows=64, columns=128, stages=HOPPER_STAGES, cluster=2)
CHANNEL_TILES = Tiles(rows=128, columns=128, stages=3, cluster=1)


def matmul(
    x_q: jax.Array,
    x_scale: jax.Array,
    w_q: jax.Array,
    w_scale: jax.Array,
    bias: jax.Array | None,
    *,
    scheme: str,
    gelu: bool = False,
    requantize: bool = False,
    add_to: Residual | None = None,
    tiles: Tiles | None = None,
    num_sms: int | None = None,
) -> list[jax.Array]:
    """int8 x `[M, K]` times int8 w `[N, K]` to bfloat16 `[M, N]`; K and N multiples of 128.

    scheme "block128": x_scale `[M / 128, K / 128]`, w_scale `[N / 128, K / 128]`; "channel": `[M]` and `[N]`.
    requantize (block128, K / 128 above the number of stages): the result as int8 and its scales `[M / 128, N / 128]`.
    add_to (not with requantize): the result is its sum with that, whose x is bfloat16 `[B, L, N]`.
    """
    (m, k), n = x_q.shape, w_q.shape[0]
    if m % 8 or n % BLOCK or k % BLOCK:
        raise UserError(f"the Hopper int8 kernel takes rows in eights and features in {BLOCK}s, not {m} x {n} x {k}")
    if scheme == "block128" and len(x_scale) != pl.cdiv(m, BLOCK):
        raise UserError(f"the Hopper int8 kernel takes one scale per {BLOCK} rows, not {len(x_scale)} for {m} rows")
    num_sms = num_sms or jax.devices()[0].core_count
    tiles = tiles or (BLOCK_TILES if scheme == "block128" else CHANNEL_TILES)
    assert not requantize or (scheme == "block128" and k // BLOCK > tiles.stages and add_to is None)
    optional: dict[str, jax.Array] = {} if bias is None else {"bias": bias.astype(jnp.float32)}
    if add_to is not None:
        optional["residual"] = add_to.x.reshape(m, n)
        if add_to.gate is not None:
            optional["gate"] = add_to.gate.reshape(-1, n)
    body = functools.partial(kernel, m=m, n=n, k=k, tiles=tiles, scheme=scheme, optional=tuple(optional), gelu=gelu)
    out_type = [jax.ShapeDtypeStruct((m, n), jnp.int8 if requantize else jnp.bfloat16)]
    if requantize:
        out_type.append(jax.ShapeDtypeStruct((pl.cdiv(m, BLOCK), n // BLOCK), jnp.float32))
    call = plgpu.kernel(
        body,
        out_type=out_type,
        grid=(num_sms // tiles.cluster,),
        grid_names=("cluster_grid",),
        cluster=(tiles.cluster,),
        cluster_names=("cluster",),
        num_threads=CONSUMERS + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    # Tiles past the last row are computed and dropped; they read scales too.
    rows_a_cluster = tiles.rows * CONSUMERS * tiles.cluster
    rows_a_scale = BLOCK if scheme == "block128" else 1
    scales = pl.cdiv(m, rows_a_cluster) * rows_a_cluster // rows_a_scale
    x_scale = jnp.pad(x_scale, ((0, scales - len(x_scale)),) + ((0, 0),) * (x_scale.ndim - 1))
    with jax.named_scope("int8_matmul"):
        return call(x_q, x_scale, w_q, w_scale, *optional.values())


def gelu_tanh(x: jax.Array) -> jax.Array:
    """GELU, tanh form, as x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))."""
    return x / (1 + jnp.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))


def to_int8(f: jax.Array, amax: jax.Array) -> jax.Array:
    """f 128 / amax, rounded to the nearest even by adding 1.5 * 2^23, whose last bit counts ones, and saturated."""
    rounded = (f * (128.0 / amax) + 12582912.0) - 12582912.0
    return jnp.minimum(jnp.maximum(rounded, -128.0), 127.0).astype(jnp.int8)


def kernel(x, x_scale, w, w_scale, *rest, m, n, k, tiles: Tiles, scheme: str, optional: tuple[str, ...], gelu: bool):
    """optional: which of bias `[N]`, residual `[M, N]` and gate `[B, N]` come before the outputs."""
    given, (y, *scales) = dict(zip(optional, rest, strict=False)), rest[len(optional) :]
    bias, residual, gate = (given.get(name) for name in ("bias", "residual", "gate"))
    y_scale = scales[0] if scales else None
    block_m, block_n = tiles.rows * CONSUMERS, tiles.columns
    m_tiles, n_tiles = pl.cdiv(m, block_m * tiles.cluster), n // block_n
    operand, result = mosaic.in_tiles(jnp.int8), mosaic.in_tiles(y.dtype)
    acc_dtype = jnp.float32 if scheme == "block128" else jnp.int32

    def pipeline(body, context):
        return plgpu.emit_pipeline_warp_specialized(
            body,
            grid=(k // BLOCK,),
            memory_registers=40,
            in_specs=[
                plgpu.BlockSpec((block_m, BLOCK), lambda i: (0, i), transforms=operand, memory_space=plgpu.SMEM),
                plgpu.BlockSpec(
                    (block_n, BLOCK),
                    lambda i: (0, i),
                    transforms=operand,
                    memory_space=plgpu.SMEM,
                    collective_axes=("cluster",) if tiles.cluster > 1 else (),
                ),
            ],
            wg_axis="wg",
            num_compute_wgs=CONSUMERS,
            max_concurrent_steps=tiles.stages,
            compute_context=context,
        )

    def ignore(*_, **__):
        return None

    @functools.partial(
        pl.run_scoped,
        allocations=pipeline(ignore, ignore).get_allocations(x, w),
        out_smem=plgpu.SMEM((CONSUMERS, tiles.rows, tiles.columns), y.dtype, transforms=result),
        row_amax=plgpu.SMEM((CONSUMERS * tiles.rows,), jnp.float32),
        both=plgpu.Barrier(num_arrivals=CONSUMERS),
        residual_ready=plgpu.Barrier(num_barriers=CONSUMERS),
        collective_axes="wg",
    )
    def scope(allocations, out_smem, row_amax, both, residual_ready):
        wg = lax.axis_index("wg")
        in_cluster = lax.axis_index("cluster")

        @plgpu.nd_loop((m_tiles * n_tiles,), collective_axes="cluster_grid")
        def tile_loop(info):
            (linear,) = info.index
            m_cluster, j = plgpu.planar_snake(linear, (m_tiles, n_tiles), 0, tiles.band)
            i = m_cluster * tiles.cluster + in_cluster
            block_rows, block_columns = pl.ds(i * block_m, block_m), pl.ds(j * block_n, block_n)
            own_rows = pl.ds(wg * tiles.rows, tiles.rows)
            first_row, first_column = i * block_m + wg * tiles.rows, j * block_n
            own_tile = pl.ds(first_row, tiles.rows), pl.ds(first_column, tiles.columns)

            def multiply(idxs, x_smem, w_smem, acc):
                operands = x_smem.at[own_rows], w_smem.transpose((1, 0))
                if scheme == "channel":
                    plgpu.wgmma(acc, *operands)
                    plgpu.wgmma_wait(0)
                    return acc
                (step,) = idxs
                scale = x_scale[i, step] * w_scale[j, step]

                def block_sum(part):
                    plgpu.wgmma(part, *operands)
                    return part[...]

                part = pl.run_scoped(block_sum, plgpu.ACC((tiles.rows, tiles.columns), jnp.int32))
                return acc + part.astype(jnp.float32) * scale

            def context(run):
                shape = (tiles.rows, tiles.columns)
                if residual is not None:  # arrives during the products, where the result will lie
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    plgpu.copy_gmem_to_smem(residual.at[own_tile], out_smem.at[wg], residual_ready.at[wg])
                if scheme == "channel":

                    @functools.partial(pl.run_scoped, acc=plgpu.ACC(shape, acc_dtype))
                    def with_acc(acc):
                        run(acc)
                        epilogue(acc[...])

                else:
                    epilogue(run(plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)))

            def block_amax(f):
                """The largest |f| over both warp groups, 1e-8 at least; NaN if any is.

                Both groups reduce the same 128 rows to a scalar: the compiler gives all groups one scratch for that,
                where different values would race. Neither overwrites rows that the other has yet to read: a tile's
                products lie between, whose operands come only after both have used the ones before.
                """
                row_amax[pl.ds(wg * tiles.rows, tiles.rows)] = jnp.max(jnp.abs(f), axis=1)
                plgpu.barrier_arrive(both)
                plgpu.barrier_wait(both)
                return jnp.maximum(jnp.max(row_amax[...]), 1e-8)

            def gates(shape):
                """Gates of the group's own rows, which belong to two samples at most."""
                assert gate is not None

                def of_sample(sample):
                    row = mosaic.load(gate.at[sample, pl.ds(first_column, tiles.columns)])
                    return lax.broadcast_in_dim(row, shape, [1])

                batch = gate.shape[0]
                sample = first_row // (m // batch)
                if batch == 1:
                    return of_sample(0)
                sample = jnp.minimum(sample, batch - 1)  # tiles past the last row, too, read gates
                row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
                here = row < (sample + 1) * (m // batch) - first_row
                return jnp.where(here, of_sample(sample), of_sample(jnp.minimum(sample + 1, batch - 1)))

            def epilogue(acc):
                if scheme == "channel":
                    acc = acc.astype(jnp.float32)
                    row_scale = mosaic.load(x_scale.at[pl.ds(first_row, tiles.rows)])
                    column_scale = mosaic.load(w_scale.at[pl.ds(first_column, tiles.columns)])
                    acc = acc * lax.broadcast_in_dim(row_scale, acc.shape, [0])
                    acc = acc * lax.broadcast_in_dim(column_scale, acc.shape, [1])
                if bias is not None:
                    b = mosaic.load(bias.at[pl.ds(first_column, tiles.columns)])
                    acc = acc.astype(jnp.bfloat16).astype(jnp.float32) + lax.broadcast_in_dim(b, acc.shape, [1])
                if gelu:
                    acc = gelu_tanh(acc.astype(jnp.bfloat16).astype(jnp.float32))
                out = acc.astype(jnp.bfloat16)
                if y_scale is not None:
                    amax = block_amax(out.astype(jnp.float32))
                    out = to_int8(out.astype(jnp.float32), amax)

                    @pl.when((wg == 0) & (i * block_m < m))
                    def store_scale():
                        y_scale[i, j] = amax / 128.0

                if residual is None:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                else:
                    plgpu.barrier_wait(residual_ready.at[wg])
                    branch = out.astype(jnp.float32) * (gates(out.shape) if gate is not None else 1.0)
                    before = mosaic.load(out_smem.at[wg], layout=plgpu.Layout.WGMMA)
                    out = (before.astype(jnp.float32) + branch).astype(jnp.bfloat16)
                out_smem[wg] = out
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_smem.at[wg], y.at[own_tile])

            pipeline(multiply, context)(x.at[block_rows, :], w.at[block_columns, :], allocations=allocations)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

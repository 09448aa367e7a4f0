"""Hopper kernel of the int8 linear layer in Pallas Mosaic GPU; the equations are in `reference`.

One warp group feeds two others by TMA, over the tiles of a persistent grid. While one of the two waits for its tensor
core sums the other scales its own, which hides the conversion to float32: it takes nearly as many cycles. A cluster of
two blocks may share the weight tile by multicast.
"""

import dataclasses
import functools
from collections import namedtuple
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from turbojax.errors import UserError
from turbojax.kernels import mosaic
from turbojax.kernels.int8.reference import BLOCK, HOPPER_STAGES, QuantConfig
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
    quant: QuantConfig,
    *,
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
    scheme = quant.scheme
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
    sizes = Sizes(m, n, k, tiles, scheme, gelu)
    out_type = [jax.ShapeDtypeStruct((m, n), jnp.int8 if requantize else jnp.bfloat16)]
    if requantize:
        out_type.append(jax.ShapeDtypeStruct((pl.cdiv(m, BLOCK), n // BLOCK), jnp.float32))
    call = plgpu.kernel(
        functools.partial(kernel, sizes=sizes, optional=tuple(optional)),
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
    rows_a_cluster = sizes.block_rows * tiles.cluster
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


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Constants that a kernel is compiled with: y `[m, n]` = x `[m, k]` w^T."""

    m: int
    n: int
    k: int
    tiles: Tiles
    scheme: str
    gelu: bool

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of a warp group's tile."""
        return self.tiles.rows, self.tiles.columns

    @property
    def block_rows(self) -> int:
        """Rows of a block of warp groups."""
        return self.tiles.rows * CONSUMERS


# References to global memory; None where a kernel has no such.
Arrays = namedtuple("Arrays", "x x_scale w w_scale bias residual gate y y_scale")
# Shared memory of the pipeline, of the result and of each row's largest |y|, and barriers: `both` groups have come so
# far, and a group's residual has.
Scratch = namedtuple("Scratch", "pipeline both out residual_ready row_amax")


def kernel(x, x_scale, w, w_scale, *rest, sizes: Sizes, optional: tuple[str, ...]) -> None:
    """optional: which of bias `[N]`, residual `[M, N]` and gate `[B, N]` come before the outputs."""
    given, (y, *y_scale) = dict(zip(optional, rest, strict=False)), rest[len(optional) :]
    bias, residual, gate = (given.get(name) for name in ("bias", "residual", "gate"))
    arrays = Arrays(x, x_scale, w, w_scale, bias, residual, gate, y, *y_scale or [None])
    scratch = scratch_shapes(sizes, arrays)
    pl.run_scoped(functools.partial(compute_tiles, sizes, arrays), scratch, collective_axes="wg")


def scratch_shapes(sizes: Sizes, arrays: Arrays) -> Scratch:
    """Shapes of the shared memory, and barriers."""
    y = arrays.y.dtype
    return Scratch(
        pipeline=pipeline(sizes, lambda *_: None, lambda *_: None).get_allocations(arrays.x, arrays.w),
        both=plgpu.Barrier(num_arrivals=CONSUMERS),
        out=plgpu.SMEM((CONSUMERS, *sizes.tile), y, transforms=mosaic.in_tiles(y)),
        residual_ready=plgpu.Barrier(num_barriers=CONSUMERS),
        row_amax=plgpu.SMEM((sizes.block_rows,), jnp.float32),
    )


def pipeline(sizes: Sizes, body: Any, context: Any) -> Any:
    """One warp group copies blocks of x and w, the others call context(run), whose run() calls body for each block."""
    operand = functools.partial(
        plgpu.BlockSpec, index_map=lambda i: (0, i), transforms=mosaic.in_tiles(jnp.int8), memory_space=plgpu.SMEM
    )
    shared = ("cluster",) if sizes.tiles.cluster > 1 else ()
    return plgpu.emit_pipeline_warp_specialized(
        body,
        grid=(sizes.k // BLOCK,),
        memory_registers=40,
        in_specs=[operand((sizes.block_rows, BLOCK)), operand((sizes.tiles.columns, BLOCK), collective_axes=shared)],
        wg_axis="wg",
        num_compute_wgs=CONSUMERS,
        max_concurrent_steps=sizes.tiles.stages,
        compute_context=context,
    )


def compute_tiles(sizes: Sizes, arrays: Arrays, scratch: Scratch) -> None:
    """Loops over the program's tiles, in bands."""
    wg = lax.axis_index("wg")
    in_cluster = lax.axis_index("cluster")
    tiles = sizes.tiles
    grid = pl.cdiv(sizes.m, sizes.block_rows * tiles.cluster), sizes.n // tiles.columns

    @plgpu.nd_loop((grid[0] * grid[1],), collective_axes="cluster_grid")
    def tile_loop(info):
        (linear,) = info.index
        m_cluster, j = plgpu.planar_snake(linear, grid, 0, tiles.band)
        i = m_cluster * tiles.cluster + in_cluster
        x = arrays.x.at[pl.ds(i * sizes.block_rows, sizes.block_rows), :]
        w = arrays.w.at[pl.ds(j * tiles.columns, tiles.columns), :]
        own_rows = pl.ds(wg * tiles.rows, tiles.rows)
        first_row, first_column = i * sizes.block_rows + wg * tiles.rows, j * tiles.columns
        rows, columns = pl.ds(first_row, tiles.rows), pl.ds(first_column, tiles.columns)
        group = Consumer(sizes, arrays, scratch, wg, i, j, own_rows, rows, columns)
        pipeline(sizes, group.multiply, group.compute_tile)(x, w, allocations=scratch.pipeline)

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


@dataclasses.dataclass(frozen=True, eq=False)
class Consumer:
    """Warp group `wg` in block (i, j) of the result; own_rows are its own of the block, rows of the result."""

    sizes: Sizes
    arrays: Arrays
    scratch: Scratch
    wg: Any
    i: Any
    j: Any
    own_rows: Any
    rows: Any
    columns: Any

    def compute_tile(self, run: Any) -> None:
        """Computes products of all blocks, and what follows them."""
        residual, out = self.arrays.residual, self.scratch.out.at[self.wg]
        if residual is not None:  # arrives during the products, where the result will lie
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            ready = self.scratch.residual_ready.at[self.wg]
            plgpu.copy_gmem_to_smem(residual.at[self.rows, self.columns], out, ready)
        if self.sizes.scheme == "block128":
            zeros = plgpu.layout_cast(jnp.zeros(self.sizes.tile, jnp.float32), plgpu.Layout.WGMMA)
            self.store(self.epilogue(run(zeros)))
            return

        @functools.partial(pl.run_scoped, acc=plgpu.ACC(self.sizes.tile, jnp.int32))
        def with_acc(acc):
            run(acc)
            self.store(self.epilogue(self.scale(acc[...])))

    def multiply(self, step: tuple[Any], x_smem: Any, w_smem: Any, acc: Any) -> Any:
        """Adds one block of features to acc."""
        operands = x_smem.at[self.own_rows], w_smem.transpose((1, 0))
        if self.sizes.scheme == "channel":
            plgpu.wgmma(acc, *operands)
            plgpu.wgmma_wait(0)
            return acc
        scale = self.arrays.x_scale[self.i, step[0]] * self.arrays.w_scale[self.j, step[0]]

        def block_sum(part):
            plgpu.wgmma(part, *operands)
            return part[...]

        part = pl.run_scoped(block_sum, plgpu.ACC(self.sizes.tile, jnp.int32))
        return acc + part.astype(jnp.float32) * scale

    def scale(self, sums: jax.Array) -> jax.Array:
        """The channel scheme's sums times the scales of rows and columns."""
        acc = sums.astype(jnp.float32)
        row_scale = mosaic.load(self.arrays.x_scale.at[self.rows])
        column_scale = mosaic.load(self.arrays.w_scale.at[self.columns])
        acc = acc * mosaic.per_row(row_scale, acc.shape)
        return acc * mosaic.per_column(column_scale, acc.shape)

    def epilogue(self, acc: jax.Array) -> jax.Array:
        """Adds the bias, takes GELU, and rounds to the result's dtype as the reference does, with its block's scale."""
        if self.arrays.bias is not None:
            b = mosaic.load(self.arrays.bias.at[self.columns])
            acc = acc.astype(jnp.bfloat16).astype(jnp.float32) + mosaic.per_column(b, acc.shape)
        if self.sizes.gelu:
            acc = gelu_tanh(acc.astype(jnp.bfloat16).astype(jnp.float32))
        out = acc.astype(jnp.bfloat16)
        if self.arrays.y_scale is None:
            return out
        amax = self.block_amax(out.astype(jnp.float32))
        out = to_int8(out.astype(jnp.float32), amax)

        @pl.when((self.wg == 0) & (self.i * self.sizes.block_rows < self.sizes.m))
        def store_scale():
            self.arrays.y_scale[self.i, self.j] = amax / 128.0

        return out

    def block_amax(self, f: jax.Array) -> jax.Array:
        """The largest |f| over both warp groups, 1e-8 at least; NaN if any is.

        Both groups reduce the same 128 rows to a scalar: the compiler gives all groups one scratch for that, where
        different values would race. Neither overwrites rows that the other has yet to read: a tile's products lie
        between, whose operands come only after both have used the ones before.
        """
        self.scratch.row_amax[pl.ds(self.wg * self.sizes.tiles.rows, self.sizes.tiles.rows)] = jnp.abs(f).max(axis=1)
        plgpu.barrier_arrive(self.scratch.both)
        plgpu.barrier_wait(self.scratch.both)
        return jnp.maximum(jnp.max(self.scratch.row_amax[...]), 1e-8)

    def store(self, out: jax.Array) -> None:
        """Writes a tile, added to the residual if there is one."""
        out_smem = self.scratch.out
        if self.arrays.residual is None:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        else:
            plgpu.barrier_wait(self.scratch.residual_ready.at[self.wg])
            branch = out.astype(jnp.float32) * (1.0 if self.arrays.gate is None else self.gates(out.shape))
            before = mosaic.load(out_smem.at[self.wg], layout=plgpu.Layout.WGMMA)
            out = (before.astype(jnp.float32) + branch).astype(jnp.bfloat16)
        out_smem[self.wg] = out
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem.at[self.wg], self.arrays.y.at[self.rows, self.columns])

    def gates(self, shape: tuple[int, ...]) -> jax.Array:
        """Gates of the group's own rows, which belong to two samples at most."""
        gate = self.arrays.gate

        def of_sample(sample):
            return mosaic.per_column(mosaic.load(gate.at[sample, self.columns]), shape)

        batch = gate.shape[0]
        length = self.sizes.m // batch
        sample = self.rows.start // length
        if batch == 1:
            return of_sample(0)
        sample = jnp.minimum(sample, batch - 1)  # tiles past the last row, too, read gates
        row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
        here = row < (sample + 1) * length - self.rows.start
        return jnp.where(here, of_sample(sample), of_sample(jnp.minimum(sample + 1, batch - 1)))

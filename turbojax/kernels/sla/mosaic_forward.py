"""Hopper kernel of sparse-linear attention in Pallas Mosaic GPU; the equations are in `reference`.

A tile is 128 rows of queries of one head. Two warp groups compute 64 rows each, a third feeds them keys and values by
TMA, following the block table. Three chosen blocks of 64 keys make one step: power limits this kernel, and the wider a
product is, the less is read and rescaled for it. This takes all shared memory, so the state of the linear branch comes
through the ring of keys, behind a tile's last. Programs are persistent: the next tile's keys arrive during the epilogue
of this one.
"""

import dataclasses
import functools
from collections import namedtuple
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from turbojax.kernels import mosaic
from turbojax.kernels.sla.reference import BOUND, LOG2_E, SparseInputs

CONSUMERS = 2  # warp groups that compute
ROWS = 64  # queries of one of them
BLOCK_Q = CONSUMERS * ROWS
BLOCK = 64  # keys of one copy
PARTS = {64: 3, 128: 2}  # such blocks a step by block_k; one of 128 keys is never parted
STAGES = 2  # steps in flight

WGMMA = plgpu.Layout.WGMMA
ROW = WGMMA.reduce(1)  # one value a row
COLUMN = WGMMA.reduce(0)  # one value a column


def sparse_forward(inputs: SparseInputs, *, block_k: int, num_sms: int | None = None) -> jax.Array:
    """The sparse branch over the blocks of the table, plus the linear branch from its state: bfloat16 `[B, L, N, H]`.

    Query blocks have 128 rows; H is 64 or 128 and block_k, too; L is a multiple of 8.
    """
    q, k, v, table, projected, normalizer, bias, bounds = inputs
    batch, length, heads, dim = q.shape
    if block_k == 2 * BLOCK:
        table = jnp.stack([2 * table, 2 * table + 1], axis=-1).reshape(*table.shape[:-1], -1)
    sizes = Sizes(batch, length, heads, dim, block_k, chosen=table.shape[-1])
    # The two vectors of the epilogue travel as one.
    vectors = jnp.stack([normalizer, jnp.broadcast_to(bias, normalizer.shape)], axis=2)

    def entry(*refs):
        scratch = scratch_shapes(sizes, q.dtype)
        pl.run_scoped(functools.partial(kernel, sizes, *refs), *scratch, collective_axes="wg")

    call = plgpu.kernel(
        entry,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(num_sms or jax.devices()[0].core_count,),
        grid_names=("program",),
        num_threads=CONSUMERS + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            reduction_scratch_bytes=0,  # rows are reduced within a warp
        ),
    )
    with jax.named_scope("sla_sparse_forward"):
        return call(q, k, v, table, projected, vectors, bounds)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes that a kernel is compiled for; chosen: blocks of 64 keys that a tile attends to."""

    batch: int
    length: int
    heads: int
    dim: int
    block_k: int
    chosen: int

    @property
    def tiles(self) -> int:
        """Tiles of a head."""
        return pl.cdiv(self.length, BLOCK_Q)

    @property
    def parts(self) -> int:
        """Blocks of a whole step."""
        return PARTS[self.block_k]

    @property
    def steps(self) -> int:
        return pl.cdiv(self.chosen, self.parts)

    @property
    def first(self) -> int:
        """Blocks of the first step: the table's last ones, as many as leave whole steps.

        It alone is short, or has keys masked, and before it there is nothing to keep in registers.
        """
        return (self.chosen - 1) % self.parts + 1


# References to global memory, as `sparse_forward` has them; vectors `[B, N, 2, H]`: normalizer and bias.
Inputs = namedtuple("Inputs", "q k v table projected vectors bounds")
# Shared memory: queries of each consumer, rings of keys and values, the epilogue's vectors.
Buffers = namedtuple("Buffers", "q k v vectors")
# For each slot of a buffer: its copies have arrived, and its readers are done; ping_pong: see `kernel`.
Barriers = namedtuple("Barriers", "q_ready k_ready v_ready q_used k_used v_used ping_pong")


def scratch_shapes(sizes: Sizes, dtype: Any) -> tuple[Buffers, Barriers]:
    """Shared memory, and barriers by their arrivals: a whole step's copies, or all consumers."""

    def in_tiles(*shape: int):
        return plgpu.SMEM(shape, dtype, transforms=mosaic.in_tiles(dtype))

    ring = in_tiles(STAGES, sizes.parts * BLOCK, sizes.dim)
    queries = plgpu.Barrier(num_barriers=CONSUMERS)
    ready = plgpu.Barrier(num_arrivals=sizes.parts, num_barriers=STAGES)
    used = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=STAGES)
    return (
        Buffers(in_tiles(CONSUMERS, ROWS, sizes.dim), ring, ring, plgpu.SMEM((2, sizes.dim), jnp.float32)),
        Barriers(queries, ready, ready, queries, used, used, plgpu.Barrier(num_arrivals=CONSUMERS)),
    )


def kernel(sizes: Sizes, *refs: Any) -> None:
    """One warp group copies, the others compute.

    A ping-pong barrier orders those: while one takes its softmax the other has the tensor core to itself.
    """
    *inputs, out, smem, barriers = refs
    wg = lax.axis_index("wg")
    shared = sizes, Inputs(*inputs), out, smem, barriers, wg

    @pl.when(wg == CONSUMERS)
    def produce():
        plgpu.set_max_registers(40, action="decrease")
        for_each_tile(sizes, lambda *place: Producer(*shared, *place).copy_tile())

    @pl.when(wg < CONSUMERS)
    def consume():
        plgpu.set_max_registers(232, action="increase")
        for_each_tile(sizes, lambda *place: Consumer(*shared, *place).compute_tile())
        plgpu.wait_smem_to_gmem(0)


def for_each_tile(sizes: Sizes, body: Any) -> None:
    """Calls body(number of the tile in this program, sample, head, tile)."""

    # Programs work on one head together, whose keys and values the L2 cache holds.
    @plgpu.nd_loop((sizes.batch * sizes.heads * sizes.tiles,), collective_axes="program")
    def loop(info):
        (i,) = info.index
        head, tile = lax.rem(lax.div(i, sizes.tiles), sizes.heads), lax.rem(i, sizes.tiles)
        body(info.local_index, lax.div(i, sizes.tiles * sizes.heads), head, tile)


def slot_of(entry: Any) -> Any:
    """Slot of an entry of a ring."""
    return lax.rem(entry, STAGES)


@dataclasses.dataclass(frozen=True, eq=False)
class WarpGroup:
    """Warp group `wg` at a tile of a head, the program's `number`-th."""

    sizes: Sizes
    gmem: Inputs
    out: Any
    smem: Buffers
    barriers: Barriers
    wg: Any
    number: Any
    sample: Any
    head: Any
    tile: Any

    def rows(self, group: Any) -> Any:
        """Tokens of a consumer."""
        return pl.ds(self.tile * BLOCK_Q + group * ROWS, ROWS)

    def key_entry(self, step: Any) -> Any:
        """Number of a step's keys in their ring, over all tiles; the linear state comes behind, as step `steps`."""
        return self.number * (self.sizes.steps + 1) + step

    def value_entry(self, step: Any) -> Any:
        """Number of a step's values in their ring, over all tiles."""
        return self.number * self.sizes.steps + step


class Producer(WarpGroup):
    """The warp group that copies."""

    def copy_tile(self) -> None:
        """Copies queries, then keys and values step by step, then the state of the linear branch."""
        s = self.sizes
        self.copy_queries()
        self.copy_step(0, s.chosen - s.first, s.first)
        pl.loop(1, s.steps)(lambda step: self.copy_step(step, (step - 1) * s.parts, s.parts))
        self.copy_state()

    def copy_queries(self) -> None:
        for i in range(CONSUMERS):
            rows = self.rows(i)
            pl.when(self.number >= 1)(functools.partial(plgpu.barrier_wait, self.barriers.q_used.at[i]))
            queries = self.gmem.q.at[self.sample, rows, self.head]
            plgpu.copy_gmem_to_smem(queries, self.smem.q.at[i], self.barriers.q_ready.at[i])

    def copy_step(self, step: Any, start: Any, blocks: int) -> None:
        """Copies the keys and values of `blocks` blocks from the table's entry `start` on."""
        gmem, smem, bar = self.gmem, self.smem, self.barriers
        self.copy_blocks(gmem.k, smem.k, bar.k_ready, self.free_slot(self.key_entry(step), bar.k_used), start, blocks)
        self.copy_blocks(gmem.v, smem.v, bar.v_ready, self.free_slot(self.value_entry(step), bar.v_used), start, blocks)

    def copy_blocks(self, x: Any, ring: Any, ready: Any, slot: Any, start: Any, blocks: int) -> None:
        """Copies blocks of keys or values to a slot, and arrives for those that a whole step has besides."""
        for i in range(blocks):
            block = pl.ds(self.gmem.table[self.sample, self.head, self.tile, start + i] * BLOCK, BLOCK)
            target = ring.at[slot, pl.ds(i * BLOCK, BLOCK)]
            plgpu.copy_gmem_to_smem(x.at[self.sample, block, self.head], target, ready.at[slot])
        for _ in range(blocks, self.sizes.parts):
            plgpu.barrier_arrive(ready.at[slot])

    def copy_state(self) -> None:
        """Copies the projected state to the ring of keys, in as many copies as a step; the vectors are the last."""
        slot = self.free_slot(self.key_entry(self.sizes.steps), self.barriers.k_used)
        projected, ready = self.gmem.projected, self.barriers.k_ready.at[slot]
        size = self.sizes.dim // (self.sizes.parts - 1)
        for i in range(self.sizes.parts - 1):
            rows = pl.ds(i * size, size)
            plgpu.copy_gmem_to_smem(projected.at[self.sample, self.head, rows], self.smem.k.at[slot, rows], ready)
        plgpu.copy_gmem_to_smem(self.gmem.vectors.at[self.sample, self.head], self.smem.vectors, ready)

    def free_slot(self, entry: Any, used: Any) -> Any:
        """Waits until the slot of an entry is free."""
        pl.when(entry >= STAGES)(lambda: plgpu.barrier_wait(used.at[slot_of(entry)]))
        return slot_of(entry)


class Softmax(NamedTuple):
    """Running sum of weights times values, and each row's maximum of scores in base 2 and sum of weights."""

    acc: jax.Array
    row_max: jax.Array
    row_sum: jax.Array


def softmax_step(s: jax.Array, carry: Softmax, scale: float, *, bounded: bool) -> tuple[jax.Array, Softmax]:
    """Returns weights of scores, and the rescaled carry; bounded: row_max is zero, and stays."""
    acc, row_max, row_sum = carry
    if bounded:
        p = jnp.exp2(s * scale)
        return p, Softmax(acc, row_max, row_sum + p.sum(axis=1))
    new_max = jnp.maximum(row_max, s.max(axis=1) * scale)
    rescale = jnp.exp2(row_max - new_max)
    p = jnp.exp2(s * scale - mosaic.per_row(new_max, s.shape))
    return p, Softmax(acc * mosaic.per_row(rescale, acc.shape), new_max, row_sum * rescale + p.sum(axis=1))


class Consumer(WarpGroup):
    """A warp group that computes 64 of the tile's rows."""

    def compute_tile(self) -> None:
        """Softmax over the chosen blocks, step by step, then the epilogue with the linear branch."""
        s, bar = self.sizes, self.barriers
        mask = self.end_mask() if s.length % s.block_k else None
        plgpu.barrier_wait(bar.q_ready.at[self.wg])
        plgpu.barrier_wait(bar.k_ready.at[slot_of(self.key_entry(0))])
        acc = plgpu.layout_cast(jnp.zeros((ROWS, s.dim), jnp.float32), WGMMA)
        row_max = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), ROW)
        row_sum = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW)
        pl.when(self.wg == 1)(self.switch_groups)
        carry = self.attend(0, Softmax(acc, row_max, row_sum), blocks=s.first, mask=mask)
        within = self.gmem.bounds[self.sample, self.head, self.tile] <= BOUND
        carry = lax.cond(within, functools.partial(self.attend_further, bounded=True), self.attend_further, carry)
        # Neither group waits for the other's epilogue.
        pl.when(self.wg == 0)(lambda: plgpu.barrier_arrive(bar.ping_pong))
        self.epilogue(carry)
        pl.when(self.wg == 0)(lambda: plgpu.barrier_wait(bar.ping_pong))

    def switch_groups(self) -> None:
        """Hands the tensor core to the other group, and waits for it."""
        plgpu.barrier_arrive(self.barriers.ping_pong)
        plgpu.barrier_wait(self.barriers.ping_pong)

    def end_mask(self) -> jax.Array:
        """Initial scores of the table's last blocks: -inf behind the last key."""
        s = self.sizes
        shape = (ROWS, s.first * BLOCK)
        behind = BLOCK * (self.gmem.table[self.sample, self.head, self.tile, s.chosen - 1] + 1) - s.length

        def masked():
            column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=WGMMA)
            return jnp.where(column >= shape[1] - behind, -jnp.inf, 0.0)

        return lax.cond(behind > 0, masked, lambda: plgpu.layout_cast(jnp.zeros(shape, jnp.float32), WGMMA))

    def attend_further(self, carry: Softmax, *, bounded: bool = False) -> Softmax:
        """Attends to the steps behind the first; bounded: all scores are within BOUND, and no maximum is looked for."""
        if bounded:
            unit = jnp.exp2(carry.row_max)
            acc = carry.acc * mosaic.per_row(unit, carry.acc.shape)
            carry = Softmax(acc, jnp.zeros_like(carry.row_max), carry.row_sum * unit)
        attend = functools.partial(self.attend, blocks=self.sizes.parts, bounded=bounded)
        return lax.fori_loop(1, self.sizes.steps, attend, carry)

    def attend(
        self, step: Any, carry: Softmax, *, blocks: int, mask: jax.Array | None = None, bounded: bool = False
    ) -> Softmax:
        """Attends to the keys and values of one step."""
        scale = LOG2_E * self.sizes.dim**-0.5
        p, carry = softmax_step(self.scores(step, blocks, mask), carry, scale, bounded=bounded)
        return self.add_values(step, blocks, p, carry)

    def scores(self, step: Any, blocks: int, mask: jax.Array | None) -> jax.Array:
        """Computes q k^T, added to the mask."""
        slot = slot_of(self.key_entry(step))

        def multiply(s):
            keys = self.smem.k.at[slot, pl.ds(0, blocks * BLOCK)]
            plgpu.wgmma(s, self.smem.q.at[self.wg], keys.transpose((1, 0)))
            self.switch_groups()

        if mask is None:
            zeros = plgpu.ACC((ROWS, blocks * BLOCK), jnp.float32)
            s = pl.run_scoped(lambda s: (multiply(s), s[...])[1], zeros)
        else:
            s = pl.run_state(multiply)(plgpu.ACC.init(mask))
        plgpu.barrier_arrive(self.barriers.k_used.at[slot])
        return s

    def add_values(self, step: Any, blocks: int, p: jax.Array, carry: Softmax) -> Softmax:
        """Adds p v to the accumulator."""
        bar = self.barriers
        slot, next_entry = slot_of(self.value_entry(step)), self.key_entry(step + 1)
        p = p.astype(self.out.dtype)
        acc, row_sum, row_max, p = lax.optimization_barrier((carry.acc, carry.row_sum, carry.row_max, p))
        plgpu.barrier_arrive(bar.ping_pong)
        plgpu.barrier_wait(bar.v_ready.at[slot])
        plgpu.barrier_wait(bar.ping_pong)

        def multiply(acc):
            plgpu.wgmma(acc, p, self.smem.v.at[slot, pl.ds(0, blocks * BLOCK)])
            plgpu.barrier_wait(bar.k_ready.at[slot_of(next_entry)])  # further keys, or the state

        acc = pl.run_state(multiply)(plgpu.ACC.init(acc))
        plgpu.barrier_arrive(bar.v_used.at[slot])
        return Softmax(acc, row_max, row_sum)

    def epilogue(self, carry: Softmax) -> None:
        """Writes acc / row_sum + e(q) P / e(q) (z + 1e-5) + b, with e the numerators of phi."""
        bar, own_q = self.barriers, self.smem.q.at[self.wg]
        own = mosaic.load(own_q, layout=WGMMA).astype(jnp.float32)
        e = jnp.exp2((own - mosaic.per_row(own.max(axis=1), own.shape)) * LOG2_E)
        slot = slot_of(self.key_entry(self.sizes.steps))

        def project(linear):
            plgpu.wgmma(linear, e.astype(self.out.dtype), self.smem.k.at[slot, pl.ds(0, self.sizes.dim)])
            return linear[...]

        z, bias = self.smem.vectors.at[0], self.smem.vectors.at[1]
        z = mosaic.per_column(mosaic.load(z, layout=COLUMN), e.shape)
        divisor = (e * (z + 1e-5)).sum(axis=1)
        linear = pl.run_scoped(project, plgpu.ACC((ROWS, self.sizes.dim), jnp.float32))
        # Reciprocals of rows: divisions take many instructions.
        both = carry.acc * mosaic.per_row(1 / carry.row_sum, e.shape) + linear * mosaic.per_row(1 / divisor, e.shape)
        bias = mosaic.per_column(mosaic.load(bias, layout=COLUMN), e.shape)
        own_q[...] = (both + bias).astype(self.out.dtype)
        plgpu.barrier_arrive(bar.k_used.at[slot])
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(own_q, self.out.at[self.sample, self.rows(self.wg), self.head])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(bar.q_used.at[self.wg])

"""Hopper kernel of sparse-linear attention in Pallas Mosaic GPU; the equations are in `reference`.

A tile is 128 rows of queries of one head. Two warp groups compute 64 rows each, a third feeds them keys and values by
TMA, following the block table. Three chosen blocks of 64 keys make one step: power limits this kernel, and the wider a
product is, the less is read and rescaled for it. This takes all shared memory, so the state of the linear branch comes
through the ring of keys, behind a tile's last. Programs are persistent: the next tile's keys arrive during the epilogue
of this one.

A ping-pong barrier orders the groups: while one takes its softmax the other has the tensor core to itself.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from turbojax.kernels import mosaic
from turbojax.kernels.sla.reference import BOUND, LOG2_E

CONSUMERS = 2  # warp groups that compute
ROWS = 64  # queries of one of them
BLOCK_Q = CONSUMERS * ROWS
BLOCK = 64  # keys of one copy
PARTS = {64: 3, 128: 2}  # such blocks a step by block_k; one of 128 keys is never parted
STAGES = 2  # steps in flight

WGMMA = plgpu.Layout.WGMMA
ROW = WGMMA.reduce(1)  # one value a row
COLUMN = WGMMA.reduce(0)  # one value a column


def sparse_forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    table: jax.Array,
    projected: jax.Array,
    normalizer: jax.Array,
    bias: jax.Array,
    bounds: jax.Array,
    *,
    block_k: int,
    num_sms: int | None = None,
) -> jax.Array:
    """The sparse branch over the blocks of `table`, plus the linear branch from its state: bfloat16 `[B, L, N, H]`.

    q, k, v bfloat16 `[B, L, N, H]`; table int32 `[B, N, ceil(L / 128), chosen]`, ascending; projected bfloat16
    `[B, N, H, H]`, (phi(k)^T v) W_l^T; normalizer float32 `[B, N, H]`, the sum of phi(k); bias float32 `[H]`. H is 64
    or 128 and block_k, too; L is a multiple of 8. bounds float32 `[B, N, ceil(L / 128)]`: how far from zero a tile's
    scores can be; within `reference.BOUND` no maximum is looked for, and nothing is rescaled for it.
    """
    batch, length, heads, dim = q.shape
    if block_k == 2 * BLOCK:
        table = jnp.stack([2 * table, 2 * table + 1], axis=-1).reshape(*table.shape[:-1], -1)
    parts = PARTS[block_k]
    keys = parts * BLOCK
    chosen = table.shape[-1]
    # The first step takes the table's last blocks, as many as leave whole steps: it alone is short, or has keys masked,
    # and before it there is nothing to keep in registers.
    first = (chosen - 1) % parts + 1
    steps = pl.cdiv(chosen, parts)

    # The two vectors of the epilogue travel as one.
    vectors = jnp.stack([normalizer, jnp.broadcast_to(bias, normalizer.shape)], axis=2)
    tiles = pl.cdiv(length, BLOCK_Q)

    def kernel(q, k, v, table, projected, vectors, bounds, out, buffers, barriers):
        q_smem, k_smem, v_smem, vectors_smem = buffers
        q_ready, k_ready, v_ready, q_used, k_used, v_used, ping_pong = barriers
        wg = lax.axis_index("wg")

        def for_each_tile(body):
            """Calls body(number of the tile in this program, batch, head, tile)."""

            # Programs work on one head together, whose keys and values the L2 cache holds.
            @plgpu.nd_loop((batch * heads * tiles,), collective_axes="program")
            def loop(info):
                (i,) = info.index
                head, tile = lax.rem(lax.div(i, tiles), heads), lax.rem(i, tiles)
                body(info.local_index, lax.div(i, tiles * heads), head, tile)

        def key_entry(number, step):
            """Number of an entry in the ring of keys, over all tiles; a tile's last entry, `steps`, is the state."""
            return number * (steps + 1) + step

        def value_entry(number, step):
            return number * steps + step

        def slot_of(entry):
            return lax.rem(entry, STAGES)

        def switch_groups():
            plgpu.barrier_arrive(ping_pong)
            plgpu.barrier_wait(ping_pong)

        @pl.when(wg == CONSUMERS)
        def produce():
            plgpu.set_max_registers(40, action="decrease")

            def fetch_tile(number, b, head, tile):
                for i in range(CONSUMERS):
                    rows = pl.ds(tile * BLOCK_Q + i * ROWS, ROWS)

                    @pl.when(number >= 1)
                    def wait_until_free(i=i):
                        plgpu.barrier_wait(q_used.at[i])

                    plgpu.copy_gmem_to_smem(q.at[b, rows, head], q_smem.at[i], q_ready.at[i])

                def free_slot(entry, used):
                    pl.when(entry >= STAGES)(lambda: plgpu.barrier_wait(used.at[slot_of(entry)]))
                    return slot_of(entry)

                def fetch(x, smem, ready, used, entry, start, blocks):
                    slot = free_slot(entry, used)
                    for i in range(blocks):
                        plgpu.copy_gmem_to_smem(
                            x.at[b, pl.ds(table[b, head, tile, start + i] * BLOCK, BLOCK), head],
                            smem.at[slot, pl.ds(i * BLOCK, BLOCK)],
                            ready.at[slot],
                        )
                    for _ in range(blocks, parts):
                        plgpu.barrier_arrive(ready.at[slot])

                def fetch_step(step, start, blocks):
                    fetch(k, k_smem, k_ready, k_used, key_entry(number, step), start, blocks)
                    fetch(v, v_smem, v_ready, v_used, value_entry(number, step), start, blocks)

                fetch_step(0, chosen - first, first)
                pl.loop(1, steps)(lambda step: fetch_step(step, (step - 1) * parts, parts))

                # As many copies as a step has blocks: the vectors are the last.
                slot = free_slot(key_entry(number, steps), k_used)
                for i in range(parts - 1):
                    rows = pl.ds(i * dim // (parts - 1), dim // (parts - 1))
                    plgpu.copy_gmem_to_smem(projected.at[b, head, rows], k_smem.at[slot, rows], k_ready.at[slot])
                plgpu.copy_gmem_to_smem(vectors.at[b, head], vectors_smem, k_ready.at[slot])

            for_each_tile(fetch_tile)

        @pl.when(wg < CONSUMERS)
        def consume():
            plgpu.set_max_registers(232, action="increase")

            def compute_tile(number, b, head, tile):
                own_q = q_smem.at[wg]

                def key_slot(step):
                    return slot_of(key_entry(number, step))

                def of_rows(x, columns=dim):
                    """Broadcasts one value a row, `[64]`, to `[64, columns]`."""
                    return lax.broadcast_in_dim(x, (ROWS, columns), [0])

                def own_scores(step, blocks, mask=None):
                    slot = key_slot(step)

                    def multiply(s):
                        keys = k_smem.at[slot, pl.ds(0, blocks * BLOCK)]
                        plgpu.wgmma(s, own_q, keys.transpose((1, 0)))
                        switch_groups()

                    if mask is None:
                        zeros = plgpu.ACC((ROWS, blocks * BLOCK), jnp.float32)
                        s = pl.run_scoped(lambda s: (multiply(s), s[...])[1], zeros)
                    else:
                        s = pl.run_state(multiply)(plgpu.ACC.init(mask))
                    plgpu.barrier_arrive(k_used.at[slot])
                    return s

                def softmax_step(s, acc, row_max, row_sum, *, bounded=False):
                    """Returns softmax weights, and the rescaled accumulator, maximum and row sum."""
                    scale = LOG2_E * dim**-0.5
                    if bounded:  # row_max is zero
                        p = jnp.exp2(s * scale)
                        return p, acc, row_max, row_sum + p.sum(axis=1)
                    new_max = jnp.maximum(row_max, s.max(axis=1) * scale)
                    rescale = jnp.exp2(row_max - new_max)
                    p = jnp.exp2(s * scale - of_rows(new_max, s.shape[1]))
                    return p, acc * of_rows(rescale), new_max, row_sum * rescale + p.sum(axis=1)

                def add_values(step, blocks, p, acc, row_max, row_sum):
                    slot, next_entry = slot_of(value_entry(number, step)), key_entry(number, step + 1)
                    acc, row_sum, row_max, p = lax.optimization_barrier((acc, row_sum, row_max, p.astype(q.dtype)))
                    plgpu.barrier_arrive(ping_pong)
                    plgpu.barrier_wait(v_ready.at[slot])
                    plgpu.barrier_wait(ping_pong)

                    def multiply(acc):
                        plgpu.wgmma(acc, p, v_smem.at[slot, pl.ds(0, blocks * BLOCK)])
                        plgpu.barrier_wait(k_ready.at[slot_of(next_entry)])  # further keys, or the state

                    acc = pl.run_state(multiply)(plgpu.ACC.init(acc))
                    plgpu.barrier_arrive(v_used.at[slot])
                    return acc, row_max, row_sum

                def end_mask():
                    """Initial scores of the table's last blocks: -inf behind the last key."""
                    shape = (ROWS, first * BLOCK)
                    behind = BLOCK * (table[b, head, tile, chosen - 1] + 1) - length

                    def masked():
                        column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=WGMMA)
                        return jnp.where(column >= shape[1] - behind, -jnp.inf, 0.0)

                    return lax.cond(behind > 0, masked, lambda: plgpu.layout_cast(jnp.zeros(shape, jnp.float32), WGMMA))

                def attend(step, carry, *, blocks: int = parts, mask=None, bounded=False):
                    p, *carry = softmax_step(own_scores(step, blocks, mask), *carry, bounded=bounded)
                    return add_values(step, blocks, p, *carry)

                def attend_further(carry):
                    return lax.fori_loop(1, steps, attend, carry)

                def attend_bounded(carry):
                    acc, row_max, row_sum = carry
                    unit = jnp.exp2(row_max)
                    carry = acc * of_rows(unit), jnp.zeros_like(row_max), row_sum * unit
                    return lax.fori_loop(1, steps, functools.partial(attend, bounded=True), carry)

                mask = end_mask() if length % block_k else None
                plgpu.barrier_wait(q_ready.at[wg])
                plgpu.barrier_wait(k_ready.at[key_slot(0)])
                acc = plgpu.layout_cast(jnp.zeros((ROWS, dim), jnp.float32), WGMMA)
                row_max = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), ROW)
                row_sum = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW)
                pl.when(wg == 1)(switch_groups)
                carry = attend(0, (acc, row_max, row_sum), blocks=first, mask=mask)
                within = bounds[b, head, tile] <= BOUND
                acc, _, row_sum = lax.cond(within, attend_bounded, attend_further, carry)
                # Neither group waits for the other's epilogue.
                pl.when(wg == 0)(lambda: plgpu.barrier_arrive(ping_pong))
                # A reciprocal a row, for divisions take many instructions.
                own = mosaic.load(own_q, layout=WGMMA).astype(jnp.float32)
                e = jnp.exp2((own - of_rows(own.max(axis=1))) * LOG2_E)
                state_slot = key_slot(steps)

                def project(linear):
                    plgpu.wgmma(linear, e.astype(q.dtype), k_smem.at[state_slot, pl.ds(0, dim)])
                    return linear[...]

                z = lax.broadcast_in_dim(mosaic.load(vectors_smem.at[0], layout=COLUMN), e.shape, [1])
                divisor = (e * (z + 1e-5)).sum(axis=1)
                linear = pl.run_scoped(project, plgpu.ACC((ROWS, dim), jnp.float32))
                both = acc * of_rows(1 / row_sum) + linear * of_rows(1 / divisor)
                b_l = lax.broadcast_in_dim(mosaic.load(vectors_smem.at[1], layout=COLUMN), both.shape, [1])
                own_q[...] = (both + b_l).astype(q.dtype)
                plgpu.barrier_arrive(k_used.at[state_slot])
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(own_q, out.at[b, pl.ds(tile * BLOCK_Q + wg * ROWS, ROWS), head])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(q_used.at[wg])
                pl.when(wg == 0)(lambda: plgpu.barrier_wait(ping_pong))

            for_each_tile(compute_tile)
            plgpu.wait_smem_to_gmem(0)

    def in_shared_memory(*shape: int):
        return plgpu.SMEM(shape, q.dtype, transforms=mosaic.in_tiles(q.dtype))

    def entry(*refs):
        pl.run_scoped(
            lambda *scoped: kernel(*refs, *scoped),
            (
                in_shared_memory(CONSUMERS, ROWS, dim),
                in_shared_memory(STAGES, keys, dim),
                in_shared_memory(STAGES, keys, dim),
                plgpu.SMEM((2, dim), jnp.float32),
            ),
            (
                plgpu.Barrier(num_barriers=CONSUMERS),
                plgpu.Barrier(num_arrivals=parts, num_barriers=STAGES),
                plgpu.Barrier(num_arrivals=parts, num_barriers=STAGES),
                plgpu.Barrier(num_barriers=CONSUMERS),
                plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=STAGES),
                plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=STAGES),
                plgpu.Barrier(num_arrivals=CONSUMERS),
            ),
            collective_axes="wg",
        )

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

"""Hopper kernel of sparse-linear attention in Pallas Mosaic GPU; the equations are in `turbojax.kernels.sla`.

A tile is 128 rows of queries of one head. Two warp groups compute 64 rows each, a third feeds them keys and values by
TMA, following the block table; two chosen blocks of 64 keys make one step, so that a product has 128 columns. Programs
are persistent: the next tile's queries and keys arrive during the epilogue of this one.

The groups take turns: while one takes its softmax the other has the tensor core to itself.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from turbojax.kernels import mosaic

CONSUMERS = 2  # warp groups that compute
ROWS = 64  # queries of one of them
BLOCK_Q = CONSUMERS * ROWS
KEYS = 128  # of one step
STAGES = 2  # steps in flight
LOG2_E = math.log2(math.e)

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
    *,
    block_k: int,
    num_sms: int | None = None,
) -> jax.Array:
    """The sparse branch over the blocks of `table`, plus the linear branch from its state: bfloat16 `[B, L, N, H]`.

    q, k, v bfloat16 `[B, L, N, H]`; table int32 `[B, N, ceil(L / 128), chosen]`, ascending; projected bfloat16
    `[B, N, H, H]`, (phi(k)^T v) W_l^T; normalizer float32 `[B, N, H]`, the sum of phi(k); bias float32 `[H]`. H is 64
    or 128 and block_k, too; L is a multiple of 8.
    """
    batch, length, heads, dim = q.shape
    parts = KEYS // block_k  # blocks of one step
    chosen = table.shape[-1]
    steps = pl.cdiv(chosen, parts)
    # A block behind the last fills up the last step; its rows are past the end, as some of the last block's may be.
    table = jnp.pad(table, ((0, 0),) * 3 + ((0, steps * parts - chosen),), constant_values=pl.cdiv(length, block_k))
    masked = bool(length % block_k or chosen % parts)

    # The two vectors of the epilogue travel as one.
    vectors = jnp.stack([normalizer, jnp.broadcast_to(bias, normalizer.shape)], axis=2)
    tiles = pl.cdiv(length, BLOCK_Q)

    def kernel(q, k, v, table, projected, vectors, out, buffers, barriers):
        q_smem, k_smem, v_smem, projected_smem, vectors_smem = buffers
        q_ready, k_ready, v_ready, state_ready, q_used, k_used, v_used, state_used, turns = barriers
        wg = lax.axis_index("wg")

        def for_each_tile(body):
            """Calls body(number of the tile in this program, batch, head, tile)."""

            # Programs work on one head together, whose keys and values the L2 cache holds.
            @plgpu.nd_loop((batch * heads * tiles,), collective_axes="program")
            def loop(info):
                (i,) = info.index
                head, tile = lax.rem(lax.div(i, tiles), heads), lax.rem(i, tiles)
                body(info.local_index, lax.div(i, tiles * heads), head, tile)

        def give_and_take_turns():
            plgpu.barrier_arrive(turns)
            plgpu.barrier_wait(turns)

        @pl.when(wg == CONSUMERS)
        def produce():
            plgpu.set_max_registers(40, action="decrease")

            def fetch_tile(number, b, head, tile):
                slot_q = lax.rem(number, 2)
                for i in range(CONSUMERS):
                    rows = pl.ds(tile * BLOCK_Q + i * ROWS, ROWS)

                    @pl.when(number >= 2)
                    def wait_until_free(i=i):
                        plgpu.barrier_wait(q_used.at[CONSUMERS * slot_q + i])

                    plgpu.copy_gmem_to_smem(
                        q.at[b, rows, head], q_smem.at[slot_q, i], q_ready.at[CONSUMERS * slot_q + i]
                    )

                def fetch(x, smem, ready, slot, blocks):
                    for i, block in enumerate(blocks):
                        plgpu.copy_gmem_to_smem(
                            x.at[b, pl.ds(block * block_k, block_k), head],
                            smem.at[slot, pl.ds(i * block_k, block_k)],
                            ready.at[slot],
                        )

                @pl.loop(0, steps)
                def fetch_step(step):
                    in_all = number * steps + step
                    slot = lax.rem(in_all, STAGES)
                    blocks = [table[b, head, tile, step * parts + i] for i in range(parts)]
                    pl.when(in_all >= STAGES)(lambda: plgpu.barrier_wait(k_used.at[slot]))
                    fetch(k, k_smem, k_ready, slot, blocks)
                    pl.when(in_all >= STAGES)(lambda: plgpu.barrier_wait(v_used.at[slot]))
                    fetch(v, v_smem, v_ready, slot, blocks)

                    # For the epilogue; by this step the tile before is done with its own.
                    @pl.when(step == min(STAGES, steps - 1))
                    def fetch_state():
                        pl.when(number >= 1)(lambda: plgpu.barrier_wait(state_used.at[0]))
                        plgpu.copy_gmem_to_smem(projected.at[b, head], projected_smem, state_ready.at[0])
                        plgpu.copy_gmem_to_smem(vectors.at[b, head], vectors_smem, state_ready.at[0])

            for_each_tile(fetch_tile)

        @pl.when(wg < CONSUMERS)
        def consume():
            plgpu.set_max_registers(232, action="increase")

            def compute_tile(number, b, head, tile):
                slot_q = lax.rem(number, 2)
                own_q = q_smem.at[slot_q, wg]

                def slot_of(step):
                    return lax.rem(number * steps + step, STAGES)

                def of_rows(x, columns=None):
                    """One value a row, `[64]`, as `[64, columns]`."""
                    return lax.broadcast_in_dim(x, (ROWS, columns or dim), [0])

                def past_the_end():
                    """Which columns of the last step are behind the last key, `[64, 128]`."""
                    column = plgpu.broadcasted_iota(jnp.int32, (ROWS, KEYS), 1, layout=WGMMA)
                    key = column + block_k * table[b, head, tile, (steps - 1) * parts]
                    if parts == 2:
                        second = column + block_k * (table[b, head, tile, (steps - 1) * parts + 1] - 1)
                        key = jnp.where(column < block_k, key, second)
                    return key >= length

                def scores(step, s):
                    plgpu.wgmma(s, own_q, k_smem.at[slot_of(step)].transpose((1, 0)))

                def soften(s, top, total, *, last: bool):
                    """Weights of scores; the new maximum and denominator; the decay of what came before."""
                    if last and masked:
                        s = jnp.where(past_the_end(), -jnp.inf, s)
                    scale = LOG2_E * dim**-0.5
                    new_top = jnp.maximum(top, s.max(axis=1) * scale)
                    decay = jnp.exp2(top - new_top)
                    p = jnp.exp2(s * scale - of_rows(new_top, KEYS))
                    return p, new_top, total * decay + p.sum(axis=1), decay

                def attend(step, carry, *, last: bool = False):
                    acc, top, total = carry
                    slot = slot_of(step)

                    def own_scores(s):
                        scores(step, s)
                        give_and_take_turns()
                        return s[...]

                    s = pl.run_scoped(own_scores, plgpu.ACC((ROWS, KEYS), jnp.float32))
                    plgpu.barrier_arrive(k_used.at[slot])
                    p, top, total, decay = soften(s, top, total, last=last)
                    acc = acc * of_rows(decay)
                    acc, total, top, p = lax.optimization_barrier((acc, total, top, p.astype(q.dtype)))
                    plgpu.barrier_arrive(turns)
                    plgpu.barrier_wait(v_ready.at[slot])
                    plgpu.barrier_wait(turns)

                    def add_values(acc):
                        plgpu.wgmma(acc, p, v_smem.at[slot])
                        if not last:
                            plgpu.barrier_wait(k_ready.at[slot_of(step + 1)])

                    acc = pl.run_state(add_values)(plgpu.ACC.init(acc))
                    plgpu.barrier_arrive(v_used.at[slot])
                    return acc, top, total

                def free_queries_of_the_tile_before():
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # its result lay there
                    plgpu.barrier_arrive(q_used.at[CONSUMERS * (1 - slot_q) + wg])

                plgpu.barrier_wait(q_ready.at[CONSUMERS * slot_q + wg])
                plgpu.barrier_wait(k_ready.at[slot_of(0)])
                acc = plgpu.layout_cast(jnp.zeros((ROWS, dim), jnp.float32), WGMMA)
                top = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), ROW)
                total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW)
                pl.when(wg == 1)(give_and_take_turns)
                carry = lax.fori_loop(0, steps - 1, attend, (acc, top, total))
                pl.when(number >= 1)(free_queries_of_the_tile_before)
                acc, _, total = attend(jnp.int32(steps - 1), carry, last=True)
                # Neither group waits for the other's epilogue.
                pl.when(wg == 0)(lambda: plgpu.barrier_arrive(turns))
                # A reciprocal a row, for divisions take many instructions.
                own = mosaic.load(own_q, layout=WGMMA).astype(jnp.float32)
                e = jnp.exp2((own - of_rows(own.max(axis=1))) * LOG2_E)
                plgpu.barrier_wait(state_ready.at[0])

                def project(linear):
                    plgpu.wgmma(linear, e.astype(q.dtype), projected_smem)
                    return linear[...]

                z = lax.broadcast_in_dim(mosaic.load(vectors_smem.at[0], layout=COLUMN), e.shape, [1])
                divisor = (e * (z + 1e-5)).sum(axis=1)
                linear = pl.run_scoped(project, plgpu.ACC((ROWS, dim), jnp.float32))
                both = acc * of_rows(1 / total) + linear * of_rows(1 / divisor)
                b_l = lax.broadcast_in_dim(mosaic.load(vectors_smem.at[1], layout=COLUMN), both.shape, [1])
                own_q[...] = (both + b_l).astype(q.dtype)
                plgpu.barrier_arrive(state_used.at[0])
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(own_q, out.at[b, pl.ds(tile * BLOCK_Q + wg * ROWS, ROWS), head])
                pl.when(wg == 0)(lambda: plgpu.barrier_wait(turns))

            for_each_tile(compute_tile)
            plgpu.wait_smem_to_gmem(0)

    def in_shared_memory(*shape: int):
        transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
        return plgpu.SMEM(shape, q.dtype, transforms=transforms)

    def entry(*refs):
        pl.run_scoped(
            lambda *scoped: kernel(*refs, *scoped),
            (
                in_shared_memory(2, CONSUMERS, ROWS, dim),
                in_shared_memory(STAGES, KEYS, dim),
                in_shared_memory(STAGES, KEYS, dim),
                in_shared_memory(dim, dim),
                plgpu.SMEM((2, dim), jnp.float32),
            ),
            (
                plgpu.Barrier(num_barriers=2 * CONSUMERS),
                plgpu.Barrier(num_arrivals=parts, num_barriers=STAGES),
                plgpu.Barrier(num_arrivals=parts, num_barriers=STAGES),
                plgpu.Barrier(num_arrivals=2, num_barriers=1),
                plgpu.Barrier(num_barriers=2 * CONSUMERS),
                plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=STAGES),
                plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=STAGES),
                plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=1),
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
        return call(q, k, v, table, projected, vectors)

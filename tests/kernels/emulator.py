"""Runs Pallas Mosaic GPU kernels on a CPU: jax's GPU interpreter, with what it lacks put in their place.

The interpreter runs the warp groups as threads, and raises where a barrier passes a phase that nobody has waited for.
Its accumulators take no values and no operands from registers, so they become buffers here. It is private to jax, and
the same from 0.10 to 0.12.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


@dataclasses.dataclass(frozen=True)
class Accumulator:
    shape: tuple[int, ...]
    dtype: Any

    @staticmethod
    def init(x):
        return x


@dataclasses.dataclass(frozen=True)
class Block:
    """A tile that a pipeline has fetched, as far as kernels use the reference to it."""

    value: jax.Array

    @property
    def at(self):
        return self

    def __getitem__(self, rows):
        return Block(lax.dynamic_slice_in_dim(self.value, rows.start, rows.size))

    def transpose(self, axes):
        return Block(self.value.transpose(axes))


def pipeline(body, *, grid, in_specs, wg_axis, num_compute_wgs, compute_context, **_):
    """A pipeline of one axis without the producer: each compute group reads its tiles itself, step by step."""

    def tile(ref, spec, step):
        starts = [index * size for index, size in zip(spec.index_map(step), spec.block_shape, strict=True)]
        return Block(ref[tuple(pl.ds(start, size) for start, size in zip(starts, spec.block_shape, strict=True))])

    def run(*refs, allocations):
        def steps(carry=None):
            for step in range(grid[0]):
                tiles = (tile(ref, spec, step) for ref, spec in zip(refs, in_specs, strict=True))
                carry = body((step,), *tiles, carry)
            return carry

        pl.when(lax.axis_index(wg_axis) < num_compute_wgs)(lambda: compute_context(steps))

    run.get_allocations = lambda *_: ()
    return run


def is_ref(x) -> bool:
    return "Ref" in type(x).__name__ or "Ref" in type(getattr(x, "aval", None)).__name__


def read(x):
    """A value, of a reference too; of a transposed one by transposing what it refers to."""
    if isinstance(x, Block):
        return x.value
    transposed = any(type(t).__name__ == "TransposeTransform" for t in getattr(x, "transforms", ()))
    if transposed:
        return dataclasses.replace(x, transforms=x.transforms[:-1])[...].T
    return x[...] if is_ref(x) else x


def wgmma(acc, a, b) -> None:
    acc[...] = acc[...] + jnp.dot(read(a).astype(acc.dtype), read(b).astype(acc.dtype))


def emulate(monkeypatch, mosaic) -> None:
    """Kernels that are built from here on run on the CPU, to the end of the test; mosaic: `turbojax.kernels.mosaic`."""
    from jax._src.pallas.mosaic_gpu.interpret import jaxpr_interpret, params, shared_memory

    kernel, run_scoped, smem = plgpu.kernel, pl.run_scoped, plgpu.SMEM

    def scoped(body, *types, collective_axes=None, **named):
        def is_accumulator(t):
            return isinstance(t, Accumulator)

        def buffer(t):
            return smem(t.shape, t.dtype) if is_accumulator(t) else t

        def zero(t, ref):
            if is_accumulator(t):
                ref[...] = jnp.zeros(ref.shape, ref.dtype)

        def zeroed(*refs, **named_refs):
            for t, ref in (*zip(types, refs, strict=True), *((t, named_refs[name]) for name, t in named.items())):
                zero(t, ref)
            return body(*refs, **named_refs)

        axes = {"collective_axes": collective_axes} if collective_axes else {}
        buffers, named_buffers = jax.tree.map(buffer, (types, named), is_leaf=is_accumulator)
        return run_scoped(zeroed, *buffers, **named_buffers, **axes)

    def run_state(body):
        def run(start):
            def whole(ref):
                ref[...] = start
                body(ref)
                return ref[...]

            return run_scoped(whole, smem(start.shape, start.dtype))

        return run

    def deallocate(barrier) -> None:  # a kernel may end with phases that nobody waits for
        with barrier.cv:
            barrier.ref_count -= 1

    monkeypatch.setattr(jaxpr_interpret, "_raise_if_unsupported_collective_axes", lambda *_: None)
    monkeypatch.setattr(shared_memory.Barrier, "deallocate", deallocate)
    monkeypatch.setattr(plgpu, "kernel", functools.partial(kernel, interpret=params.InterpretGPUParams()))
    monkeypatch.setattr(plgpu, "SMEM", lambda shape, dtype, transforms=(): smem(shape, dtype))
    monkeypatch.setattr(plgpu, "ACC", Accumulator)
    monkeypatch.setattr(plgpu, "wgmma", wgmma)
    monkeypatch.setattr(plgpu, "wgmma_wait", lambda n: None)
    monkeypatch.setattr(plgpu, "emit_pipeline_warp_specialized", pipeline)
    monkeypatch.setattr(plgpu, "wgmma_accumulator_load", lambda ref, wait_n=0: ref[...])
    monkeypatch.setattr(plgpu, "layout_cast", lambda x, layout: x)
    monkeypatch.setattr(
        plgpu, "broadcasted_iota", lambda dtype, shape, axis, layout: lax.broadcasted_iota(dtype, shape, axis)
    )
    monkeypatch.setattr(pl, "run_scoped", scoped)
    monkeypatch.setattr(pl, "run_state", run_state)
    monkeypatch.setattr(mosaic, "load", lambda ref, layout=None: ref[...])

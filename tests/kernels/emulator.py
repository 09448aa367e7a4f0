"""Runs Pallas Mosaic GPU kernels on a CPU: jax's GPU interpreter, with what it lacks put in their place.

The interpreter runs the warp groups as threads, and raises where a barrier passes a phase that nobody has waited for.
Its accumulators take no values and no operands from registers, so they become buffers here. Private: jax 0.10 only.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

SUPPORTED = jax.__version_info__[:2] == (0, 10)


@dataclasses.dataclass(frozen=True)
class Accumulator:
    shape: tuple[int, ...]
    dtype: Any

    @staticmethod
    def init(x):
        return x


def is_ref(x) -> bool:
    return "Ref" in type(x).__name__ or "Ref" in type(getattr(x, "aval", None)).__name__


def read(x):
    """A value, of a reference too; of a transposed one by transposing what it refers to."""
    transposed = any(type(t).__name__ == "TransposeTransform" for t in getattr(x, "transforms", ()))
    if transposed:
        return dataclasses.replace(x, transforms=x.transforms[:-1])[...].T
    return x[...] if is_ref(x) else x


def wgmma(acc, a, b) -> None:
    acc[...] = acc[...] + jnp.dot(read(a).astype(jnp.float32), read(b).astype(jnp.float32))


def emulate(monkeypatch, mosaic) -> None:
    """Kernels that are built from here on run on the CPU, to the end of the test; mosaic: `turbojax.kernels.mosaic`."""
    from jax._src.pallas.mosaic_gpu.interpret import jaxpr_interpret, params, shared_memory

    kernel, run_scoped, smem = plgpu.kernel, pl.run_scoped, plgpu.SMEM

    def scoped(body, *types, collective_axes=None):
        buffers = jax.tree.map(
            lambda t: smem(t.shape, t.dtype) if isinstance(t, Accumulator) else t,
            types,
            is_leaf=lambda t: isinstance(t, Accumulator),
        )

        def zeroed(*refs):
            for ref, t in zip(refs, types, strict=True):
                if isinstance(t, Accumulator):
                    ref[...] = jnp.zeros(ref.shape, ref.dtype)
            return body(*refs)

        axes = {"collective_axes": collective_axes} if collective_axes else {}
        return run_scoped(zeroed, *buffers, **axes)

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
    monkeypatch.setattr(plgpu, "wgmma_accumulator_load", lambda ref, wait_n=0: ref[...])
    monkeypatch.setattr(plgpu, "layout_cast", lambda x, layout: x)
    monkeypatch.setattr(
        plgpu, "broadcasted_iota", lambda dtype, shape, axis, layout: lax.broadcasted_iota(dtype, shape, axis)
    )
    monkeypatch.setattr(pl, "run_scoped", scoped)
    monkeypatch.setattr(pl, "run_state", run_state)
    monkeypatch.setattr(mosaic, "load", lambda ref, layout=None: ref[...])

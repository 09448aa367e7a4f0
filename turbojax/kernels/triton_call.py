"""The one place that touches jax-triton.

`import jax_triton` fails where jax has no CUDA and changes the environment, so it is imported at the first launch.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

# Takes the launcher's place in tests (the Triton interpreter on a CPU): launch(kernel, *arrays, **settings).
override: Callable[..., Any] | None = None


def triton_call(
    kernel: Any,
    *arrays: jax.Array,
    out_shape: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    num_warps: int,
    num_stages: int = 1,
    in_place: Mapping[int, int] | None = None,
    **constants: Any,
) -> Any:
    """Launches a `triton.jit` kernel: pointers to `arrays`, then to the outputs, then the constants by name.

    in_place: numbers of arrays that an output of the same shape overwrites, and that output's number; XLA copies an
    array first that something else needs.
    """
    settings = dict(out_shape=tuple(out_shape), grid=grid, num_warps=num_warps, num_stages=num_stages, **constants)
    settings["input_output_aliases"] = dict(in_place or {})
    if override is not None:
        return override(kernel, *arrays, **settings)
    import jax_triton

    with jax.named_scope(kernel.__name__):  # compiled programs and profiles name it
        return jax_triton.triton_call(*arrays, kernel=kernel, name=kernel.__name__, **settings)


def sizes_of(x: jax.Array) -> dict[str, Any]:
    """Constants of kernels over x `[B, L, N, H]`: its sizes but the batch."""
    _, length, heads, dim = x.shape
    return {"L": length, "N": heads, "H": dim}


def output(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an output, for `triton_call`."""
    return jax.ShapeDtypeStruct(shape, dtype)

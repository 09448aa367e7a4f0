"""Recomputes the fixture of sparse-linear attention: maps, both branches, gradients."""

import jax
import jax.numpy as jnp
import numpy as np

from turbojax.kernels import sla

# Absolute tolerances by the end of the key; other keys get 1e-5 of their largest value.
TOLERANCES = {
    "sparse_map": 0.0,
    "lut_sorted": 0.0,
    "sparse_map_q64_k128_topk067": 0.0,
    "o": 5e-6,
    "o_s": 5e-6,
    "o_l": 5e-6,
    "dq": 5e-6,
    "dk": 5e-6,
    "dv": 5e-6,
    "dproj_weight": 1e-4,
    "dproj_bias": 1e-4,
}


def recompute(config: dict, t: dict[str, np.ndarray]) -> dict[str, tuple[np.ndarray, float]]:
    """Every `out.*` key with our own value and its absolute tolerance."""
    out: dict[str, tuple[np.ndarray, float]] = {}
    for name, case in config["cases"].items():
        for key, value in case_values(name, case, t).items():
            full = f"out.{name}.{key}"
            if full in t:
                out[full] = np.asarray(value), TOLERANCES.get(key, 1e-5 * float(np.abs(t[full]).max()))
    return out


def case_values(name: str, case: dict, t: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    inputs = [t[f"in.{name}.{key}"] for key in ("q", "k", "v", "do")]
    weights = [t[f"w.{name}.proj_l.{key}"] for key in ("weight", "bias")]
    return jax.jit(lambda *arrays: values(case, *arrays))(*inputs, *weights)  # compiled at once, to save time


def values(case: dict, q, k, v, do, weight, bias) -> dict[str, jax.Array]:
    blocks = {"block_q": case["BLKQ"], "block_k": case["BLKK"]}

    def attention(q, k, v, weight, bias):
        return sla.sparse_linear_attention(q, k, v, weight, bias, topk=case["topk"], **blocks)

    o, gradient = jax.vjp(attention, q, k, v, weight, bias)
    table = sla.block_table(q, k, topk=case["topk"], **blocks)
    other = sla.block_table(q, k, topk=0.67, block_q=64, block_k=128)
    names = ("dq", "dk", "dv", "dproj_weight", "dproj_bias")
    return dict(zip(names, gradient(do), strict=True)) | {
        "o": o,
        "o_s": sla.sparse_softmax(q, k, v, table, **blocks),
        "o_l": sla.linear_branch(q, k, v, weight, bias),
        "pooled_score": sla.pooled_scores(q, k, **blocks),
        "lut_sorted": table,
        "sparse_map": as_map(table, -(-k.shape[1] // case["BLKK"])),
        "sparse_map_q64_k128_topk067": as_map(other, -(-k.shape[1] // 128)),
    }


def as_map(table: jax.Array, key_blocks: int) -> jax.Array:
    """The chosen blocks as a 0 / 1 map `[B, N, query blocks, key blocks]`."""
    nothing = jnp.zeros((*table.shape[:-1], key_blocks), jnp.int8)
    return jnp.put_along_axis(nothing, table, jnp.ones(table.shape, jnp.int8), axis=-1, inplace=False)

"""Recomputes the fixture of sparse-linear attention: maps, both branches, gradients."""

import re

import jax
import jax.numpy as jnp
import numpy as np

from tests.golden_io import number
from turbojax.kernels import sla
from turbojax.kernels.sizes import cdiv

# Absolute tolerances by the end of the key; other keys get 1e-5 of their largest value.
TOLERANCES = {
    "sparse_map": 0.0,
    "lut_sorted": 0.0,
    "o": 5e-6,
    "o_s": 5e-6,
    "o_l": 5e-6,
    "dq": 5e-6,
    "dk": 5e-6,
    "dv": 5e-6,
    "dproj_weight": 1e-4,
    "dproj_bias": 1e-4,
}
OTHER_MAP = re.compile(r"sparse_map_q(\d+)_k(\d+)_topk(\d+(?:p\d+)?)")


def recompute(config: dict, t: dict[str, np.ndarray]) -> dict[str, tuple[np.ndarray, float]]:
    """Every `out.*` key with our own value and its absolute tolerance."""
    out: dict[str, tuple[np.ndarray, float]] = {}
    for name, case in config["cases"].items():
        for key, value in case_values(name, case, t).items():
            full = f"out.{name}.{key}"
            if full in t:
                kind = "sparse_map" if OTHER_MAP.fullmatch(key) else key
                out[full] = np.asarray(value), TOLERANCES.get(kind, 1e-5 * float(np.abs(t[full]).max()))
    return out


def case_values(name: str, case: dict, t: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    inputs = [t[f"in.{name}.{key}"] for key in ("q", "k", "v", "do")]
    weights = [t[f"w.{name}.proj_l.{key}"] for key in ("weight", "bias")]
    prefix = f"out.{name}."
    maps = [key.removeprefix(prefix) for key in t if key.startswith(prefix)]
    maps = [key for key in maps if OTHER_MAP.fullmatch(key)]
    return jax.jit(lambda *arrays: values(case, maps, *arrays))(*inputs, *weights)  # compiled at once, to save time


def values(case: dict, maps: list[str], q, k, v, do, weight, bias) -> dict[str, jax.Array]:
    blocks = {"block_q": case["BLKQ"], "block_k": case["BLKK"]}

    def attention(q, k, v, weight, bias):
        return sla.sparse_linear_attention(q, k, v, weight, bias, topk=case["topk"], **blocks)

    o, gradient = jax.vjp(attention, q, k, v, weight, bias)
    table = sla.block_table(q, k, topk=case["topk"], **blocks)
    names = ("dq", "dk", "dv", "dproj_weight", "dproj_bias")
    return dict(zip(names, gradient(do), strict=True)) | {
        "o": o,
        "o_s": sla.sparse_softmax(q, k, v, table, **blocks),
        "o_l": sla.linear_branch(q, k, v, weight, bias),
        "pooled_score": sla.reference.pooled_scores(q, k, **blocks),
        "lut_sorted": table,
        "sparse_map": as_map(table, cdiv(k.shape[1], case["BLKK"])),
        **{key: other_map(q, k, key) for key in maps},
    }


def other_map(q, k, key: str) -> jax.Array:
    """The map of the blocks and the share that the key names: 067 is 0.67."""
    block_q, block_k, share = OTHER_MAP.fullmatch(key).groups()
    topk = number(share if "p" in share else f"{share[0]}.{share[1:] or 0}")
    table = sla.block_table(q, k, topk=topk, block_q=int(block_q), block_k=int(block_k))
    return as_map(table, cdiv(k.shape[1], int(block_k)))


def as_map(table: jax.Array, key_blocks: int) -> jax.Array:
    """The chosen blocks as a 0 / 1 map `[B, N, query blocks, key blocks]`."""
    nothing = jnp.zeros((*table.shape[:-1], key_blocks), jnp.int8)
    return jnp.put_along_axis(nothing, table, jnp.ones(table.shape, jnp.int8), axis=-1, inplace=False)

"""Recomputes the fixture of SageSLA: codes, scales, float8 values, and the sparse branch in its three forms."""

import re

import jax
import jax.numpy as jnp
import numpy as np

from tests.golden_io import numbered, only
from tests.parity.sla import as_map
from turbojax.kernels import sage, sla

FORMS = {"o_s": "exact", "o_s_v8": "float8_values", "o_s_fp8": "float8"}


def recompute(config: dict, t: dict[str, np.ndarray]) -> dict[str, tuple[np.ndarray, float]]:
    """Every `out.*` key with our own value and its absolute tolerance, 5e-6 where the fixture has none of its own."""
    only(config, "v_scale_max", sage.reference.E4M3_OF_V)
    only(config, "p_offset_log2", sage.reference.P_OFFSET)
    out: dict[str, np.ndarray] = {}
    for name, case in config["cases"].items():
        q, k, v = (jnp.asarray(t[f"in.{name}.{key}"]) for key in ("q", "k", "v"))
        weight, bias = (jnp.asarray(t[f"w.{name}.proj_l.{key}"]) for key in ("weight", "bias"))
        out[f"out.{name}.k_mean"] = jnp.mean(k, axis=1, keepdims=True)
        out[f"out.{name}.o_l"] = sla.linear_branch(q, k, v, weight, bias)
        for text, largest in numbered(t, rf"out\.{re.escape(name)}\.v_scale_s(.*)").items():
            code, scale = sage.reference.quantize_values(v, largest=largest)
            out[f"out.{name}.v_fp8_bits_s{text}"] = jax.lax.bitcast_convert_type(code, jnp.int8)
            out[f"out.{name}.v_scale_s{text}"] = scale
        for blocks in [key for key in case if re.fullmatch(r"q\d+_k\d+", key)]:
            values = block_values(q, k, v, blocks, case[blocks]["topk"])
            out |= {f"out.{name}.{blocks}.{key}": value for key, value in values.items()}
    return {name: (np.asarray(out[name]), 5e-6) for name in t if name in out}


def block_values(q, k, v, blocks: str, topk: float) -> dict[str, np.ndarray]:
    block_q, block_k = map(int, re.findall(r"\d+", blocks))
    sizes = {"block_q": block_q, "block_k": block_k}
    table = sla.block_table(q, k, topk=topk, **sizes)
    q_code, q_scale = sage.reference.quantize_rows(q, block_q)
    k_code, k_scale = sage.reference.quantize_rows(k - jnp.mean(k, axis=1, keepdims=True), block_k)
    out = {form: sage.reference.sage_sparse(q, k, v, table, values=values, **sizes) for form, values in FORMS.items()}
    return out | {
        "q_int8": as_rows(q_code, q.shape[1]),
        "q_scale": q_scale,
        "k_int8": as_rows(k_code, k.shape[1]),
        "k_scale": k_scale,
        "sparse_map": as_map(table, k_scale.shape[-1]),
    }


def operand_order(code: jax.Array) -> jax.Array:
    """e4m3 values `[B, L, N, H]` as the kernel lays them out, `[B, N, H, L padded to 128]`."""
    code = jnp.pad(code.transpose(0, 2, 3, 1), ((0, 0), (0, 0), (0, 0), (0, -code.shape[1] % 128)))
    # Of each 16 keys, key 8 b + 2 c + d at 4 c + 2 b + d.
    return code.reshape(*code.shape[:3], -1, 2, 4, 2).swapaxes(4, 5).reshape(code.shape)


def as_rows(blocks: jax.Array, length: int) -> jax.Array:
    """`[B, N, blocks, block, H]` to `[B, L, N, H]`."""
    batch, heads, *_, dim = blocks.shape
    return blocks.reshape(batch, heads, -1, dim)[:, :, :length].transpose(0, 2, 1, 3)

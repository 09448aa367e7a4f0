"""Recomputes the fixture of norms and the rotary embedding."""

import jax.numpy as jnp
import numpy as np

from turbojax.kernels import norms
from turbojax.models import layers


def recompute(config: dict, t: dict[str, np.ndarray]) -> dict[str, tuple[np.ndarray, float]]:
    """Every `out.*` key with our own value and its absolute tolerance, 1e-5."""
    x, fast = jnp.asarray(t["in.x"]), jnp.asarray(t["in.fast_x"])
    weight, bias = t["w.weight"], t["w.bias"]
    eps = config["eps"]
    out = {f"out.rms_eps{e:g}": norms.rms_norm(x, jnp.asarray(weight), eps=e) for e in eps["rms"]}
    out["out.layernorm"] = norms.layer_norm(x, eps=eps["layernorm"])
    out["out.layernorm_affine"] = norms.layer_norm(x, jnp.asarray(weight), jnp.asarray(bias), eps=eps["layernorm"])
    out["out.fast_rmsnorm"] = norms.rms_norm(fast, jnp.asarray(t["w.fast_weight"]), eps=eps["fast"])
    true_norm = norms.layer_norm(fast, eps=eps["fast"])
    out["out.plain_layernorm_of_fast_x"] = true_norm
    padded = np.asarray(true_norm) * padding_error(t["in.fast_x"], config["fast_padded_dim"], eps["fast"])
    out["out.fast_layernorm"] = padded
    out["out.fast_layernorm_affine"] = padded * t["w.fast_weight"] + t["w.fast_bias"]
    out |= rotary(config, t)
    return {name: (np.asarray(out[name]), 1e-5) for name in t if name in out}


def padding_error(x: np.ndarray, padded_dim: int, eps: float) -> np.ndarray:
    """What divides TurboDiffusion's fast LayerNorm from the true one (ours): it counts its padding in the variance.

    Its variance is var + (P - N) / N mean^2 for rows of width N padded to P.
    """
    mean, var = x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True)
    counted = var + (padded_dim - x.shape[-1]) / x.shape[-1] * mean**2
    return np.sqrt((var + eps) / (counted + eps))


def rotary(config: dict, t: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    grid, head_dim = tuple(config["grid"]), config["head_dim"]
    rotated = norms.rotate(jnp.asarray(t["in.rope_x"]), layers.rotary_table(grid, head_dim))
    pairs = layers.rotary_pairs(head_dim)
    angles = [layers.rotary_angles(size, n) for size, n in zip(grid, pairs, strict=True)]
    return {
        "out.rope_x": rotated,
        "out.rope_angles": layers.over_tokens(angles, grid),
        "out.rope_official_x": jnp.concatenate((rotated, jnp.asarray(t["in.rope_x_padded"])), axis=1),
    }

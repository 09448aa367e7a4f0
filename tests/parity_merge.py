"""Recomputes the fixture of model merging."""

import ml_dtypes
import numpy as np

from turbojax.weights.merge import Merged


def recompute(config: dict, t: dict[str, np.ndarray]) -> dict[str, tuple[np.ndarray, float]]:
    """Every `out.*` key with our own value and its tolerance; nothing where names or dtypes differ."""

    def state(who: str) -> dict[str, np.ndarray]:
        return {
            key.removeprefix(f"in.{who}."): value.astype(true_dtype(config, key))
            for key, value in t.items()
            if key.startswith(f"in.{who}.")
        }

    out = {}
    for weight in config["w"]:
        merged = Merged(state("base"), state("diff_base"), state("diff_target"), weight=weight)
        prefix = f"out.w{weight:g}.".replace("0.5", "0p5")
        if {prefix + name for name in merged} != {key for key in config["dtypes"] if key.startswith(prefix)}:
            continue
        for name, value in merged.items():
            if value.dtype == true_dtype(config, prefix + name):
                out[prefix + name] = (value.astype(np.float64), config["tolerance"][prefix + name])
    return out


def true_dtype(config: dict, key: str) -> np.dtype:
    """Of a tensor that the fixture may hold as float32."""
    name = config["dtypes"][key]
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)

"""Recomputes the fixture of model merging."""

import ml_dtypes
import numpy as np

from tests.golden_io import Incomplete, numbered
from turbojax.weights.merge import MergedTensors


def recompute(config: dict, t: dict[str, np.ndarray]) -> dict[str, tuple[np.ndarray, float]]:
    """Every `out.*` key with our own value and its tolerance; nothing where names or dtypes differ."""

    def state(who: str) -> dict[str, np.ndarray]:
        return {
            key.removeprefix(f"in.{who}."): value.astype(true_dtype(config, key))
            for key, value in t.items()
            if key.startswith(f"in.{who}.")
        }

    out = {}
    written = numbered(t, r"out\.w([^.]+(?:\.\d+)?)\.")
    for weight in config["w"]:
        if weight not in written.values():
            raise Incomplete(f"no key holds results of its weight {weight:g}")
        merged = MergedTensors(state("base"), state("diff_base"), state("diff_target"), weight=weight)
        prefix = next(f"out.w{text}." for text, value in written.items() if value == weight)
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

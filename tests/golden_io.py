"""Reads golden fixtures (format: the golden files' README)."""

import json
from pathlib import Path

import numpy as np
from safetensors import safe_open

GOLDEN = Path(__file__).parent / "golden"


def load(path: str | Path) -> tuple[dict, dict[str, np.ndarray]]:
    """(config, tensors) of a fixture; int8 values that have a `scale.KEY` become float32 value * scale."""
    with safe_open(path, "np") as f:
        config = json.loads((f.metadata() or {}).get("config", "{}"))
        stored = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 (safe_open is no dict)
    scales = {key.removeprefix("scale."): value for key, value in stored.items() if key.startswith("scale.")}
    tensors = {key: value for key, value in stored.items() if not key.startswith("scale.")}
    return config, {key: v.astype(np.float32) * scales[key] if key in scales else v for key, v in tensors.items()}

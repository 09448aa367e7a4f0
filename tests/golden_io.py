"""Reads golden fixtures (format: the golden files' README): what a case is comes from its file alone."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

GOLDEN = Path(__file__).parent / "golden"


class Incomplete(Exception):
    """A fixture lacks a parameter, or has one that nothing here reads or that turbojax fixes otherwise."""


class Parameters(dict):
    """A dictionary whose missing keys are named in a sentence."""

    def __missing__(self, key: str) -> Any:
        raise Incomplete(f"it has no {key}, among {', '.join(map(str, list(self)[:8])) or 'nothing'}")


def load(path: str | Path) -> tuple[dict, dict[str, np.ndarray]]:
    """(config, tensors) of a fixture; int8 values that have a `scale.KEY` become float32 value * scale.

    config["folder"] is where the fixture lies, for a file that it names beside it.
    """
    with safe_open(path, "np") as f:
        config = json.loads((f.metadata() or {}).get("config", "{}"), object_hook=Parameters)
        stored = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 (safe_open is no dict)
    scales = {key.removeprefix("scale."): value for key, value in stored.items() if key.startswith("scale.")}
    tensors = {key: value for key, value in stored.items() if not key.startswith("scale.")}
    values = {key: v.astype(np.float32) * scales[key] if key in scales else v for key, v in tensors.items()}
    return Parameters(config, folder=str(Path(path).parent)), Parameters(values)


def number(text: str) -> float:
    """A number as names of keys write it: 0p5 or 0.5 for a half, -1, m1 or n1 for minus one."""
    found = re.fullmatch(r"(-|m|n|neg|minus)?(\d+)(?:[p.](\d+))?(e[-+]?\d+)?", text)
    if found is None:
        raise Incomplete(f"{text!r} in a key is no number")
    sign, whole, rest, exponent = found.groups()
    return float(f"{'-' if sign else ''}{whole}.{rest or 0}{exponent or ''}")


def numbered(names: Any, pattern: str) -> dict[str, float]:
    """{what the pattern's group matched in a key: its number}, of all keys that the pattern begins."""
    texts = {found[1] for name in names if (found := re.match(pattern, name))}
    return {text: number(text) for text in sorted(texts)}


def only(config: dict, name: str, value: float) -> None:
    """Raises Incomplete for a parameter that turbojax has as a constant, where the fixture has another one."""
    if config.get(name, value) != value:
        raise Incomplete(f"{name}={config[name]}, which turbojax fixes at {value}")

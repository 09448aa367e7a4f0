"""Flags of the commands that write checkpoints, `convert` and `merge`."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from absl import flags, logging

from turbojax.weights.convert import FORMATS, NAMES, Summary


def define(values: flags.FlagValues, *, dtype: str | None, dtype_help: str) -> Callable[[], dict[str, Any]]:
    """Defines the flags of what is written; returns a function that gives their values as both functions take them."""
    flags.DEFINE_string("output", None, "file or folder to write", flag_values=values)
    schemes, dtypes = ["none", "block128", "channel"], ["bfloat16", "float16", "float32"]
    quantize = flags.DEFINE_enum("quantize", "none", schemes, "int8 linear layers in the blocks", flag_values=values)
    cast = flags.DEFINE_enum("dtype", dtype, dtypes, dtype_help, flag_values=values)
    format = flags.DEFINE_enum("format", "safetensors", FORMATS, "what to write", flag_values=values)
    names = flags.DEFINE_enum("names", "turbodiffusion", list(NAMES), "whose names", flag_values=values)
    overwrite = flags.DEFINE_bool("overwrite", False, "replace an output that exists", flag_values=values)
    return lambda: {
        "quantize": None if quantize.value == "none" else quantize.value,
        "dtype": jnp.dtype(cast.value) if cast.value else None,
        "format": format.value,
        "names": names.value,
        "overwrite": overwrite.value,
    }


def log_written(values: flags.FlagValues, summary: Summary) -> None:
    """Logs what was written, and where."""
    gigabytes = summary.bytes / 1e9
    logging.info("Wrote %s: %s, %d tensors, %.2f GB", values.output, summary.component, summary.tensors, gigabytes)

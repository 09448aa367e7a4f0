"""Flags of the commands that write checkpoints, `convert` and `merge`."""

from typing import Any

import jax.numpy as jnp
from absl import flags, logging

from turbojax.weights.convert import FORMATS, NAMES, Summary


def define(values: flags.FlagValues, *, dtype: str | None, dtype_help: str) -> None:
    """Defines the flags of what is written."""
    flags.DEFINE_string("output", None, "file or folder to write", flag_values=values)
    schemes, dtypes = ["none", "block128", "channel"], ["bfloat16", "float16", "float32"]
    flags.DEFINE_enum("quantize", "none", schemes, "int8 linear layers in the blocks", flag_values=values)
    flags.DEFINE_enum("dtype", dtype, dtypes, dtype_help, flag_values=values)
    flags.DEFINE_enum("format", "safetensors", FORMATS, "what to write", flag_values=values)
    flags.DEFINE_enum("names", "turbodiffusion", list(NAMES), "whose names", flag_values=values)
    flags.DEFINE_bool("overwrite", False, "replace an output that exists", flag_values=values)


def written(values: flags.FlagValues) -> dict[str, Any]:
    """Returns the flags' values as `convert` and `merge` take them, but for the output."""
    quantize = None if values.quantize == "none" else values.quantize
    dtype = jnp.dtype(values.dtype) if values.dtype else None
    others = {name: values[name].value for name in ("format", "names", "overwrite")}
    return {"quantize": quantize, "dtype": dtype, **others}


def log_written(values: flags.FlagValues, summary: Summary) -> None:
    """Logs what was written, and where."""
    gigabytes = summary.bytes / 1e9
    logging.info("Wrote %s: %s, %d tensors, %.2f GB", values.output, summary.component, summary.tensors, gigabytes)

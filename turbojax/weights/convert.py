"""Rewrites checkpoints: checked, cast, quantized or renamed, as safetensors, PyTorch's format or an Orbax folder.

Tensors go through one at a time, so host memory stays at the largest one, or three of the stacked ones for Orbax.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from turbojax.diffusion.schedules import rcm_times
from turbojax.errors import UserError
from turbojax.files import check_parent, remove_stale, user_path
from turbojax.models.sizes import tree_bytes
from turbojax.models.wan import WanConfig
from turbojax.weights.converted import is_converted, write_converted
from turbojax.weights.encoders import open_umt5, open_vae
from turbojax.weights.files import CONVERTED
from turbojax.weights.io import read_tensors, write_pth, write_safetensors
from turbojax.weights.layouts import Layout, diffusers_layout, official_layout, wan_layout
from turbojax.weights.lazy import CheckedTensors, specs_of
from turbojax.weights.load import TensorSource, WanCheckpoint, detect_config, log_quantization, open_wan
from turbojax.weights.mapped import release
from turbojax.weights.options import NetworkOptions
from turbojax.weights.parameters import progress
from turbojax.weights.rules import Rule, TensorKey, rename
from turbojax.weights.settings import check_detectable, header_of, settings_to_give
from turbojax.weights.wan import DIFFUSERS, OFFICIAL

FORMATS = ("safetensors", "pth", "orbax")
INFERENCE_DEFAULTS = ("sla_topk", "sigma_max")  # settings that `convert` takes for the header


class Summary(NamedTuple):
    """Component that was written, its number of tensors and their bytes."""

    component: str
    tensors: int
    bytes: int


class Names(NamedTuple):
    """A layout to write: its names and shapes, and the table that reads them."""

    layout: Callable[[WanConfig], Layout]
    rules: tuple[Rule, ...]


NAMES = {
    "turbodiffusion": Names(wan_layout, OFFICIAL),
    "official": Names(official_layout, OFFICIAL),
    "diffusers": Names(diffusers_layout, DIFFUSERS),
}


def convert(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    quantize: str | None = None,
    dtype: Any = jnp.bfloat16,
    format: str = "safetensors",
    names: str = "turbodiffusion",
    overwrite: bool = False,
    sla_topk: float | None = None,
    sigma_max: float | None = None,
) -> Summary:
    """Converts a transformer, VAE or text encoder; the names of its tensors say which it is.

    quantize: "block128" or "channel" for int8 linear layers in a transformer's blocks; None keeps what the file has.
    dtype: of everything that is not int8 or a scale.
    format: "safetensors", "pth" (files) or "orbax" (a folder; transformers only).
    names: of a transformer in a file: "turbodiffusion", "official" or "diffusers"; the latter two have neither SLA nor
      int8 weights.
    sla_topk, sigma_max: what a transformer is run with where a call names nothing else, for the header; None keeps what
      the source says. A .pth file has no place for them: what the source says is logged as a warning, to be given with
      the file from then on, or refused where nothing can say it.

    Raises CheckpointError for files that do not fit and for bytes of a .pth file that do not have their CRC-32,
    UserError for settings that cannot be. What was there before is only replaced with overwrite=True, and only once
    the new one is whole.
    """
    output = user_path(output)
    check_output(output, format=format, names=names, overwrite=overwrite)
    component = "transformer" if is_converted(source) else component_of(read_tensors(source))
    given = zip(INFERENCE_DEFAULTS, (sla_topk, sigma_max), strict=True)
    run_with = {name: value for name, value in given if value is not None}
    if component == "transformer":
        checkpoint = with_inference_defaults(open_wan(source), run_with, format=format)
        tensors = CheckedTensors(checkpoint.tensors, checksums=True)
        checkpoint = checkpoint._replace(tensors=tensors)
        summary = write_transformer(checkpoint, output, quantize=quantize, dtype=dtype, format=format, names=names)
        tensors.warn(checkpoint.what)
        return summary
    if quantize or format == "orbax" or names != "turbodiffusion" or run_with:
        raise UserError(
            f"{Path(source).name} is a {component}: only a transformer can be quantized, renamed, written by Orbax or "
            "given settings to run with"
        )
    return convert_encoder(source, output, component, dtype=dtype)


def with_inference_defaults(checkpoint: WanCheckpoint, settings: Mapping[str, Any], *, format: str) -> WanCheckpoint:
    """Sets INFERENCE_DEFAULTS of the checkpoint; raises UserError where they cannot be or have no effect."""
    if settings and format == "pth":
        raise UserError(f"a .pth file has no place for {' and '.join(settings)}; take format='safetensors'")
    if "sigma_max" in settings:
        rcm_times(1, settings["sigma_max"])
    if "sla_topk" in settings and checkpoint.config.attention_type == "original":
        raise UserError(f"sla_topk has no effect on {checkpoint.what}, which was not trained with SLA; leave it out")
    return checkpoint._replace(config=dataclasses.replace(checkpoint.config, **settings))


def check_output(output: Path, *, format: str, names: str, overwrite: bool) -> None:
    """Raises UserError where nothing can be written, before anything is read."""
    if format not in FORMATS:
        raise UserError(f"format={format!r} is unknown; choose {', '.join(FORMATS)}")
    if names not in NAMES:
        raise UserError(f"names={names!r} are unknown; choose {', '.join(NAMES)}")
    remove_stale(output.parent)  # which gives a folder its name again that another conversion, killed, took away
    check_parent(output)
    if output.exists() and not overwrite:
        raise UserError(f"{output} already exists; choose another output or allow it with --overwrite")
    if format != "orbax" and (output.suffix != f".{format}" or output.is_dir()):
        raise UserError(f"{output} must be a file that ends in .{format}")
    if format == "orbax" and output.exists() and not (output / CONVERTED).is_file():
        raise UserError(f"{output} is no converted model, so it is not replaced; choose another output")
    if format == "orbax" and names != "turbodiffusion":
        raise UserError(f"names={names!r} are for files; an Orbax folder has turbojax's own")


def component_of(tensors: Mapping[str, np.ndarray]) -> str:
    """Tells the component from the names; "transformer" unless they say otherwise, so that errors name one."""
    if any(name.endswith(("token_embedding.weight", "shared.weight")) for name in tensors):
        return "text encoder"
    if any(name.startswith("decoder.") for name in tensors):
        return "VAE"
    return "transformer"


def write_transformer(
    checkpoint: WanCheckpoint,
    output: Path,
    *,
    quantize: str | None = None,
    dtype: Any = None,
    format: str = "safetensors",
    names: str = "turbodiffusion",
) -> Summary:
    """Writes a checked transformer as `convert` does; dtype None keeps that of each tensor (Orbax: the config's)."""
    options = NetworkOptions(quant_linear=True if quantize else None, quant_scheme=quantize, dtype=dtype)
    config = options.apply(checkpoint.config)
    if names != "turbodiffusion" and (config.quant or config.attention_type != "original"):
        raise UserError(f"names={names!r} have no place for int8 weights and SLA's proj_l; take names='turbodiffusion'")
    source = TensorSource(checkpoint, config)
    if format == "orbax":
        specs = write_converted(output, config, source)
    else:
        if dtype is None:
            dtype = {key: spec.dtype for key, spec in specs_of(checkpoint.tensors).items()}
        specs = write_wan(output, config, source, dtype=dtype, names=names, stacked=checkpoint.stacked)
    log_quantization(checkpoint.config, config)
    return Summary("transformer", len(specs), tree_bytes(specs))


def write_wan(
    output: Path,
    config: WanConfig,
    tensor: Callable[[TensorKey], Any],
    *,
    dtype: Any,
    names: str = "turbodiffusion",
    stacked: bool = False,
) -> dict[str, jax.ShapeDtypeStruct]:
    """Writes a transformer as a .safetensors or .pth file; returns the shapes and dtypes of its tensors.

    tensor: gives the value of each parameter, a layer at a time.
    dtype: of everything that is not int8 or a scale, or a mapping that has each tensor's own.
    stacked: write the layers of a parameter one after another, instead of block by block.
    """
    layout, rules = NAMES[names].layout(config), NAMES[names].rules
    header = header_for(output, config, layout, rules)
    keys = {name: hit[0] for name in layout if (hit := rename(name, rules))}
    if stacked:
        keys = dict(sorted(keys.items(), key=lambda item: item[1].target))
    dtypes = dtype if isinstance(dtype, Mapping) else dict.fromkeys(keys.values(), dtype)
    types = {name: stored_dtype(name, dtypes.get(key, jnp.float32)) for name, key in keys.items()}
    specs = {name: jax.ShapeDtypeStruct(layout[name], dtype) for name, dtype in types.items()}
    write_file(output, lambda name: tensor(keys[name]), specs, header)
    return specs


def header_for(output: Path, config: WanConfig, layout: Layout, rules: tuple[Rule, ...]) -> dict[str, str]:
    """Makes the header of a file with these names, empty where the format has none.

    Raises UserError where a reader of the file would take it for another network; warns of settings that have to be
    given to it from then on.
    """
    shapes = {name: np.broadcast_to(np.int8(0), shape) for name, shape in layout.items()}
    detected = detect_config(shapes, rules, num_heads=config.num_heads, what=output.name)
    check_detectable(config, detected, output)
    if output.suffix == ".safetensors":
        return header_of(config, detected)
    if given := settings_to_give(config, detected, output):
        flags = " ".join(f"--config.{name}={value}" for name, value in given.items())
        logging.warning("%s has no place for what the network is run with: give %s with it", output.name, flags)
    return {}


def write_file(output: Path, tensor: Callable[[str], Any], specs: Mapping[str, Any], metadata: dict[str, str]) -> None:
    """Writes tensors, reshaped and cast to their specs, as a .safetensors file, or a .pth file without the metadata."""

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, spec in progress(specs, "Converting"):
            value = np.asarray(tensor(name))
            yield name, value.reshape(spec.shape).astype(spec.dtype)
            release(value)

    if output.suffix == ".pth":
        write_pth(output, tensors())
    else:
        write_safetensors(output, tensors(), specs, metadata=metadata)


def stored_dtype(name: str, dtype: Any) -> np.dtype:
    if name.endswith("int8_weight"):
        return np.dtype(np.int8)
    return np.dtype(np.float32) if name.endswith(".scale") else jnp.dtype(dtype)


def convert_encoder(source: Any, output: Path, component: str, *, dtype: Any) -> Summary:
    """Writes a VAE or a text encoder under the names it has, cast; checks it against the module first."""
    open_vae(source) if component == "VAE" else open_umt5(source)
    tensors = CheckedTensors(read_tensors(source), checksums=True)
    specs = {name: jax.ShapeDtypeStruct(spec.shape, jnp.dtype(dtype)) for name, spec in tensors.specs.items()}
    write_file(output, tensors.__getitem__, specs, {"format": "turbojax"})
    tensors.warn(Path(source).name)
    return Summary(component, len(specs), tree_bytes(specs))

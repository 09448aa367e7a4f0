"""Rewrites checkpoints: checked, cast or quantized, as safetensors in the official names or as an Orbax folder.

Tensors go through one at a time, so host memory stays at the largest one, or three of the stacked ones for Orbax.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from turbojax.errors import UserError
from turbojax.models.wan import WanConfig
from turbojax.weights.files import CONVERTED
from turbojax.weights.io import read_tensors, release, save_orbax, write_safetensors
from turbojax.weights.load import Pieces, is_stacked, open_umt5, open_vae, open_wan, wan_skeleton, with_options
from turbojax.weights.published import wan_layout
from turbojax.weights.rules import Entry, rename
from turbojax.weights.wan import OFFICIAL

FORMATS = ("safetensors", "orbax")


class Summary(NamedTuple):
    """What was written: the component, the number of tensors and their bytes."""

    component: str
    tensors: int
    bytes: int


def convert(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    quantize: str | None = None,
    dtype: Any = jnp.bfloat16,
    format: str = "safetensors",
    overwrite: bool = False,
) -> Summary:
    """Converts a transformer, VAE or text encoder, told apart by the names of its tensors.

    quantize: "block128" or "channel" for int8 linear layers in a transformer's blocks; None keeps what the file has.
    dtype: of everything that is not int8 or a scale.
    format: "safetensors" (a file) or "orbax" (a folder; transformers only).

    Raises CheckpointError for files that do not fit, UserError for settings that cannot be. What was there before is
    only replaced with overwrite=True, and only once the new one is whole.
    """
    if format not in FORMATS:
        raise UserError(f"format={format!r} is unknown; choose {' or '.join(FORMATS)}")
    output = Path(output)
    if output.exists() and not overwrite:
        raise UserError(f"{output} already exists; choose another output or allow it with --overwrite")
    if format == "safetensors" and (output.suffix != ".safetensors" or output.is_dir()):
        raise UserError(f"{output} must be a file that ends in .safetensors")
    if format == "orbax" and output.exists() and not (output / CONVERTED).is_file():
        raise UserError(f"{output} is no converted model, so it is not replaced; choose another output")
    component = component_of(read_tensors(source))
    if component != "transformer" and (quantize or format != "safetensors"):
        raise UserError(
            f"{Path(source).name} is a {component}: only a transformer can be quantized or written by Orbax"
        )
    if component == "transformer":
        return convert_wan(source, output, quantize=quantize, dtype=dtype, format=format)
    return convert_plain(source, output, component, dtype=dtype)


def component_of(tensors: Mapping[str, np.ndarray]) -> str:
    """Which of the three a checkpoint is; "transformer" unless its names say otherwise, so that errors name one."""
    if any(name.endswith(("token_embedding.weight", "shared.weight")) for name in tensors):
        return "text encoder"
    if any(name.startswith("decoder.") for name in tensors):
        return "VAE"
    return "transformer"


def convert_wan(source: Any, output: Path, *, quantize: str | None, dtype: Any, format: str) -> Summary:
    checkpoint = open_wan(source)
    config = with_options(
        checkpoint.config, quant_linear=True if quantize else None, quant_scheme=quantize, dtype=dtype
    )
    pieces = Pieces(checkpoint, config)
    if format == "orbax":
        return write_orbax(output, config, pieces)
    return write_wan(output, config, pieces, dtype=dtype)


def write_wan(output: Path, config: WanConfig, piece: Callable[[Entry], Any], *, dtype: Any) -> Summary:
    """A transformer as a safetensors file in the official names.

    piece: the value of each parameter, a layer at a time; dtype: of everything that is not int8 or a scale.
    """
    layout = wan_layout(config)
    specs = {name: jax.ShapeDtypeStruct(shape, stored_dtype(name, dtype)) for name, shape in layout.items()}
    metadata = {"format": "turbojax", "num_heads": str(config.num_heads)}

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, spec in progress(specs):
            hit = rename(name, OFFICIAL)
            assert hit is not None, name
            value = np.asarray(piece(hit[0]))
            yield name, value.reshape(spec.shape).astype(spec.dtype)
            release(value)

    make_parent(output)
    write_safetensors(output, tensors(), specs, metadata=metadata)
    return Summary("transformer", len(specs), total_bytes(specs))


def make_parent(output: Path) -> None:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror or error}") from error


def stored_dtype(name: str, dtype: Any) -> np.dtype:
    if name.endswith("int8_weight"):
        return np.dtype(np.int8)
    return np.dtype(np.float32) if name.endswith(".scale") else jnp.dtype(dtype)


def progress(specs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    with tqdm(total=total_bytes(specs), unit="B", unit_scale=True, desc="Converting", disable=None, leave=False) as bar:
        for name, spec in specs.items():
            yield name, spec
            bar.update(spec.size * spec.dtype.itemsize)


def total_bytes(specs: Mapping[str, Any]) -> int:
    return sum(spec.size * spec.dtype.itemsize for spec in specs.values())


def write_orbax(output: Path, config: WanConfig, pieces: Pieces) -> Summary:
    """A folder with the arrays as the module holds them, blocks stacked, and the configuration.

    Each array is an Orbax checkpoint of its own: Orbax takes more than twice the memory of what it saves at once.
    """
    specs = wan_skeleton(config).specs
    make_parent(output)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.part")
    try:
        temporary.mkdir()
        for name, spec in progress(specs):
            save_orbax(temporary / "arrays" / name, {name: stacked(pieces, name, spec)})
        fields = {**dataclasses.asdict(config), "dtype": jnp.dtype(config.dtype).name}
        (temporary / CONVERTED).write_text(json.dumps(fields, indent=1) + "\n")
        if output.exists():
            shutil.rmtree(output)
        temporary.rename(output)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Summary("transformer", len(specs), total_bytes(specs))


def stacked(pieces: Pieces, name: str, spec: jax.ShapeDtypeStruct) -> np.ndarray:
    """A parameter as the module holds it, those of the blocks with a leading axis of layers."""
    array = np.empty(spec.shape, spec.dtype)
    for layer in range(spec.shape[0]) if is_stacked(name) else (None,):
        value = np.asarray(pieces(Entry(name, layer)))
        array[... if layer is None else layer] = value.astype(spec.dtype)
        release(value)
    return array


def convert_plain(source: Any, output: Path, component: str, *, dtype: Any) -> Summary:
    """A VAE or a text encoder under the names it has, cast; checked against the module first."""
    open_vae(source) if component == "VAE" else open_umt5(source)
    tensors = read_tensors(source)
    specs = {name: jax.ShapeDtypeStruct(tensor.shape, jnp.dtype(dtype)) for name, tensor in tensors.items()}

    def cast() -> Iterator[tuple[str, np.ndarray]]:
        for name, spec in progress(specs):
            yield name, np.asarray(tensors[name]).astype(spec.dtype)
            release(tensors[name])

    make_parent(output)
    write_safetensors(output, cast(), specs, metadata={"format": "turbojax"})
    return Summary(component, len(specs), total_bytes(specs))

"""Settings of a transformer that its checkpoint holds beside the names and shapes of its tensors.

The header of a .safetensors file that `turbojax convert` wrote holds HEADER's settings, config.json beside a published
file the number of heads, and turbojax.json in a folder for Orbax the whole configuration.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from turbojax.errors import CheckpointError, UserError
from turbojax.json_reader import (
    Array,
    Boolean,
    Enum,
    InString,
    Integer,
    Nullable,
    Number,
    Object,
    Schema,
    check_value,
    read_json,
)
from turbojax.kernels.int8 import QUANT_SCHEMES, QuantConfig, scheme_name
from turbojax.kernels.sage import VALUES
from turbojax.models.wan import BLOCKS, WanConfig
from turbojax.weights.files import CONVERTED
from turbojax.weights.io import file_metadata
from turbojax.weights.wan import usual_num_heads

HEADS = Integer(1, 1024)
WIDTH = Integer(1, 2**20)
BLOCK_ROWS = Array(Integer(1, 2**12), 2, 2)
AGAIN = "convert the checkpoint again"

# Settings of a file that neither the names nor the shapes of its tensors show; each entry of the header is JSON.
HEADER: dict[str, Schema] = {
    "num_heads": HEADS,
    "text_len": Integer(1, 2**16),
    "eps": Number(0, 1, above=True),
    "attention_type": Enum(*BLOCKS),
    "sla_topk": Number(0, 1, above=True),
    "sla_blocks": Nullable(BLOCK_ROWS),
    "sage_values": Enum(*VALUES),
    "sigma_max": Nullable(Number(0, 1e6, above=True)),
    "quant_scheme": Enum(*QUANT_SCHEMES),
}
ALWAYS_WRITTEN = ("num_heads", "sla_topk", "sigma_max")  # also where names and shapes would give the same
SET_BY_READER = ("dtype", "quant", "remat", "attention_implementation")  # or by "quant_scheme"
# Settings of HEADER that a call or `--config.NAME=` can be given, where a file does not say them.
GIVEN_BY_USER = ("attention_type", "sla_topk", "sage_values", "sigma_max", "quant_scheme")

QUANT = Object({"scheme": Enum("block128", "channel"), "group": Enum(1, 128), "weight_only": Boolean()})
CONFIGURATION = Object(
    {
        "dim": WIDTH,
        "ffn_dim": WIDTH,
        "num_heads": HEADS,
        "num_layers": Integer(1, 1024),
        "patch": Array(Integer(1, 64), 3, 3),
        "sla_blocks": HEADER["sla_blocks"],
        "quant": Nullable(QUANT),
        "dtype": Enum("bfloat16", "float16", "float32"),
    },
    optional={
        **dict.fromkeys(("in_channels", "out_channels", "freq_dim", "text_dim"), WIDTH),
        "clip_dim": Nullable(WIDTH),
        "clip_images": Integer(1, 2),
        "attention_implementation": Enum(None, "reference"),
        "remat": Boolean(),
        **{n: HEADER[n] for n in ("text_len", "eps", "attention_type", "sla_topk", "sage_values", "sigma_max")},
    },
)
PUBLISHED = Object({}, {"num_heads": Nullable(HEADS), "num_attention_heads": Nullable(HEADS)}, others="left out")


def read_configuration(folder: Path) -> WanConfig:
    """Reads turbojax.json of a folder that `turbojax convert --format=orbax` wrote; raises CheckpointError."""
    path = folder / CONVERTED
    fields = read_json(path, CONFIGURATION, suggestion=AGAIN)
    quant = QuantConfig(**fields["quant"]) if fields["quant"] else None
    try:
        if quant:
            scheme_name(quant)
        return WanConfig(**(fields | {"quant": quant, "dtype": jnp.dtype(fields["dtype"])}))
    except UserError as error:
        raise CheckpointError(f"{path}: {error}; {AGAIN}") from error


def write_configuration(folder: Path, config: WanConfig) -> None:
    """Writes turbojax.json."""
    fields = {**dataclasses.asdict(config), "dtype": jnp.dtype(config.dtype).name}
    (folder / CONVERTED).write_text(json.dumps(fields, indent=1) + "\n")


def config_num_heads(path: Path) -> int | None:
    """Reads the number of heads, which shapes do not show, from the config.json beside the weights."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.exists():
        return None
    fields = read_json(file, PUBLISHED, suggestion="download it again, or move it away")
    return fields.get("num_heads") or fields.get("num_attention_heads")


def read_header(path: Path) -> dict[str, Any]:
    """Reads the settings in a file's header, by HEADER; raises CheckpointError for one that cannot be."""
    schema = Object({}, {name: InString(schema) for name, schema in HEADER.items()}, others="left out")
    metadata = file_metadata(path) if path.is_file() else {}
    return check_value(metadata, schema, name=f"{path}, in its header", suggestion=AGAIN)


def with_header(config: WanConfig, settings: Mapping[str, Any], *, what: str) -> WanConfig:
    """Returns a configuration that was detected by names and shapes with what the header says besides."""
    changes = {name: value for name, value in settings.items() if name != "quant_scheme"}
    if "quant_scheme" in settings:
        changes["quant"] = QUANT_SCHEMES[settings["quant_scheme"]]
    new = dataclasses.replace(config, **changes)
    stored = [(c.attention_type == "original", c.quant and c.quant.scheme) for c in (config, new)]
    if stored[0] != stored[1]:
        raise CheckpointError(f"{what} holds other tensors than its header says ({', '.join(changes)}); {AGAIN}")
    return new


def header_of(config: WanConfig, detected: WanConfig) -> dict[str, str]:
    """The entries of a file's header; detected: the configuration that its names and shapes alone give."""
    always = {name: value for name, value in header_values(config).items() if name in ALWAYS_WRITTEN}
    entries = always | undetected(config, detected)
    return {"format": "turbojax"} | {name: json.dumps(value) for name, value in entries.items() if value is not None}


def check_detectable(config: WanConfig, detected: WanConfig, output: Path) -> None:
    """Raises UserError where names, shapes and header of a file together do not give its configuration."""
    fields = [field.name for field in dataclasses.fields(config) if field.name not in (*HEADER, *SET_BY_READER)]
    lost = [f"{name}={getattr(config, name)}" for name in fields if getattr(config, name) != getattr(detected, name)]
    if lost:
        raise UserError(f"{output.name} would not tell {', '.join(lost)}; take format='orbax'")


def settings_to_give(config: WanConfig, detected: WanConfig, output: Path) -> dict[str, Any]:
    """The settings that a user has to give with a file that has no header.

    Raises UserError where a setting that nobody can give would be lost.
    """
    changes = undetected(config, detected)
    head_dim = None if config.attention_type == "original" else config.head_dim
    if config.num_heads != usual_num_heads(config.dim, head_dim):
        changes["num_heads"] = config.num_heads
    if lost := [f"{name}={value}" for name, value in changes.items() if name not in GIVEN_BY_USER]:
        raise UserError(
            f"{output.name} has no place for {', '.join(lost)}, and its tensors do not tell; take format='safetensors'"
        )
    return changes


def undetected(config: WanConfig, detected: WanConfig) -> dict[str, Any]:
    """The settings of HEADER that names and shapes alone do not give."""
    found = header_values(detected)
    return {name: value for name, value in header_values(config).items() if value != found[name]}


def header_values(config: WanConfig) -> dict[str, Any]:
    """A configuration's values of HEADER; None for those that have no effect on it."""
    values = {name: getattr(config, name) for name in HEADER if name != "quant_scheme"}
    values["quant_scheme"] = None if config.quant is None else scheme_name(config.quant)
    if config.attention_type == "original":
        values |= dict.fromkeys(("sla_topk", "sla_blocks", "sage_values"))
    return values

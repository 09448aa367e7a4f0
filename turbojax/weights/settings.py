"""What a transformer's checkpoint says of its network beside the names and shapes of its tensors.

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

# Of a file, what neither the names nor the shapes of its tensors tell; each entry of the header is JSON.
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
ALWAYS_TOLD = ("num_heads", "sla_topk", "sigma_max")  # in the header even where they are as they would be without
NEVER_TOLD = ("dtype", "quant", "remat", "attention_implementation")  # chosen by who loads it, or by "quant_scheme"
# Settings of HEADER that a call or `--config.NAME=` can be given, where a file does not say them.
GIVEN_BY_HAND = ("attention_type", "sla_topk", "sage_values", "sigma_max", "quant_scheme")

CONFIGURATION = Object(
    {
        "dim": WIDTH,
        "ffn_dim": WIDTH,
        "num_heads": HEADS,
        "num_layers": Integer(1, 1024),
        "patch": Array(Integer(1, 64), 3, 3),
        "sla_blocks": HEADER["sla_blocks"],
        "quant": Nullable(
            Object({"scheme": Enum("block128", "channel"), "group": Enum(1, 128), "weight_only": Boolean()})
        ),
        "dtype": Enum("bfloat16", "float16", "float32"),
    },
    optional={
        "in_channels": WIDTH,
        "out_channels": WIDTH,
        "freq_dim": WIDTH,
        "text_dim": WIDTH,
        "clip_dim": Nullable(WIDTH),
        "clip_images": Integer(1, 2),
        "attention_implementation": Enum(None, "reference"),
        "remat": Boolean(),
        **{
            name: HEADER[name] for name in ("text_len", "eps", "attention_type", "sla_topk", "sage_values", "sigma_max")
        },
    },
)
PUBLISHED = Object({}, {"num_heads": Nullable(HEADS), "num_attention_heads": Nullable(HEADS)}, others="left out")


def read_configuration(folder: Path) -> WanConfig:
    """The configuration of a folder that `turbojax convert --format=orbax` wrote; raises CheckpointError."""
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
    fields = {**dataclasses.asdict(config), "dtype": jnp.dtype(config.dtype).name}
    (folder / CONVERTED).write_text(json.dumps(fields, indent=1) + "\n")


def config_num_heads(path: Path) -> int | None:
    """The number of heads, which shapes do not tell, from the config.json beside the weights."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.exists():
        return None
    fields = read_json(file, PUBLISHED, suggestion="download it again, or move it away")
    return fields.get("num_heads") or fields.get("num_attention_heads")


def read_header(path: Path) -> dict[str, Any]:
    """The settings in a file's header, by HEADER; raises CheckpointError for one that cannot be."""
    schema = Object({}, {name: InString(schema) for name, schema in HEADER.items()}, others="left out")
    metadata = file_metadata(path) if path.is_file() else {}
    return check_value(metadata, schema, name=f"{path}, in its header", suggestion=AGAIN)


def with_header(config: WanConfig, settings: Mapping[str, Any], *, what: str) -> WanConfig:
    """A configuration that was told by names and shapes, with what the header says besides."""
    changes = {name: value for name, value in settings.items() if name != "quant_scheme"}
    if "quant_scheme" in settings:
        changes["quant"] = QUANT_SCHEMES[settings["quant_scheme"]]
    new = dataclasses.replace(config, **changes)
    stored = [(c.attention_type == "original", c.quant and c.quant.scheme) for c in (config, new)]
    if stored[0] != stored[1]:
        raise CheckpointError(f"{what} holds other tensors than its header says ({', '.join(changes)}); {AGAIN}")
    return new


def header_of(config: WanConfig, told: WanConfig) -> dict[str, str]:
    """The entries of a file's header; told: the configuration that names and shapes alone tell."""
    always = {name: value for name, value in values_of(config).items() if name in ALWAYS_TOLD}
    entries = {name: value for name, value in (always | header_changes(config, told)).items() if value is not None}
    return {"format": "turbojax"} | {name: json.dumps(value) for name, value in entries.items()}


def check_told(config: WanConfig, told: WanConfig, output: Path) -> None:
    """Raises UserError where names, shapes and header together would not tell the configuration of a file."""
    fields = [field.name for field in dataclasses.fields(config) if field.name not in (*HEADER, *NEVER_TOLD)]
    if hidden := [f"{name}={getattr(config, name)}" for name in fields if getattr(config, name) != getattr(told, name)]:
        raise UserError(f"{output.name} would not tell {', '.join(hidden)}; take format='orbax'")


def untold(config: WanConfig, told: WanConfig, output: Path) -> dict[str, Any]:
    """What has to be given with a file that has no header, by setting.

    Raises UserError where a setting that nobody can give would be lost.
    """
    changes = header_changes(config, told)
    if config.num_heads != usual_num_heads(
        config.dim, None if config.attention_type == "original" else config.head_dim
    ):
        changes["num_heads"] = config.num_heads
    if lost := [f"{name}={value}" for name, value in changes.items() if name not in GIVEN_BY_HAND]:
        raise UserError(
            f"{output.name} has no place for {', '.join(lost)}, and its tensors do not tell; take format='safetensors'"
        )
    return changes


def header_changes(config: WanConfig, told: WanConfig) -> dict[str, Any]:
    """The settings of HEADER that names and shapes alone would not tell."""
    settings, without = values_of(config), values_of(told)
    return {name: value for name, value in settings.items() if value != without[name]}


def values_of(config: WanConfig) -> dict[str, Any]:
    """A configuration's values by HEADER, without those that have no effect on it."""
    quant_scheme = None if config.quant is None else scheme_name(config.quant)
    values = {name: quant_scheme if name == "quant_scheme" else getattr(config, name) for name in HEADER}
    if config.attention_type == "original":
        values |= {name: None for name in ("sla_topk", "sla_blocks", "sage_values")}
    return values

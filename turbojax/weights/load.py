"""From checkpoint files to modules on the device, one layer at a time.

The network is built as shapes only (`nnx.eval_shape`), the checkpoint is checked against it as a whole, and then each
tensor goes from the memory-mapped file to the device. A stacked parameter `[layers, ...]` is filled in place, so that
neither the host nor the device ever holds the model twice.
"""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from tqdm import tqdm

from turbojax.errors import CheckpointError
from turbojax.kernels import int8
from turbojax.models.umt5 import UMT5Config, UMT5Encoder
from turbojax.models.vae import VAEConfig, WanVAE
from turbojax.models.wan import WanConfig, WanModel
from turbojax.weights.files import CONVERTED
from turbojax.weights.io import file_metadata, load_orbax, read_tensors, release
from turbojax.weights.rules import Entry, Rule, assign, describe, relaid, rename
from turbojax.weights.umt5 import detect_umt5_config, token_table, umt5_rules
from turbojax.weights.vae import detect_vae_config, vae_rules
from turbojax.weights.wan import clean_name, detect_wan_config, wan_rules


class Skeleton(NamedTuple):
    """A module without arrays: its structure and the shape and dtype of each parameter by dotted path."""

    graph: Any
    variables: dict[tuple, Any]
    specs: dict[str, jax.ShapeDtypeStruct]

    @classmethod
    def of(cls, build: Callable[[], nnx.Module]) -> "Skeleton":
        graph, state = nnx.split(nnx.eval_shape(build))
        variables = dict(nnx.to_flat_state(state))
        specs = {dotted(path): variable.get_value() for path, variable in variables.items()}
        return cls(graph, variables, specs)

    def entries(self) -> dict[Entry, jax.ShapeDtypeStruct]:
        """One entry a tensor of the checkpoint: stacked parameters are counted a layer at a time."""
        out = {}
        for name, spec in self.specs.items():
            if is_stacked(name):
                layer = jax.ShapeDtypeStruct(spec.shape[1:], spec.dtype)
                out.update({Entry(name, i): layer for i in range(spec.shape[0])})
            else:
                out[Entry(name, None)] = spec
        return out

    def fill(self, arrays: Mapping[str, jax.Array]) -> Any:
        """The module with these arrays as its parameters."""
        flat = [(path, variable.replace(arrays[dotted(path)])) for path, variable in self.variables.items()]
        return nnx.merge(self.graph, nnx.from_flat_state(flat))


def dotted(path: tuple) -> str:
    return ".".join(str(part) for part in path)


def is_stacked(name: str) -> bool:
    return name.startswith("blocks.")


def wan_skeleton(config: WanConfig) -> Skeleton:
    return Skeleton.of(lambda: WanModel(config, rngs=nnx.Rngs(0)))


class WanCheckpoint(NamedTuple):
    """A transformer checkpoint, checked against its own configuration; nothing has been read yet."""

    config: WanConfig
    tensors: dict[Entry, np.ndarray]
    what: str


def open_wan(path: str | os.PathLike) -> WanCheckpoint:
    """Opens a transformer checkpoint in any of the published layouts and checks it as a whole.

    Raises CheckpointError with all missing, unknown and misshapen names.
    """
    return check_wan(read_tensors(path), num_heads=published_num_heads(path), what=Path(path).name)


def check_wan(tensors: Mapping[str, np.ndarray], *, num_heads: int | None, what: str) -> WanCheckpoint:
    """Names and shapes of a transformer's tensors, checked as a whole; see `open_wan`."""
    tensors = {clean_name(name): tensor for name, tensor in tensors.items()}
    rules = wan_rules(tensors, what=what)
    config = detect_wan_config(renamed_shapes(tensors, rules), num_heads=num_heads, what=what)
    expected = {entry: spec.shape for entry, spec in wan_skeleton(config).entries().items()}
    return WanCheckpoint(config, assign(tensors, rules, expected, what=what), what)


def renamed_shapes(tensors: Mapping[str, np.ndarray], rules: Iterable[Rule]) -> dict[Entry, tuple[int, ...]]:
    rules = tuple(rules)
    shapes = {}
    for name, tensor in tensors.items():
        if (hit := rename(name, rules)) and hit[1].target:
            entry, rule = hit
            shapes[entry] = relaid(rule, tensor).shape
    return shapes


def published_num_heads(path: str | os.PathLike) -> int | None:
    """The number of heads, which shapes do not tell, from a converted file or the config.json beside the weights."""
    path = Path(path)
    if path.is_file() and (heads := file_metadata(path).get("num_heads", "")).isdigit():
        return int(heads)
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text())
        heads = config.get("num_heads", config.get("num_attention_heads"))
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{file} is not a model configuration: {error}; download it again") from error
    return heads if isinstance(heads, int) else None


def with_options(config: WanConfig, *, quant_linear: bool | None = None, **changes: Any) -> WanConfig:
    """The checkpoint's configuration with what the user asked for; None keeps what the checkpoint says."""
    changes = {name: value for name, value in changes.items() if value is not None}
    if quant_linear is not None:
        changes["quant"] = (config.quant or "block128") if quant_linear else None
    return dataclasses.replace(config, **changes)


def load_wan(
    path: str | os.PathLike,
    *,
    quant_linear: bool | None = None,
    attention_type: str | None = None,
    sla_topk: float | None = None,
    dtype: Any = jnp.bfloat16,
) -> WanModel:
    """Loads a transformer; options that are None follow the checkpoint.

    quant_linear: True quantizes a bfloat16 checkpoint while it loads, False dequantizes an int8 one.
    """
    options: dict[str, Any] = dict(
        quant_linear=quant_linear, attention_type=attention_type, sla_topk=sla_topk, dtype=dtype
    )
    if (Path(path) / CONVERTED).is_file():
        return load_converted(Path(path), options)
    return build_wan(open_wan(path), **options)


def build_wan(checkpoint: WanCheckpoint, **options: Any) -> WanModel:
    """The network of a checked checkpoint; options as `load_wan` takes them."""
    config = with_options(checkpoint.config, **options)
    skeleton = wan_skeleton(config)
    pieces = Pieces(checkpoint.tensors, config, checkpoint.what)
    return skeleton.fill(place(skeleton, pieces, what=checkpoint.what))


@dataclasses.dataclass(frozen=True)
class Pieces:
    """The checkpoint's tensors in the form that a configuration wants: quantized, dequantized, with or without SLA."""

    tensors: Mapping[Entry, np.ndarray]
    config: WanConfig
    what: str

    def __call__(self, entry: Entry) -> Any:
        stored = self.tensors.get(entry)
        name, layer = entry
        scale_entry = Entry(name.removesuffix("weight") + "scale", layer)
        if ".proj_l." in name and stored is None:
            if layer == 0 and name.endswith("weight"):
                logging.warning("%s was not trained with SLA: proj_l starts at zero", self.what)
            size = self.config.head_dim
            return np.zeros((size, size) if name.endswith("weight") else size, np.float32)
        if name.endswith(".scale") and stored is None:
            return quantize(self.tensors[Entry(name.removesuffix("scale") + "weight", layer)])[1]
        assert stored is not None, describe(entry)
        if stored.dtype == np.int8 and not self.config.quant:
            return int8.dequantize_blocks(jnp.asarray(stored), jnp.asarray(self.tensors[scale_entry]))
        if self.config.quant and stored.dtype != np.int8 and is_quantized(name, self.config):
            return quantize(stored)[0]
        return stored


def is_quantized(name: str, config: WanConfig) -> bool:
    """Whether this parameter is the weight of an int8 linear layer: all in the blocks but `proj_l` and norms."""
    pattern = r"blocks\.(self_attn|cross_attn|ffn)\.(?!norm|proj_l)\w+\.weight"
    return config.quant is not None and re.fullmatch(pattern, name) is not None


@jax.jit
def quantize(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    return int8.quantize_blocks(weight)


@functools.partial(jax.jit, donate_argnums=0)
def write_layer(stack: jax.Array, layer: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, layer.astype(stack.dtype), index, 0)


@jax.jit
def all_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()


def place(skeleton: Skeleton, piece: Callable[[Entry], Any], *, what: str) -> dict[str, jax.Array]:
    """Puts every parameter on the device, one tensor of the checkpoint at a time, with a progress bar in bytes.

    Raises CheckpointError naming the parameters that hold NaN or infinity.
    """
    total = sum(spec.size * spec.dtype.itemsize for spec in skeleton.specs.values())
    arrays, finite = {}, {}
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"Loading {what}", disable=None, leave=False) as bar:
        for name, spec in skeleton.specs.items():
            layers = range(spec.shape[0]) if is_stacked(name) else [None]
            array = jnp.zeros(spec.shape if is_stacked(name) else (), spec.dtype)
            for layer in layers:
                stored = piece(Entry(name, layer))
                value = jnp.asarray(stored)
                if jnp.issubdtype(value.dtype, jnp.floating):
                    finite[Entry(name, layer)] = all_finite(value)
                array = value.astype(spec.dtype) if layer is None else write_layer(array, value, layer)
                if isinstance(stored, np.ndarray):
                    release(stored)
                bar.update(spec.size * spec.dtype.itemsize // len(layers))
            arrays[name] = array
    bad = [describe(entry) for entry, ok in finite.items() if not ok]
    if bad:
        raise CheckpointError(f"{what} holds NaN or infinity in {bad[0]} and {len(bad) - 1} others; download it again")
    return arrays


def load_converted(path: Path, options: dict[str, Any]) -> WanModel:
    """Loads a transformer that `scripts/convert.py --format=orbax` wrote, straight to the device where it fits."""
    try:
        fields = json.loads((path / CONVERTED).read_text())
        stored = WanConfig(**{**fields, "patch": tuple(fields["patch"]), "dtype": jnp.dtype(fields["dtype"])})
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path / CONVERTED} is damaged: {error}; convert the checkpoint again") from error
    config = with_options(stored, **options)
    skeleton = wan_skeleton(stored)
    if wan_skeleton(config).specs == skeleton.specs:
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        specs = {n: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=device) for n, s in skeleton.specs.items()}
        return wan_skeleton(config).fill(load_orbax(path / "arrays", specs))
    arrays = load_orbax(path / "arrays", skeleton.specs)
    tensors = {
        entry: arrays[entry.target] if entry.layer is None else arrays[entry.target][entry.layer]
        for entry in skeleton.entries()
    }
    return build_wan(WanCheckpoint(stored, tensors, path.name), **options)


def load_vae(path: str | os.PathLike, *, dtype: Any = jnp.bfloat16) -> WanVAE:
    """Loads a Wan 2.1 VAE, official or diffusers names."""
    tensors = read_tensors(path)
    config: VAEConfig = dataclasses.replace(detect_vae_config(tensors), dtype=dtype)
    skeleton = Skeleton.of(lambda: WanVAE(config, rngs=nnx.Rngs(0)))
    return load_plain(skeleton, tensors, vae_rules(tensors), what=Path(path).name)


def load_umt5(path: str | os.PathLike, *, dtype: Any = jnp.bfloat16) -> tuple[UMT5Encoder, np.ndarray]:
    """Loads a umT5 encoder; returns it and its token table `[vocab, D]`, which stays in the memory-mapped file."""
    tensors = read_tensors(path)
    config: UMT5Config = dataclasses.replace(detect_umt5_config(tensors), dtype=dtype)
    skeleton = Skeleton.of(lambda: UMT5Encoder(config, rngs=nnx.Rngs(0)))
    return load_plain(skeleton, tensors, umt5_rules(tensors), what=Path(path).name), token_table(tensors)


def check_plain(
    skeleton: Skeleton, tensors: Mapping[str, np.ndarray], rules: Iterable[Rule], *, what: str
) -> dict[Entry, np.ndarray]:
    """Every parameter's tensor; raises CheckpointError with all that is missing, unknown or misshapen."""
    expected = {entry: spec.shape for entry, spec in skeleton.entries().items()}
    return assign(tensors, rules, expected, what=what)


def load_plain(skeleton: Skeleton, tensors: Mapping[str, np.ndarray], rules: Iterable[Rule], *, what: str) -> Any:
    """A module whose parameters are the checkpoint's tensors as they are."""
    found = check_plain(skeleton, tensors, rules, what=what)
    return skeleton.fill(place(skeleton, found.__getitem__, what=what))

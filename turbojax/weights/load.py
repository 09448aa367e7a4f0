"""From checkpoint files to transformers: checked as a whole against the network's shapes, then read a tensor at a time.

Options quantize, dequantize and merge LoRAs on the way. `turbojax.weights.parameters` says where the parameters go.
"""

import dataclasses
import functools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from turbojax.errors import CheckpointError, UserError, quoted
from turbojax.files import user_path
from turbojax.kernels import int8
from turbojax.models.offload import Streamed
from turbojax.models.sizes import tree_bytes
from turbojax.models.wan import WanConfig, WanModel
from turbojax.weights.converted import OrbaxTensors, is_converted
from turbojax.weights.io import checkpoint_file, read_tensors
from turbojax.weights.layouts import wan_layout
from turbojax.weights.lazy import CheckedTensors
from turbojax.weights.lora import Changes, Expert, LoRA, apply_changes, read_loras
from turbojax.weights.options import NetworkOptions
from turbojax.weights.parameters import all_finite, load_parameters
from turbojax.weights.rules import Rule, TensorKey, assign, describe, relaid, rename
from turbojax.weights.settings import config_num_heads, read_configuration, read_header, with_header
from turbojax.weights.skeleton import wan_skeleton
from turbojax.weights.wan import clean_name, detect_wan_config, wan_rules


class WanCheckpoint(NamedTuple):
    """A transformer checkpoint, checked against its own configuration; nothing has been read yet."""

    config: WanConfig
    tensors: Mapping[TensorKey, np.ndarray]
    what: str
    stacked: bool = False  # the layers of a parameter lie together and are best read one after another


def open_wan(path: str | os.PathLike) -> WanCheckpoint:
    """Opens a transformer checkpoint, converted or in any of the published layouts, and checks it as a whole.

    Raises CheckpointError with all missing, unknown and misshapen names.
    """
    path = user_path(path)
    if is_converted(path):
        config = read_configuration(path)
        return WanCheckpoint(config, OrbaxTensors(path, wan_skeleton(config)), path.name, stacked=True)
    path = checkpoint_file(path)
    header = read_header(path)
    heads = header.get("num_heads") or config_num_heads(path)
    try:
        checkpoint = check_wan(read_tensors(path), num_heads=heads, what=path.name)
        return checkpoint._replace(config=with_header(checkpoint.config, header, what=path.name))
    except CheckpointError:
        raise
    except UserError as error:  # of a configuration that cannot be
        raise CheckpointError(f"{path.name}: {error}") from error


def check_wan(tensors: Mapping[str, np.ndarray], *, num_heads: int | None, what: str) -> WanCheckpoint:
    """Checks names and shapes of a transformer's tensors as a whole; see `open_wan`."""
    cleaned: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        if cleaned.setdefault(clean_name(name), tensor) is not tensor:
            raise CheckpointError(f"{what} holds {quoted(clean_name(name))} twice, once as {quoted(name)}; keep one")
    tensors, rules = cleaned, wan_rules(cleaned, what=what)
    config = detect_config(tensors, rules, num_heads=num_heads, what=what)
    found = assign(tensors, rules, wan_skeleton(config).tensor_specs(), what=what, layout=wan_layout(config))
    return WanCheckpoint(config, found, what)


def detect_config(
    tensors: Mapping[str, np.ndarray], rules: Iterable[Rule], *, num_heads: int | None, what: str
) -> WanConfig:
    """Detects the configuration by names and shapes of tensors that `rules` rename."""
    quantized = any(name.endswith((".int8_weight", ".scale")) for name in tensors)
    rules = tuple(rules)
    shapes: dict[TensorKey, tuple[int, ...]] = {}
    for name, tensor in tensors.items():
        if tensor.size and (hit := rename(name, rules)) and hit[1].target:
            shapes[hit[0]] = relaid(hit[1], tensor).shape
    return detect_wan_config(shapes, quantized=quantized, num_heads=num_heads, what=what)


def load_wan(
    path: str | os.PathLike,
    options: NetworkOptions | None = None,
    *,
    streamed: bool = False,
    loras: Sequence[LoRA] = (),
    expert: Expert | None = None,
) -> WanModel | Streamed:
    """Loads a transformer.

    streamed: leave the blocks in host memory, see `turbojax.models.offload`.
    loras: merged in float32, before quantization. expert: which of two networks this is, as far as they are concerned.
    """
    checkpoint = open_wan(path)
    changes = read_loras(loras, checkpoint.config, expert=expert)
    return build_wan(checkpoint, options or NetworkOptions(), changes, streamed=streamed)


def build_wan(
    checkpoint: WanCheckpoint, options: NetworkOptions, changes: Changes | None = None, *, streamed: bool = False
) -> WanModel | Streamed:
    """Builds the network of a checked checkpoint, with the changes of LoRAs."""
    config = options.apply(checkpoint.config)
    skeleton, tensors, what = wan_skeleton(config), checkpoint.tensors, checkpoint.what
    if isinstance(tensors, OrbaxTensors) and tensors.skeleton.specs == skeleton.specs and not (changes or streamed):
        model = skeleton.fill(tensors.load_arrays())
    else:
        checked = CheckedTensors(tensors)
        source = TensorSource(checkpoint._replace(tensors=checked), config, changes or {})
        arrays = load_parameters(skeleton, source, what=f"{what} with LoRAs" if changes else what, streamed=streamed)
        model = skeleton.fill(arrays, streamed=streamed)
        checked.warn(what)
    log_quantization(checkpoint.config, config, changes)
    return model


def log_quantization(stored: WanConfig, config: WanConfig, changes: Changes | None = None) -> None:
    """Logs what was done to the linear layers, by the names of the int8 schemes; changes: of LoRAs."""
    if stored.quant is None and config.quant is None:
        return
    specs = wan_skeleton(config).specs
    weights = [s for name, s in specs.items() if QUANTIZED.fullmatch(name) and name.endswith("weight")]
    count = sum(s.shape[0] for s in weights)
    before, after = (int8.scheme_name(c.quant) if c.quant else None for c in (stored, config))
    gigabytes = " -> ".join(f"{network_bytes(c, config.dtype) / 1e9:.1f} GB" for c in (stored, config))
    merged = sum(bool(QUANTIZED.fullmatch(key.target)) for key in changes or ())
    if after is None:
        logging.info("Dequantized %d linear layers (%s) to %s", count, before, jnp.dtype(config.dtype).name)
    elif before is None:
        logging.info("Quantized %d linear layers (%s): %s", count, after, gigabytes)
    elif scheme(stored) != scheme(config):
        logging.info("Quantized %d linear layers again, from %s to %s: %s", count, before, after, gigabytes)
    else:
        again = f", {merged} of them quantized again with LoRAs" if merged else ""
        logging.info("%d linear layers are int8 as stored (%s), run as %s%s", count, before, after, again)


def network_bytes(config: WanConfig, dtype: Any) -> int:
    """The bytes of a network's parameters where those that are not int8 have this dtype."""
    return tree_bytes(wan_skeleton(dataclasses.replace(config, dtype=dtype)).specs)


@dataclasses.dataclass(frozen=True)
class TensorSource:
    """The tensors in the form that a configuration wants: quantized, dequantized, with or without SLA, with LoRAs."""

    checkpoint: WanCheckpoint
    config: WanConfig
    changes: Changes = dataclasses.field(default_factory=dict)

    def __call__(self, key: TensorKey) -> Any:
        if ".proj_l." in key.target and key not in self.checkpoint.tensors:
            return self.untrained_projection(key)
        linear = QUANTIZED.fullmatch(key.target)
        if linear is None:
            return self.changed(key, self.checkpoint.tensors[key])
        merges = TensorKey(f"{linear['name']}.weight", key.layer) in self.changes
        if not merges and scheme(self.checkpoint.config) == scheme(self.config):
            return self.checkpoint.tensors[key]
        weight = self.weight(linear["name"], key.layer)
        if self.config.quant is None:
            return weight
        q, scale = quantize_weight(weight, self.config.quant.scheme)
        if linear["part"] == "scale":
            return scale
        logging.debug("Quantized %s (%s)", describe(key), self.config.quant.scheme)
        return q

    def weight(self, name: str, layer: int | None) -> Any:
        """A linear layer's weight as numbers."""
        key = TensorKey(f"{name}.weight", layer)
        stored = self.checkpoint.tensors[key]
        if self.checkpoint.config.quant is not None:
            stored = dequantize_weight(stored, self.checkpoint.tensors[TensorKey(f"{name}.scale", layer)])
        return self.changed(key, stored)

    def changed(self, key: TensorKey, stored: Any) -> Any:
        changes = self.changes.get(key)
        return apply_changes(stored, changes) if changes else stored

    def untrained_projection(self, key: TensorKey) -> np.ndarray:
        if key == TensorKey("blocks.self_attn.proj_l.weight", 0):
            logging.warning("%s was not trained with SLA: proj_l starts at zero", self.checkpoint.what)
        size = self.config.head_dim
        return np.zeros((size, size) if key.target.endswith("weight") else size, np.float32)


# Weights and scales of the int8 linear layers: all in the blocks but `proj_l`.
QUANTIZED = re.compile(r"(?P<name>blocks\.(self_attn|cross_attn|ffn)\.(?!norm|proj_l)\w+)\.(?P<part>weight|scale)")


def scheme(config: WanConfig) -> str | None:
    return None if config.quant is None else config.quant.scheme


@functools.partial(jax.jit, static_argnums=1)
def quantize_weight(weight: jax.Array, scheme: int8.Scheme) -> tuple[jax.Array, jax.Array]:
    """Returns int8 weight and scales, NaN where any weight is NaN or infinite, which XLA's maximum may hide."""
    q, scale = int8.quantize_weight(weight, scheme)
    return q, jnp.where(all_finite(weight), scale, jnp.nan)


dequantize_weight = jax.jit(int8.dequantize_weight)

"""From checkpoint files to modules on the device, one layer at a time.

The network is built as shapes only (`nnx.eval_shape`), the checkpoint is checked against it as a whole, and then each
tensor goes from the memory-mapped file to the device. A stacked parameter `[layers, ...]` is filled in place, so that
neither the host nor the device ever holds the model twice. For a streamed model (`turbojax.models.streaming`) each
layer's large tensors go on to pinned host memory, one after the other.
"""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from tqdm import tqdm

from turbojax.errors import CheckpointError
from turbojax.kernels import int8
from turbojax.models.clip import CLIPConfig, CLIPVision
from turbojax.models.streaming import HostBlocks, Streamed, is_streamed, to_host
from turbojax.models.umt5 import UMT5Config, UMT5Encoder
from turbojax.models.vae import VAEConfig, WanVAE
from turbojax.models.wan import WanConfig, WanModel
from turbojax.weights.clip import clip_rules, clip_tensors, detect_clip_config
from turbojax.weights.files import CONVERTED
from turbojax.weights.io import ShapeDtype, file_metadata, load_orbax, read_tensors, release
from turbojax.weights.lora import Changes, Expert, LoRA, merge, read_loras
from turbojax.weights.published import Layout, clip_layout, umt5_layout, vae_layout, wan_layout
from turbojax.weights.rules import Entry, Rule, assign, describe, relaid, rename, shorten
from turbojax.weights.umt5 import detect_umt5_config, token_table, umt5_rules
from turbojax.weights.vae import detect_vae_config, vae_rules
from turbojax.weights.wan import clean_name, detect_wan_config, wan_rules

K = TypeVar("K")


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
                out.update({Entry(name, i): layer_of(spec) for i in range(spec.shape[0])})
            else:
                out[Entry(name, None)] = spec
        return out

    def abstract(self) -> Any:
        """The module with shapes and dtypes in place of its parameters, to trace and compile with."""
        return nnx.merge(self.graph, nnx.from_flat_state(list(self.variables.items())))

    def abstract_streamed(self) -> Streamed:
        """The streamed form of `abstract`."""
        specs: dict[str, Any] = dict(self.specs)
        for name, spec in self.specs.items():
            if is_stacked(name) and is_streamed(layer_of(spec)):
                specs[name] = [layer_of(spec)] * spec.shape[0]
        return self.fill_streamed(specs)

    def fill(self, arrays: Mapping[str, Any], *, streamed: bool = False) -> Any:
        """The module with these arrays as its parameters.

        streamed: its streamed form; what is streamed comes as a list, an array a layer.
        """
        if streamed:
            return self.fill_streamed(arrays)
        flat = [(path, variable.replace(arrays[dotted(path)])) for path, variable in self.variables.items()]
        return nnx.merge(self.graph, nnx.from_flat_state(flat))

    def fill_streamed(self, arrays: Mapping[str, Any]) -> Streamed:
        """`fill` for a streamed module."""
        outer: list[tuple] = []
        resident: list[tuple] = []
        count = next(spec.shape[0] for name, spec in self.specs.items() if is_stacked(name))
        layers: list[list[tuple]] = [[] for _ in range(count)]
        for path, variable in self.variables.items():
            array = arrays[dotted(path)]
            if path[0] != "blocks":
                outer.append((path, variable.replace(array)))
            elif isinstance(array, list):
                for layer, own in zip(layers, array, strict=True):
                    layer.append((path[1:], variable.replace(own)))
            else:
                resident.append((path[1:], variable.replace(array)))
        config, outer_graph, block_graph = self.structures()
        blocks = HostBlocks(block_graph, nnx.from_flat_state(resident), tuple(map(nnx.from_flat_state, layers)))
        return Streamed(config, outer_graph, nnx.from_flat_state(outer), blocks)

    def restructured(self, model: Streamed) -> Streamed:
        """A streamed model with its own arrays in this skeleton's structure."""
        config, outer, block = self.structures()
        return Streamed(config, outer, model.state, dataclasses.replace(model.blocks, graph=block))

    def structures(self) -> tuple[Any, nnx.GraphDef, nnx.GraphDef]:
        """The configuration, and the structures of the module without its blocks and of one block."""
        module = self.abstract()
        blocks = module.blocks
        del module.blocks
        return module.config, nnx.split(module)[0], nnx.split(blocks)[0]


def dotted(path: tuple) -> str:
    return ".".join(str(part) for part in path)


def is_stacked(name: str) -> bool:
    return name.startswith("blocks.")


def layer_of(spec: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """One layer of a stacked parameter."""
    return jax.ShapeDtypeStruct(spec.shape[1:], spec.dtype)


@functools.lru_cache(maxsize=16)
def wan_skeleton(config: WanConfig) -> Skeleton:
    return Skeleton.of(lambda: WanModel(config, rngs=nnx.Rngs(0)))


class LazyTensors(Mapping[K, np.ndarray]):
    """Tensors that are made when they are asked for; `specs` has the shapes and dtypes of all."""

    specs: Mapping[K, ShapeDtype]

    def __contains__(self, key: object) -> bool:
        return key in self.specs

    def __iter__(self) -> Iterator[K]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)


def specs_of(tensors: Mapping[K, np.ndarray]) -> Mapping[K, ShapeDtype]:
    """Shapes and dtypes, without reading: memory-mapped arrays know their own."""
    return tensors.specs if isinstance(tensors, LazyTensors) else tensors


@functools.lru_cache(maxsize=16)
def vae_skeleton(config: VAEConfig) -> Skeleton:
    return Skeleton.of(lambda: WanVAE(config, rngs=nnx.Rngs(0)))


@functools.lru_cache(maxsize=16)
def umt5_skeleton(config: UMT5Config) -> Skeleton:
    return Skeleton.of(lambda: UMT5Encoder(config, rngs=nnx.Rngs(0)))


@functools.lru_cache(maxsize=16)
def clip_skeleton(config: CLIPConfig) -> Skeleton:
    return Skeleton.of(lambda: CLIPVision(config, rngs=nnx.Rngs(0)))


class WanCheckpoint(NamedTuple):
    """A transformer checkpoint, checked against its own configuration; nothing has been read yet."""

    config: WanConfig
    tensors: Mapping[Entry, np.ndarray]
    what: str
    stacked: bool = False  # whether the layers of a parameter lie together, and are best read one after another


class Stacks(LazyTensors[Entry]):
    """The tensors of a folder that `scripts/convert.py --format=orbax` wrote, cut out of its stacked arrays.

    An array is read as a whole and the last two are kept: ask for the layers of one after another.
    """

    def __init__(self, folder: Path, skeleton: Skeleton):
        self.skeleton, self.specs = skeleton, skeleton.entries()
        self._array = functools.lru_cache(maxsize=2)(lambda name: load_array(folder, name, skeleton.specs[name]))

    def __getitem__(self, entry: Entry) -> np.ndarray:
        if entry not in self.specs:
            raise KeyError(entry)
        array = self._array(entry.target)
        return array if entry.layer is None else array[entry.layer]


def open_wan(path: str | os.PathLike) -> WanCheckpoint:
    """Opens a transformer checkpoint, converted or in any of the published layouts, and checks it as a whole.

    Raises CheckpointError with all missing, unknown and misshapen names.
    """
    if is_converted(path):
        return open_converted(Path(path))
    return check_wan(read_tensors(path), num_heads=published_num_heads(path), what=Path(path).name)


def check_wan(tensors: Mapping[str, np.ndarray], *, num_heads: int | None, what: str) -> WanCheckpoint:
    """Names and shapes of a transformer's tensors, checked as a whole; see `open_wan`."""
    tensors = {clean_name(name): tensor for name, tensor in tensors.items()}
    rules = wan_rules(tensors, what=what)
    quantized = any(name.endswith((".int8_weight", ".scale")) for name in tensors)
    shapes = renamed_shapes(tensors, rules)
    config = detect_wan_config(shapes, quantized=quantized, num_heads=num_heads, what=what)
    expected = {entry: spec.shape for entry, spec in wan_skeleton(config).entries().items()}
    found = assign(tensors, rules, expected, what=what, published=wan_layout(config))
    return WanCheckpoint(config, found, what)


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


def with_options(
    config: WanConfig, *, quant_linear: bool | None = None, quant_scheme: str | None = None, **changes: Any
) -> WanConfig:
    """The checkpoint's configuration with what the user asked for; None keeps what the checkpoint says."""
    changes = {name: value for name, value in changes.items() if value is not None}
    if quant_linear is False:
        changes["quant"] = None
    elif quant_linear or config.quant:
        named = int8.quant_scheme(quant_scheme) if quant_scheme else None
        changes["quant"] = named or config.quant or int8.QuantConfig()
    return dataclasses.replace(config, **changes)


def is_converted(path: str | os.PathLike) -> bool:
    """Whether this is a folder that `scripts/convert.py --format=orbax` wrote."""
    return (Path(path) / CONVERTED).is_file()


def load_wan(
    path: str | os.PathLike,
    *,
    quant_linear: bool | None = None,
    quant_scheme: str | None = None,
    attention_type: str | None = None,
    sla_topk: float | None = None,
    sage_values: str | None = None,
    dtype: Any = jnp.bfloat16,
    streamed: bool = False,
    loras: Sequence[LoRA] = (),
    expert: Expert | None = None,
) -> WanModel | Streamed:
    """Loads a transformer; options that are None follow the checkpoint.

    quant_linear: True quantizes a bfloat16 checkpoint while it loads, False dequantizes an int8 one.
    quant_scheme: a name of `int8.QUANT_SCHEMES`; "block128" unless the checkpoint has another.
    streamed: leave the blocks in host memory, see `turbojax.models.streaming`.
    loras: merged in float32, before quantization. expert: which of two networks this is, as far as they are concerned.
    """
    options: dict[str, Any] = dict(
        quant_linear=quant_linear,
        quant_scheme=quant_scheme,
        attention_type=attention_type,
        sla_topk=sla_topk,
        sage_values=sage_values,
        dtype=dtype,
    )
    checkpoint = open_wan(path)
    changes = read_loras(loras, checkpoint.config, expert=expert)
    skeleton = wan_skeleton(with_options(checkpoint.config, **options))
    as_stored = isinstance(checkpoint.tensors, Stacks) and skeleton.specs == checkpoint.tensors.skeleton.specs
    if as_stored and not (changes or streamed):
        return skeleton.fill(load_arrays(Path(path), skeleton))
    return build_wan(checkpoint, changes, streamed=streamed, **options)


def build_wan(
    checkpoint: WanCheckpoint, changes: Changes | None = None, *, streamed: bool = False, **options: Any
) -> WanModel | Streamed:
    """The network of a checked checkpoint, with the changes of LoRAs; options as `load_wan` takes them."""
    config = with_options(checkpoint.config, **options)
    skeleton = wan_skeleton(config)
    arrays = place(skeleton, Pieces(checkpoint, config, changes or {}), what=checkpoint.what, streamed=streamed)
    model = skeleton.fill(arrays, streamed=streamed)
    log_quantization(checkpoint.config, config, skeleton)
    return model


def log_quantization(stored: WanConfig, config: WanConfig, skeleton: Skeleton) -> None:
    """What was done to the linear layers, with the bytes of the whole network before and after."""
    if scheme(stored) == scheme(config):
        return
    before = sum(
        s.size * s.dtype.itemsize for s in wan_skeleton(dataclasses.replace(config, quant=None)).specs.values()
    )
    after = sum(s.size * s.dtype.itemsize for s in skeleton.specs.values())
    count = sum(
        s.shape[0] for name, s in skeleton.specs.items() if QUANTIZED.fullmatch(name) and name.endswith("weight")
    )
    if config.quant is None:
        logging.info("Dequantized %d linear layers to %s", count, jnp.dtype(config.dtype).name)
    else:
        sizes = (config.quant.scheme, before / 1e9, after / 1e9)
        logging.info("Quantized %d linear layers (%s): %.1f GB -> %.1f GB", count, *sizes)


@dataclasses.dataclass(frozen=True)
class Pieces:
    """The tensors in the form that a configuration wants: quantized, dequantized, with or without SLA, with LoRAs."""

    checkpoint: WanCheckpoint
    config: WanConfig
    changes: Changes = dataclasses.field(default_factory=dict)

    def __call__(self, entry: Entry) -> Any:
        if ".proj_l." in entry.target and entry not in self.checkpoint.tensors:
            return self.untrained_projection(entry)
        linear = QUANTIZED.fullmatch(entry.target)
        if linear is None:
            return self.changed(entry, self.checkpoint.tensors[entry])
        merges = Entry(f"{linear['name']}.weight", entry.layer) in self.changes
        if not merges and scheme(self.checkpoint.config) == scheme(self.config):
            return self.checkpoint.tensors[entry]
        weight = self.weight(linear["name"], entry.layer)
        if self.config.quant is None:
            return weight
        q, scale = quantize_weight(weight, self.config.quant.scheme)
        if linear["part"] == "scale":
            return scale
        logging.debug("Quantized %s (%s)", describe(entry), self.config.quant.scheme)
        return q

    def weight(self, name: str, layer: int | None) -> Any:
        """A linear layer's weight as numbers."""
        entry = Entry(f"{name}.weight", layer)
        stored = self.checkpoint.tensors[entry]
        if self.checkpoint.config.quant is not None:
            stored = dequantize_weight(stored, self.checkpoint.tensors[Entry(f"{name}.scale", layer)])
        return self.changed(entry, stored)

    def changed(self, entry: Entry, stored: Any) -> Any:
        changes = self.changes.get(entry)
        return merge(stored, changes) if changes else stored

    def untrained_projection(self, entry: Entry) -> np.ndarray:
        if entry == Entry("blocks.self_attn.proj_l.weight", 0):
            logging.warning("%s was not trained with SLA: proj_l starts at zero", self.checkpoint.what)
        size = self.config.head_dim
        return np.zeros((size, size) if entry.target.endswith("weight") else size, np.float32)


# Weights and scales of the int8 linear layers: all in the blocks but `proj_l`.
QUANTIZED = re.compile(r"(?P<name>blocks\.(self_attn|cross_attn|ffn)\.(?!norm|proj_l)\w+)\.(?P<part>weight|scale)")


def scheme(config: WanConfig) -> str | None:
    return None if config.quant is None else config.quant.scheme


@functools.partial(jax.jit, static_argnums=1)
def quantize_weight(weight: jax.Array, scheme: int8.Scheme) -> tuple[jax.Array, jax.Array]:
    """int8 weight and scales; scales are NaN where any weight is NaN or infinite, which XLA's maximum may hide."""
    q, scale = int8.quantize_weight(weight, scheme)
    return q, jnp.where(all_finite(weight), scale, jnp.nan)


dequantize_weight = jax.jit(int8.dequantize_weight)


@functools.partial(jax.jit, donate_argnums=0)
def write_layer(stack: jax.Array, layer: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, layer.astype(stack.dtype), index, 0)


@jax.jit
def all_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()


SMALL_BYTES = 2**22  # parameters up to this size are put together by numpy: compiling for each shape takes longer


def place(
    skeleton: Skeleton, piece: Callable[[Entry], Any], *, what: str, streamed: bool = False
) -> dict[str, jax.Array | list[jax.Array]]:
    """Puts every parameter on the device, one tensor of the checkpoint at a time, with a progress bar in bytes.

    streamed: large parameters of the blocks become lists of arrays in host memory, one a layer.

    Raises CheckpointError naming the parameters that hold NaN or infinity.
    """
    total = sum(spec.size * spec.dtype.itemsize for spec in skeleton.specs.values())
    arrays: dict[str, jax.Array | list[jax.Array]] = {}
    finite = {}
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"Loading {what}", disable=None, leave=False) as bar:

        def values(name: str, spec: jax.ShapeDtypeStruct, small: bool) -> Iterator[tuple[int | None, Any]]:
            """The parameter's layers, or (None, the whole of it); read when asked for."""
            layers = range(spec.shape[0]) if is_stacked(name) else [None]
            for layer in layers:
                stored = piece(Entry(name, layer))
                # jnp.asarray would compile a program for each shape.
                value = np.asarray(stored) if small else jax.device_put(stored, may_alias=False)
                if jnp.issubdtype(value.dtype, jnp.floating):
                    finite[Entry(name, layer)] = np.isfinite(value).all() if small else all_finite(value)
                yield layer, value
                if isinstance(stored, np.ndarray):
                    release(stored)
                bar.update(spec.size * spec.dtype.itemsize // len(layers))

        for name, spec in skeleton.specs.items():
            if streamed and is_stacked(name) and is_streamed(layer_of(spec)):
                arrays[name] = layers_on_host(spec, values(name, spec, small=False))
                continue
            small = spec.size * spec.dtype.itemsize <= SMALL_BYTES
            arrays[name] = (stack_on_host if small else stack_on_device)(spec, values(name, spec, small))
    bad = [describe(entry) for entry, ok in finite.items() if not ok]
    if bad:
        raise CheckpointError(f"{what} holds NaN or infinity in {shorten(bad)}; download it again")
    return arrays


def layers_on_host(spec: jax.ShapeDtypeStruct, values: Iterator[tuple[int | None, jax.Array]]) -> list[jax.Array]:
    """Each waited for, so that the device holds one at a time."""
    return [jax.block_until_ready(to_host(value.astype(spec.dtype))) for _, value in values]


def stack_on_host(spec: jax.ShapeDtypeStruct, values: Iterator[tuple[int | None, np.ndarray]]) -> jax.Array:
    array = np.empty(spec.shape, spec.dtype)
    for layer, value in values:
        array[... if layer is None else layer] = value
    return jax.device_put(array)


def stack_on_device(spec: jax.ShapeDtypeStruct, values: Iterator[tuple[int | None, jax.Array]]) -> jax.Array:
    array = None
    for layer, value in values:
        if layer is None:
            array = value.astype(spec.dtype)
        else:
            array = write_layer(jnp.zeros(spec.shape, spec.dtype) if array is None else array, value, layer)
    assert array is not None
    return array


def open_converted(path: Path) -> WanCheckpoint:
    """Opens a transformer that `scripts/convert.py --format=orbax` wrote."""
    try:
        fields = json.loads((path / CONVERTED).read_text())
        quant = int8.QuantConfig(**fields["quant"]) if fields["quant"] else None
        blocks = fields["sla_blocks"] and tuple(fields["sla_blocks"])
        changes = {
            "patch": tuple(fields["patch"]),
            "sla_blocks": blocks,
            "dtype": jnp.dtype(fields["dtype"]),
            "quant": quant,
        }
        config = WanConfig(**(fields | changes))
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path / CONVERTED} is damaged: {error}; convert the checkpoint again") from error
    return WanCheckpoint(config, Stacks(path, wan_skeleton(config)), path.name, stacked=True)


def load_array(folder: Path, name: str, spec: jax.ShapeDtypeStruct) -> Any:
    """An array of a converted folder: on the host, or where the sharding of `spec` says."""
    return load_orbax(folder / "arrays" / name, {name: spec})[name]


def load_arrays(folder: Path, skeleton: Skeleton) -> dict[str, Any]:
    """The arrays of a converted folder, one after the other straight to the device."""
    total = sum(spec.size * spec.dtype.itemsize for spec in skeleton.specs.values())
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    arrays: dict[str, Any] = {}
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"Loading {folder.name}", disable=None, leave=False) as bar:
        for name, spec in skeleton.specs.items():
            wanted = jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=device)
            arrays[name] = load_array(folder, name, wanted)
            bar.update(spec.size * spec.dtype.itemsize)
    return arrays


class PlainCheckpoint(NamedTuple):
    """A VAE or text encoder, checked against its own configuration; nothing has been read yet."""

    skeleton: Skeleton
    tensors: dict[Entry, np.ndarray]


@contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Puts the file's name in front of what is wrong with it."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{Path(path).name}: {error}") from error


def open_vae(path: str | os.PathLike, *, dtype: Any = jnp.bfloat16) -> PlainCheckpoint:
    """Opens a Wan 2.1 VAE, official or diffusers names; raises CheckpointError with all that does not fit."""
    tensors = read_tensors(path)
    with naming(path):
        config: VAEConfig = dataclasses.replace(detect_vae_config(tensors), dtype=dtype)
        return check_plain(vae_skeleton(config), tensors, vae_rules(tensors), vae_layout(config))


def open_umt5(path: str | os.PathLike, *, dtype: Any = jnp.bfloat16) -> PlainCheckpoint:
    """Opens a umT5 encoder, official or transformers' names; raises CheckpointError with all that does not fit."""
    tensors = read_tensors(path)
    with naming(path):
        config: UMT5Config = dataclasses.replace(detect_umt5_config(tensors), dtype=dtype)
        return check_plain(umt5_skeleton(config), tensors, umt5_rules(tensors), umt5_layout(config))


def open_clip(path: str | os.PathLike, *, dtype: Any = jnp.float16) -> PlainCheckpoint:
    """Opens a CLIP image encoder, official or transformers' names; raises CheckpointError as the others do."""
    tensors = read_tensors(path)
    with naming(path):
        config: CLIPConfig = dataclasses.replace(detect_clip_config(tensors), dtype=dtype)
        return check_plain(
            clip_skeleton(config), clip_tensors(tensors, config.num_layers), clip_rules(tensors), clip_layout(config)
        )


def check_plain(
    skeleton: Skeleton, tensors: Mapping[str, np.ndarray], rules: Iterable[Rule], layout: Layout
) -> PlainCheckpoint:
    """Every parameter's tensor; raises CheckpointError with all that is missing, unknown or misshapen."""
    expected = {entry: spec.shape for entry, spec in skeleton.entries().items()}
    return PlainCheckpoint(skeleton, assign(tensors, rules, expected, what="the checkpoint", published=layout))


def load_vae(path: str | os.PathLike, *, dtype: Any = jnp.bfloat16) -> WanVAE:
    """Loads a Wan 2.1 VAE, official or diffusers names."""
    return load_plain(open_vae(path, dtype=dtype), what=Path(path).name)


def load_umt5(
    path: str | os.PathLike, *, dtype: Any = jnp.bfloat16, streamed: bool = False
) -> tuple[UMT5Encoder | Streamed, np.ndarray]:
    """Loads a umT5 encoder; returns it and its token table `[vocab, D]`, which stays in the memory-mapped file."""
    encoder = load_plain(open_umt5(path, dtype=dtype), what=Path(path).name, streamed=streamed)
    return encoder, token_table(read_tensors(path))


def load_clip(path: str | os.PathLike, *, dtype: Any = jnp.float16) -> CLIPVision:
    """Loads a CLIP image encoder, official or transformers' names."""
    return load_plain(open_clip(path, dtype=dtype), what=Path(path).name)


def load_plain(checkpoint: PlainCheckpoint, *, what: str, streamed: bool = False) -> Any:
    """A module whose parameters are the checkpoint's tensors as they are."""
    skeleton, tensors = checkpoint
    return skeleton.fill(place(skeleton, tensors.__getitem__, what=what, streamed=streamed), streamed=streamed)

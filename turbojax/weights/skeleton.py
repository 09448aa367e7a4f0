"""Networks as shapes only (`nnx.eval_shape`): to check checkpoints against, to compile with, to fill with arrays."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx

from turbojax.models.clip import CLIPConfig, CLIPVision
from turbojax.models.offload import HostBlocks, Streamed, is_streamed
from turbojax.models.umt5 import UMT5Config, UMT5Encoder
from turbojax.models.vae import VAEConfig, WanVAE
from turbojax.models.wan import WanConfig, WanModel
from turbojax.weights.rules import TensorKey


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

    def tensor_specs(self) -> dict[TensorKey, jax.ShapeDtypeStruct]:
        """One spec for each tensor of the checkpoint: stacked parameters are counted a layer at a time."""
        out = {}
        for name, spec in self.specs.items():
            if is_stacked(name):
                out.update({TensorKey(name, i): layer_of(spec) for i in range(spec.shape[0])})
            else:
                out[TensorKey(name, None)] = spec
        return out

    @property
    def layer_specs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """One layer of each stacked parameter, by the parameter's name."""
        return {name: layer_of(spec) for name, spec in self.specs.items() if is_stacked(name)}

    @property
    def num_layers(self) -> int:
        return next(spec.shape[0] for name, spec in self.specs.items() if is_stacked(name))

    def abstract(self) -> Any:
        """The module with shapes and dtypes in place of its parameters, to trace and compile with."""
        return nnx.merge(self.graph, nnx.from_flat_state(list(self.variables.items())))

    def abstract_streamed(self) -> Streamed:
        """The streamed form of `abstract`."""
        layers = {name: [spec] * self.num_layers for name, spec in self.layer_specs.items() if is_streamed(spec)}
        return self.fill({**self.specs, **layers}, streamed=True)

    def fill(self, arrays: Mapping[str, Any], *, streamed: bool = False) -> Any:
        """The module with these arrays as its parameters.

        streamed: its streamed form; what is streamed comes as a list, an array a layer.
        """
        if not streamed:
            flat = [(path, variable.replace(arrays[dotted(path)])) for path, variable in self.variables.items()]
            return nnx.merge(self.graph, nnx.from_flat_state(flat))
        outer: list[tuple] = []
        resident: list[tuple] = []
        layers: list[list[tuple]] = [[] for _ in range(self.num_layers)]
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


def skeletons_of(module: Callable[..., nnx.Module]) -> Callable[[Any], Skeleton]:
    """The skeletons of a kind of network by its configuration; the last few are kept."""
    return functools.lru_cache(maxsize=16)(lambda config: Skeleton.of(lambda: module(config, rngs=nnx.Rngs(0))))


wan_skeleton: Callable[[WanConfig], Skeleton] = skeletons_of(WanModel)
vae_skeleton: Callable[[VAEConfig], Skeleton] = skeletons_of(WanVAE)
umt5_skeleton: Callable[[UMT5Config], Skeleton] = skeletons_of(UMT5Encoder)
clip_skeleton: Callable[[CLIPConfig], Skeleton] = skeletons_of(CLIPVision)

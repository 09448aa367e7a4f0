"""Two networks that share the steps of one video, Wan 2.2's experts for high and for low noise, on one device.

Where both fit, or are streamed, they stay. Otherwise they are swapped, and the inactive one is in pinned host memory:
what fits beside the active one is prefetched while that computes, the rest is copied at the swap.
"""

import dataclasses
import itertools
import time
from typing import Any

import jax
from absl import logging
from flax import nnx

from turbojax.diffusion import Sampler, expert_split
from turbojax.errors import UserError
from turbojax.memory.planner import memory_stats
from turbojax.models.offload import (
    ArraysByMemory,
    Streamed,
    arrays_by_memory,
    in_host_memory,
    memory_sharding,
    offload_embeddings,
    to_pinned_host,
)
from turbojax.models.wan import WanConfig, WanModel
from turbojax.weights.lora import Expert

Model = WanModel | Streamed
NAMES: tuple[Expert, ...] = ("high", "low")  # in the order of their steps
SLACK = 2**30  # bytes of the device left free beside what is known to be needed
BOUNDARY = 0.9  # rectified-flow time at which Wan 2.2 image to video changes experts


class SwappableNetwork:
    """A network whose parameters are on the device, in pinned host memory, or in both.

    Those that are in host memory from the start, see `turbojax.models.offload`, stay there.
    """

    def __init__(self, model: WanModel):
        self.config = model.config
        self.graph, state = nnx.split(model)
        leaves, self.structure = jax.tree.flatten(state)
        self.device: list[Any] = leaves
        self.host: list[Any] = [None] * len(leaves)
        self.swapped = [i for i, leaf in enumerate(leaves) if not in_host_memory(leaf)]

    @property
    def model(self) -> WanModel:
        """The network, all of whose parameters must be on the device."""
        assert all(leaf is not None for leaf in self.device)
        return nnx.merge(self.graph, jax.tree.unflatten(self.structure, self.device))

    def copy_to_host(self) -> None:
        """Copies the parameters, so that a later `offload` only frees the device's."""
        for i in self.swapped:
            self._copy_to_host(i)

    def offload(self) -> None:
        """Frees the device's memory; the parameters are in host memory then."""
        for i in self.swapped:
            self._offload(i)

    def prefetch(self, size: int) -> None:
        """Starts to copy parameters to the device, up to `size` bytes of them, and does not wait."""
        for i, leaf in enumerate(self.host):
            if self.device[i] is None and leaf.nbytes <= size:
                self.device[i] = jax.device_put(leaf, memory_sharding(None))
                size -= leaf.nbytes

    def swap_with(self, other: "SwappableNetwork | None", *, keep_on_host: bool) -> None:
        """Comes to the device and offloads the other, a parameter at a time: the device never holds both.

        keep_on_host: leave the parameters in host memory, too, so that the next swap copies only the other's.
        """
        for i in self.swapped:
            if other:
                other._offload(i)
            if self.device[i] is None:
                self.device[i] = jax.device_put(self.host[i], memory_sharding(None))
            if not keep_on_host and self.host[i] is not None:
                self.device[i].block_until_ready()
                self.host[i].delete()
                self.host[i] = None
        jax.block_until_ready(self.device)

    def _copy_to_host(self, i: int) -> None:
        if self.host[i] is None:
            self.host[i] = to_pinned_host(self.device[i]).block_until_ready()

    def _offload(self, i: int) -> None:
        if self.device[i] is not None:
            self._copy_to_host(i)
            self.device[i].delete()
            self.device[i] = None


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class Experts:
    """The network of all steps, or Wan 2.2's two: "high" for the noise levels from `boundary` on, "low" below it.

    swap_experts: one is on the device at a time. Host memory then keeps both if they are int8, so that a swap is one
    copy, else only the inactive one. embeddings_offloaded: embeddings of text and time are in host memory, see
    `turbojax.models.offload`. limit: bytes of the device that may be taken, None for all.
    """

    names: tuple[Expert, ...] = NAMES
    boundary: float = BOUNDARY
    swap_experts: bool = False
    embeddings_offloaded: bool = False
    limit: int | None = None
    _models: dict[Expert, Model] = dataclasses.field(default_factory=dict, init=False)  # where all stay
    _networks: dict[Expert, SwappableNetwork] = dataclasses.field(default_factory=dict, init=False)  # where swapped
    _active: SwappableNetwork | None = dataclasses.field(default=None, init=False)

    @classmethod
    def of(cls, model: Model) -> "Experts":
        """Makes a single network the expert of all steps."""
        experts = cls(names=("high",))
        experts.add("high", model)
        return experts

    def add(self, name: Expert, model: Model) -> None:
        """Adds a network that was loaded, the last steps' first: where they are swapped it is offloaded at once."""
        if (self._models or self._networks) and self.config != model.config:
            raise UserError("the two experts are of different kinds; give both plain or both quantized files")
        if isinstance(model, WanModel):
            model = self.with_offloading(model)
        if not self.swap_experts:
            self._models[name] = model
            return
        assert isinstance(model, WanModel)
        network = self._networks[name] = SwappableNetwork(model)
        if self.keeps_both_on_host:
            network.copy_to_host()
        if name == self.names[0]:
            self._active = network
        else:
            network.offload()

    def with_offloading(self, network: WanModel) -> WanModel:
        """Returns a network, which may be abstract, with its embeddings where these networks have theirs."""
        return offload_embeddings(network) if self.embeddings_offloaded else network

    @property
    def config(self) -> WanConfig:
        """The configuration of all of them."""
        return next(iter((self._models or self._networks).values())).config

    @property
    def streamed(self) -> bool:
        return any(isinstance(model, Streamed) for model in self._models.values())

    @property
    def keeps_both_on_host(self) -> bool:
        """True if host memory holds both networks where they are swapped; never two of full precision."""
        return self.config.quant is not None

    def step_ranges(self, sampler: Sampler) -> list[tuple[Expert, tuple[int, int]]]:
        """Returns the networks and the steps [start, stop) that each of them makes."""
        n = sampler.num_steps
        if len(self.names) == 1:
            return [(self.names[0], (0, n))]
        k = expert_split(sampler.times, self.boundary)
        steps: list[tuple[Expert, tuple[int, int]]] = [("high", (0, k)), ("low", (k, n))]
        return [(name, part) for name, part in steps if part[0] < part[1]]

    def activate(self, name: Expert) -> Model:
        """Returns the network once it is on the device. Nothing that uses the other one may still run."""
        if not self.swap_experts:
            return self._models[name]
        network = self._networks[name]
        if self._active is not network:
            start = time.perf_counter()
            network.swap_with(self._active, keep_on_host=self.keeps_both_on_host)
            self._active = network
            logging.info("The %s-noise expert came to the device in %.2f s", name, time.perf_counter() - start)
        return network.model

    def prefetch(self, name: Expert, size: int) -> None:
        """Starts to copy an inactive network, up to `size` bytes of it."""
        if self.swap_experts:
            self._networks[name].prefetch(size)

    def release(self) -> None:
        """Frees the device after the last step if that costs nothing, as the next video begins with the other one."""
        if self.swap_experts and self.keeps_both_on_host and self._active:
            self._active.offload()
            self._active = None

    def arrays_by_memory(self) -> ArraysByMemory:
        """Returns all arrays of the networks on the device and in host memory."""
        found = [arrays_by_memory(model) for model in self._models.values()]
        found += [ArraysByMemory.of((network.device, network.host)) for network in self._networks.values()]
        return ArraysByMemory(*(list(itertools.chain(*arrays)) for arrays in zip(*found, strict=True)))

    def free_beside(self, program: jax.stages.Compiled) -> int:
        """Returns the bytes of the device that are free while the program runs; 0 where the device does not say."""
        stats, needs = memory_stats(), program.memory_analysis()
        if "bytes_limit" not in stats or needs is None:
            return 0
        limit = min(stats["bytes_limit"], self.limit or stats["bytes_limit"])
        return max(0, limit - stats["bytes_in_use"] - needs.temp_size_in_bytes - needs.output_size_in_bytes - SLACK)

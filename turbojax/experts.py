"""Two networks that share the steps of one video, Wan 2.2's experts for high and for low noise, on one device.

Where both fit they stay. Otherwise one is on the device and the other in pinned host memory, which the device's copy
engine reads by itself: as much of it as there is room for travels while the first one computes, the rest at the change.
"""

import time
from typing import Any

import jax
from absl import logging
from flax import nnx

from turbojax.diffusion import Sampler, expert_split
from turbojax.errors import UserError
from turbojax.models.wan import WanConfig, WanModel
from turbojax.weights.lora import Expert

NAMES: tuple[Expert, ...] = ("high", "low")  # in the order of their steps
SLACK = 2**30  # bytes of the device left free beside what is known to be needed
BOUNDARY = 0.9  # rectified-flow time at which Wan 2.2 image to video changes experts


class Network:
    """A network whose parameters are on the device, in pinned host memory, or in both."""

    def __init__(self, model: WanModel):
        self.config = model.config
        self.graph, state = nnx.split(model)
        leaves, self.structure = jax.tree.flatten(state)
        self.device: list[Any] = leaves
        self.host: list[Any] = [None] * len(leaves)

    @property
    def model(self) -> WanModel:
        """The network, which must be here."""
        assert all(leaf is not None for leaf in self.device)
        return nnx.merge(self.graph, jax.tree.unflatten(self.structure, self.device))

    def copy_to_host(self) -> None:
        """So that leaving costs nothing."""
        for i in range(len(self.device)):
            self._to_host(i)

    def leave(self) -> None:
        """Frees the device's memory."""
        for i in range(len(self.device)):
            self._leave(i)

    def fetch(self, room: int) -> None:
        """Starts to copy parameters to the device, up to `room` bytes of them, and does not wait."""
        for i, leaf in enumerate(self.host):
            if self.device[i] is None and leaf.nbytes <= room:
                self.device[i] = jax.device_put(leaf, memory())
                room -= leaf.nbytes

    def take_the_place_of(self, other: "Network", *, keep: bool) -> None:
        """Comes to the device and sends the other away, a parameter at a time: the device never holds both.

        keep: leave the parameters in host memory, too, so that this network's leaving will cost nothing.
        """
        for i in range(len(self.device)):
            other._leave(i)
            if self.device[i] is None:
                self.device[i] = jax.device_put(self.host[i], memory())
            if not keep and self.host[i] is not None:
                self.device[i].block_until_ready()
                self.host[i].delete()
                self.host[i] = None
        jax.block_until_ready(self.device)

    def _to_host(self, i: int) -> None:
        if self.host[i] is None:
            self.host[i] = jax.device_put(self.device[i], memory("pinned_host")).block_until_ready()

    def _leave(self, i: int) -> None:
        if self.device[i] is not None:
            self._to_host(i)
            self.device[i].delete()
            self.device[i] = None


class Experts:
    """The network of all steps, or Wan 2.2's two: "high" for the noise levels from `boundary` on, "low" below it.

    resident: both stay on the device. Otherwise one is there at a time, and host memory keeps both if they are int8, so
    that a change is one copy, else only the one that is away.
    """

    def __init__(self, *, names: tuple[Expert, ...] = NAMES, boundary: float = BOUNDARY, resident: bool = True):
        self.names, self.boundary, self.resident = names, boundary, resident
        self.networks: dict[Expert, Network] = {}
        self._last: Network | None = None  # the one on the device, where there is one at a time

    @classmethod
    def of(cls, model: WanModel) -> "Experts":
        """A single network for all steps."""
        experts = cls(names=("high",))
        experts.add("high", model)
        return experts

    def add(self, name: Expert, model: WanModel) -> None:
        """Adds a network that is on the device, those needed later first: without room for both they leave at once."""
        for other in self.networks.values():
            if other.config != model.config:
                raise UserError("the two experts are of different kinds; give both plain or both quantized files")
        network = self.networks[name] = Network(model)
        if self.resident:
            return
        if self.keeps:
            network.copy_to_host()
        if name == self.names[0]:
            self._last = network
        else:
            network.leave()

    @property
    def config(self) -> WanConfig:
        return next(iter(self.networks.values())).config

    @property
    def keeps(self) -> bool:
        """Whether host memory holds both networks; never two of full precision."""
        return self.config.quant is not None

    def parts(self, sampler: Sampler) -> list[tuple[Expert, tuple[int, int]]]:
        """Which network makes which steps [start, stop)."""
        n = sampler.num_steps
        if len(self.names) == 1:
            return [(self.names[0], (0, n))]
        k = expert_split(sampler.times, self.boundary)
        steps: list[tuple[Expert, tuple[int, int]]] = [("high", (0, k)), ("low", (k, n))]
        return [(name, part) for name, part in steps if part[0] < part[1]]

    def bring(self, name: Expert) -> WanModel:
        """The network, on the device; waits for it. Nothing that uses the other one may still run."""
        network = self.networks[name]
        if self._last not in (None, network):
            start = time.perf_counter()
            network.take_the_place_of(self._last, keep=self.keeps)
            logging.info("The %s-noise expert came to the device in %.2f s", name, time.perf_counter() - start)
            self._last = network
        return network.model

    def prefetch(self, name: Expert, room: int) -> None:
        """Starts to copy a network that is away, as much of it as fits in `room` bytes of the device."""
        if not self.resident:
            self.networks[name].fetch(room)

    def bytes_by_place(self) -> dict[str, int]:
        """Bytes of parameters on the "device" and in "host" memory."""
        places: dict[str, list] = {"device": [], "host": []}
        for network in self.networks.values():
            places["device"] += network.device
            places["host"] += network.host
        return {place: sum(leaf.nbytes for leaf in leaves if leaf is not None) for place, leaves in places.items()}


def both_fit(weight_bytes: int) -> bool:
    """Whether two networks of so many bytes leave a quarter of the device's memory to all else."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    return limit is None or 2 * weight_bytes <= 0.75 * limit


def room_beside(program: jax.stages.Compiled) -> int:
    """Bytes of the device that are free now and are not needed while the program runs; 0 where nothing tells."""
    stats, needs = jax.devices()[0].memory_stats() or {}, program.memory_analysis()
    if "bytes_limit" not in stats or needs is None:
        return 0
    own = needs.temp_size_in_bytes + needs.output_size_in_bytes
    return max(0, stats["bytes_limit"] - stats["bytes_in_use"] - own - SLACK)


def memory(kind: str | None = None) -> jax.sharding.Sharding:
    """Memory of the first device; None for its own."""
    return jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind=kind)

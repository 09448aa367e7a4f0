"""Two networks that share the steps of one video, Wan 2.2's experts for high and for low noise, on one device.

Where both fit they stay. Otherwise one is on the device and the other in pinned host memory, which the device's copy
engine reads by itself: as much of it as there is room for travels while the first one computes, the rest at the change.
"""

import time
from typing import Any, Literal

import jax
from absl import logging
from flax import nnx

from turbojax.diffusion import Sampler, expert_split
from turbojax.errors import UserError
from turbojax.models.wan import WanConfig, WanModel

Expert = Literal["high", "low"]
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
    room: bytes of the device that the network which comes next may take while the other one computes.
    """

    def __init__(self, *, boundary: float = BOUNDARY, resident: bool = True, room: int = 0):
        self.boundary, self.resident, self.room = boundary, resident, room
        self.networks: dict[Expert, Network] = {}
        self._last: Network | None = None  # the one on the device, where there is one at a time

    def add(self, name: Expert, model: WanModel) -> None:
        """Adds a network that is on the device, "low" before "high": without room for both the first one leaves."""
        for other in self.networks.values():
            if other.config != model.config:
                raise UserError("the two experts are of different kinds; give both plain or both quantized files")
            if not self.resident:
                other.leave()
        network = self.networks[name] = self._last = Network(model)
        if not self.resident and self.keeps:
            network.copy_to_host()

    @property
    def config(self) -> WanConfig:
        return next(iter(self.networks.values())).config

    @property
    def keeps(self) -> bool:
        """Whether host memory holds both networks; never two of full precision."""
        return self.config.quant is not None

    def parts(self, sampler: Sampler, boundary: float | None = None) -> list[tuple[Expert, int, int]]:
        """Which network makes which steps [start, stop)."""
        if "low" not in self.networks:
            return [("high", 0, sampler.num_steps)]
        k = expert_split(sampler.times, self.boundary if boundary is None else boundary)
        parts: list[tuple[Expert, int, int]] = [("high", 0, k), ("low", k, sampler.num_steps)]
        return [part for part in parts if part[1] < part[2]]

    def bring(self, name: Expert) -> WanModel:
        """The network, on the device; waits for it. Nothing that uses the other one may still run."""
        network = self.networks[name]
        if not self.resident and self._last is not None and self._last is not network:
            start = time.perf_counter()
            network.take_the_place_of(self._last, keep=self.keeps)
            logging.info("The %s-noise expert came to the device in %.2f s", name, time.perf_counter() - start)
        self._last = network
        return network.model

    def prefetch(self, name: Expert) -> None:
        """Starts to copy a network that is not here, as far as there is room; to be called before the other runs."""
        self.networks[name].fetch(self.room)

    def bytes_by_place(self) -> dict[str, int]:
        """Bytes of parameters on the "device" and in "host" memory."""
        places: dict[str, list] = {"device": [], "host": []}
        for network in self.networks.values():
            places["device"] += network.device
            places["host"] += network.host
        return {place: sum(leaf.nbytes for leaf in leaves if leaf is not None) for place, leaves in places.items()}


def memory(kind: str | None = None) -> jax.sharding.Sharding:
    """Memory of the first device; None for its own."""
    return jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind=kind)

"""The memory planner: what each stage of a call needs of a card, and what to keep on the card for it.

    configs = ModelConfigs(WanConfig.t2v_14b(quant=QuantConfig()), VAEConfig.wan2_1(), UMT5Config.xxl())
    print(plan(configs, Workload((21, 90, 160, 16)), limit=24e9))

A stage needs the weights that are then on the device, known from shapes, and the temporaries of its programs, see
`turbojax.memory.estimates`. All sizes are bytes; a GB is 10^9 of them.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax

from turbojax.errors import UserError, quoted
from turbojax.memory.estimates import Residency, TemporaryMemory, Workload, compiled, estimate
from turbojax.models import offload
from turbojax.models.published import ModelConfigs
from turbojax.models.sizes import size_of, tree_bytes
from turbojax.models.wan import EMBEDDINGS
from turbojax.weights.skeleton import (
    Skeleton,
    clip_skeleton,
    is_stacked,
    layer_of,
    umt5_skeleton,
    vae_skeleton,
    wan_skeleton,
)

GB = 1e9
MODES = ("auto", "resident", "stream")
MOST_GB = 1e6
USABLE_SHARE = 0.95  # of the device that is planned: predictions may be 5 % low
# Of a limit that was named, where XLA has told the temporaries. Measured peaks were up to 1.5 % above such predictions.
USABLE_SHARE_OF_NAMED = 0.98
NO_COMPILE_BELOW = 0.85  # what is estimated to take less of it is not compiled to be sure


class Saving(NamedTuple):
    """A way to take less memory: the field of `Residency` and how to say it."""

    field: str
    sentence: str


# In the order in which they cost time: copies of 0.7 GB a video, 0.2 s a prompt, some of the decoding, some of every
# step unless copies hide.
SAVINGS = (
    Saving("idle_offloaded", "The VAE, the image encoder and the embeddings are on the card only while they are used"),
    Saving("text_streamed", "The text encoder stays in host memory and passes through the card a layer at a time"),
    Saving("vae_tiled", "The VAE decodes in tiles"),
    Saving("swap_experts", "One of the two experts is on the card at a time, the other in host memory"),
    Saving("transformer_streamed", "The transformer's blocks stay in host memory and are copied a layer ahead"),
)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage's peak on the device: weights, and what its programs allocate beside them."""

    name: str
    weights: int
    temporaries: int

    @property
    def total(self) -> int:
        return self.weights + self.temporaries


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is where, what each stage needs, and why.

    limit: bytes of the device, or those named in their place; usable: what of them is planned with, the rest is for
    predictions that are low. None where the device has none to tell. notes: what else to expect of the call.
    """

    residency: Residency
    stages: tuple[Stage, ...]
    limit: int | None
    usable: int | None
    reasons: tuple[str, ...]
    exact: bool
    notes: tuple[str, ...] = ()

    @property
    def largest(self) -> Stage:
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def peak(self) -> int:
        return self.largest.total

    @property
    def fits(self) -> bool:
        return self.usable is None or self.peak <= self.usable

    @property
    def estimate_suffices(self) -> bool:
        """Whether an estimate is enough: everything is resident and fits by far."""
        return self.residency == Residency() and (self.limit is None or self.peak <= NO_COMPILE_BELOW * self.limit)

    def __str__(self) -> str:
        lines = [f"{'GB':<10}{'weights':>9}{'temporary':>11}{'total':>7}"]
        for stage in self.stages:
            sizes = map(gigabytes, (stage.weights, stage.temporaries, stage.total))
            line = "{:<10}{:>9}{:>11}{:>7}".format(stage.name, *sizes)
            lines.append(line + (" peak" if stage is self.largest else ""))
        limit = "unknown" if self.limit is None else f"{gigabytes(self.limit)} GB"
        basis = "XLA's analysis of the compiled programs" if self.exact else "an estimate"
        lines.append(f"The card's memory: {limit}. Temporaries: {basis}.")
        return "\n".join([*lines, *self.reasons, *self.notes])


def plan(
    configs: ModelConfigs,
    workload: Workload,
    *,
    memory: str | float = "auto",
    limit: int | None = None,
    residency: Residency | None = None,
    compile_sampler: Callable[[bool], Any] | None = None,
) -> Plan:
    """The first way of keeping weights that fits, in the order of `SAVINGS`, without savings that are not needed.

    memory: "auto", "resident" (everything on the device), "stream" (text encoder and transformer from host memory), or
      a limit in GB in place of the device's.
    residency: where weights are already; then only the VAE's tiling is chosen.
    limit: bytes that the device has, None if unknown: then everything stays on the device.
    compile_sampler: gives the compiled sampler of the resident transformer, its embeddings in host memory or not;
      temporaries are then those of compiled programs, else they are estimated.

    The plan of the least memory is returned, too, where it does not fit; its last reason says what to change.
    Raises UserError for a memory that is none of these.
    """
    mode, limit = parse(memory, limit)
    room = USABLE_SHARE_OF_NAMED if compile_sampler and memory not in MODES else USABLE_SHARE
    usable = None if limit is None else int(room * limit)
    sizes = WeightBytes(configs)

    temporaries = (
        compiled(configs, workload, compile_sampler)
        if compile_sampler
        else functools.partial(estimate, configs, workload)
    )

    def stages(residency: Residency) -> tuple[Stage, ...]:
        return sizes.stages(residency, temporaries(residency))

    def fits(residency: Residency) -> bool:
        return usable is None or max(stage.total for stage in stages(residency)) <= usable

    least = residency or Residency.from_mode(mode)
    least = dataclasses.replace(least, vae_tiled=workload.vae_tiling == "on")
    savings = [s for s in SAVINGS if s.field != "vae_tiled" or workload.vae_tiling == "auto"]
    savings = [s for s in savings if s.field != "swap_experts" or configs.transformers > 1]
    if residency is not None or mode != "auto":
        savings = [s for s in savings if s.field == "vae_tiled"]
    chosen = choose(fits, least, savings)
    reasons = []
    for saving in SAVINGS:
        if getattr(chosen, saving.field):
            largest = max(stages(dataclasses.replace(chosen, **{saving.field: False})), key=lambda stage: stage.total)
            reasons.append(f"{saving.sentence}; without that, {largest.name} would need {gigabytes(largest.total)} GB.")
    reasons = reasons or ["Everything stays on the card."]
    found = Plan(chosen, stages(chosen), limit, usable, tuple(reasons), bool(compile_sampler))
    return found if found.fits else dataclasses.replace(found, reasons=(*found.reasons, suggestion(found, configs)))


def choose(fits: Callable[[Residency], bool], least: Residency, savings: Sequence[Saving]) -> Residency:
    """Takes savings until it fits, then takes back those that are not needed, the dearest first."""
    chosen = least
    for saving in savings:
        if fits(chosen):
            break
        chosen = dataclasses.replace(chosen, **{saving.field: True})
    for saving in reversed(savings):
        without = dataclasses.replace(chosen, **{saving.field: False})
        if fits(without):
            chosen = without
    return chosen


def suggestion(plan: Plan, configs: ModelConfigs) -> str:
    """One sentence for what does not fit: what is missing, and the settings to change."""
    stage = plan.largest
    if plan.limit is None or plan.usable is None:
        missing = f"memory is not enough: {stage.name} needs about {gigabytes(stage.total)} GB"
    elif plan.fits:
        sizes = f"{gigabytes(stage.total)} of {gigabytes(plan.limit)} GB"
        missing = f"the card is out of memory, though {stage.name} should need {sizes} (does another program use it?)"
    else:
        card = f"the {gigabytes(plan.usable)} GB that can be planned with of the card's {gigabytes(plan.limit)}"
        missing = (
            f"{stage.name} needs {gigabytes(stage.total)} GB, {gigabytes(stage.total - plan.usable)} more than {card}"
        )
    ways = ["vae_tiling=on"] if stage.name == "vae" and not plan.residency.vae_tiled else []
    if not (plan.residency.transformer_streamed and plan.residency.text_streamed):
        ways.append("memory=stream")
    if configs.transformer.quant is None and (stage.name == "diffusion" or not plan.residency.transformer_streamed):
        ways.append("quant_linear=True")
    ways += ["a smaller resolution", *(["fewer num_frames"] if stage.name == "diffusion" else [])]
    return f"{missing}; set {', or '.join(ways)}"


def loading_advice(configs: ModelConfigs) -> str:
    """The way out where the weights themselves are too large."""
    weights = configs.transformers * WeightBytes(configs).transformer.kept(streamed=False)
    quantize = "" if configs.transformer.quant else "quant_linear=True, or "
    return f"memory is not enough to load {gigabytes(weights)} GB of weights; set {quantize}memory=stream"


def gigabytes(size: int) -> str:
    return f"{size / GB:.{2 if size < GB / 10 else 1}f}"


def parse(memory: str | float, limit: int | None) -> tuple[str, int | None]:
    """The mode, and the limit in bytes."""
    if memory in MODES:
        return str(memory), limit
    try:
        size = float(memory)
    except ValueError:
        size = 0.0
    if not 0 < size <= MOST_GB:
        raise UserError(f"memory={quoted(memory)} is unknown; choose {', '.join(MODES)} or the card's GB, such as 12")
    return "auto", int(size * GB)


def memory_stats() -> dict[str, int]:
    """Of the first device, in bytes; empty where it does not count them, as on a CPU."""
    return jax.devices()[0].memory_stats() or {}


def device_limit() -> int | None:
    """Bytes that XLA may take of the first device; None where it does not say."""
    return memory_stats().get("bytes_limit")


# Weights.


class StreamableBytes(NamedTuple):
    """Bytes of a network's weights: what stays on the device when it is streamed, one layer of the rest, and layers."""

    fixed: int
    layer: int
    layers: int

    @classmethod
    def of(cls, skeleton: Skeleton) -> "StreamableBytes":
        total = tree_bytes(skeleton.specs)
        stacked = [spec for name, spec in skeleton.specs.items() if is_stacked(name)]
        layer = sum(size_of(s) for s in map(layer_of, stacked) if offload.is_streamed(s))
        return cls(total - layer * stacked[0].shape[0], layer, stacked[0].shape[0])

    def kept(self, streamed: bool) -> int:
        """On the device between calls."""
        return self.fixed if streamed else self.fixed + self.layer * self.layers

    def in_use(self, streamed: bool) -> int:
        """On the device while the network runs."""
        return self.kept(streamed) + (min(offload.LAYERS_ON_DEVICE, self.layers) * self.layer if streamed else 0)


class WeightBytes:
    """Bytes of all weights."""

    def __init__(self, configs: ModelConfigs):
        skeletons = [wan_skeleton(configs.transformer), umt5_skeleton(configs.text), vae_skeleton(configs.vae)]
        skeletons += [clip_skeleton(configs.clip)] if configs.clip else []
        self.transformer, self.text = (StreamableBytes.of(skeleton) for skeleton in skeletons[:2])
        specs = skeletons[0].specs.items()
        self.embeddings = sum(size_of(spec) for name, spec in specs if name.split(".")[0] in EMBEDDINGS)
        self.transformers, self.int8 = configs.transformers, configs.transformer.quant is not None
        self.vae = tree_bytes(skeletons[2].specs)
        self.clip = tree_bytes(skeletons[3].specs) if configs.clip else 0
        stacked = [spec for skeleton in skeletons[:2] for name, spec in skeleton.specs.items() if is_stacked(name)]
        self.largest_matrix = max(layer_of(spec).size for spec in stacked)

    def stages(self, where: Residency, temporaries: TemporaryMemory) -> tuple[Stage, ...]:
        whole = self.transformer.kept(where.transformer_streamed)
        layers = self.transformer.in_use(where.transformer_streamed) - whole
        embeddings = self.embeddings if where.embeddings_offloaded else 0
        one = whole - embeddings
        alone = where.swap_experts and not where.transformer_streamed
        kept = one if alone else one * self.transformers
        text = self.text.kept(where.text_streamed)
        vae, clip = (0, 0) if where.idle_offloaded else (self.vae, self.clip)  # what of them is there all the time
        # What was read last, and a matrix on its way, in float32 while it is cast or quantized.
        loaded = max(vae + clip + embeddings, self.vae + clip, vae + self.clip)
        load = Stage("load", kept + loaded + text, 4 * self.largest_matrix)
        encode = Stage("text", kept + vae + clip + self.text.in_use(where.text_streamed), temporaries.text)
        image = [Stage("image", kept + self.vae + self.clip + text, temporaries.image)] if temporaries.image else []
        diffusion = Stage("diffusion", kept + layers + vae + clip + text, temporaries.diffusion)
        gone = one if alone and self.int8 else 0  # an int8 expert leaves behind its last step
        return load, encode, *image, diffusion, Stage("vae", kept - gone + self.vae + clip + text, temporaries.vae)


# When it does not fit.


@contextmanager
def out_of_memory(advice: Callable[[], str]) -> Iterator[None]:
    """Turns what JAX and Python raise when memory is short into a UserError with advice."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not short_of_memory(error):
            raise
        raise UserError(advice()) from error


def short_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)

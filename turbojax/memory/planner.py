"""The memory planner: what each stage of a call needs of a GPU, and which weights to keep on it.

    configs = ModelConfigs(WanConfig.t2v_14b(quant=QuantConfig()), VAEConfig.wan2_1(), UMT5Config.xxl())
    print(plan(configs, Workload((21, 90, 160, 16)), limit=24e9))

A stage needs the weights that are then on the device, known from shapes, and the temporary memory of its programs, see
`turbojax.memory.estimates`. All sizes are bytes; a GB is 10^9 of them.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax

from turbojax.errors import UserError, quoted
from turbojax.memory.estimates import Residency, TemporaryMemory, Workload, analyze, estimate
from turbojax.models import offload
from turbojax.models.published import ModelConfigs
from turbojax.models.sizes import size_of, tree_bytes
from turbojax.models.wan import EMBEDDINGS
from turbojax.weights.skeleton import Skeleton, clip_skeleton, umt5_skeleton, vae_skeleton, wan_skeleton

GB = 1e9
MODES = ("auto", "resident", "stream")
MOST_GB = 1e6
USABLE_SHARE = 0.95  # of the device that is planned: predictions may be 5 % low
# Of a limit that was named, with XLA's analysis of programs. Measured peaks were up to 1.5 % above such predictions.
USABLE_SHARE_OF_NAMED = 0.98
NO_COMPILE_BELOW = 0.85  # an estimate below this share of the device is not checked by compiling


class Saving(NamedTuple):
    """A way to take less memory: the field of `Residency` and the sentence that explains it."""

    field: str
    sentence: str


# In the order in which they cost time: copies of 0.7 GB a video, 0.2 s a prompt, some of the decoding, some of every
# step unless copies hide.
SAVINGS = (
    Saving("idle_offloaded", "The VAE, the image encoder and the embeddings are on the GPU only while they are used"),
    Saving("text_streamed", "The text encoder stays in host memory and passes through the GPU a layer at a time"),
    Saving("vae_tiled", "The VAE decodes in tiles"),
    Saving("swap_experts", "One of the two experts is on the GPU at a time, the other in host memory"),
    Saving("transformer_streamed", "The transformer's blocks stay in host memory and are prefetched one layer ahead"),
)


@dataclasses.dataclass(frozen=True)
class StageMemory:
    """A stage's peak on the device: weights, and the temporary memory of its programs."""

    name: str
    weights: int
    temporary: int

    @property
    def total(self) -> int:
        return self.weights + self.temporary


@dataclasses.dataclass(frozen=True)
class Plan:
    """Places of the weights, what each stage needs, and why.

    limit: bytes of the device, or those named in their place; usable: the share of them that is planned with, the rest
    is for predictions that are low. None where the device does not say. notes: what else to expect of the call.
    """

    residency: Residency
    stages: tuple[StageMemory, ...]
    limit: int | None
    usable: int | None
    reasons: tuple[str, ...]
    exact: bool
    notes: tuple[str, ...] = ()

    @property
    def largest(self) -> StageMemory:
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def peak(self) -> int:
        return self.largest.total

    @property
    def fits(self) -> bool:
        return self.usable is None or self.peak <= self.usable

    @property
    def estimate_suffices(self) -> bool:
        """True if everything is resident and fits by far."""
        return self.residency == Residency() and (self.limit is None or self.peak <= NO_COMPILE_BELOW * self.limit)

    def __str__(self) -> str:
        lines = [f"{'GB':<10}{'weights':>9}{'temporary':>11}{'total':>7}"]
        for stage in self.stages:
            sizes = map(gigabytes, (stage.weights, stage.temporary, stage.total))
            line = "{:<10}{:>9}{:>11}{:>7}".format(stage.name, *sizes)
            lines.append(line + (" peak" if stage is self.largest else ""))
        limit = "unknown" if self.limit is None else f"{gigabytes(self.limit)} GB"
        basis = "XLA's analysis of the compiled programs" if self.exact else "an estimate"
        lines.append(f"The GPU's memory: {limit}. Temporary memory: {basis}.")
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
    """Returns the first residency that fits, in the order of `SAVINGS`, without savings that are not needed.

    memory: "auto", "resident" (everything on the device), "stream" (text encoder and transformer from host memory), or
      a limit in GB in place of the device's.
    limit: the device's memory in bytes, None where it is unknown; then everything stays on the device.
    residency: where weights are already; then only the VAE's tiles are still to choose.
    compile_sampler: compiles the program of the sampler's steps by a transformer on the device, for XLA to say what it
      allocates; it takes True if the embeddings are offloaded. None for an estimate without a GPU.
    """
    mode, limit = parse(memory, limit)
    share = USABLE_SHARE_OF_NAMED if compile_sampler and memory not in MODES else USABLE_SHARE
    usable = None if limit is None else int(share * limit)
    weights = WeightBytes(configs)
    analyzed = analyze(configs, workload, compile_sampler) if compile_sampler else None
    temporary = analyzed or functools.partial(estimate, configs, workload)

    def stages(residency: Residency) -> tuple[StageMemory, ...]:
        return weights.stages(residency, temporary(residency))

    def fits(residency: Residency) -> bool:
        return usable is None or max(stage.total for stage in stages(residency)) <= usable

    def without(saving: Saving) -> StageMemory:
        return max(stages(dataclasses.replace(chosen, **{saving.field: False})), key=lambda stage: stage.total)

    least = dataclasses.replace(residency or Residency.from_mode(mode), vae_tiled=workload.vae_tiling == "on")
    open_fields = {"vae_tiled"} if workload.vae_tiling == "auto" else set()
    if residency is None and mode == "auto":
        open_fields |= {"idle_offloaded", "text_streamed", "transformer_streamed"}
        open_fields |= {"swap_experts"} if configs.transformers > 1 else set()
    chosen = choose(fits, least, [saving for saving in SAVINGS if saving.field in open_fields])
    reasons = [
        f"{saving.sentence}; without that, {largest.name} would need {gigabytes(largest.total)} GB."
        for saving in SAVINGS
        if getattr(chosen, saving.field) and (largest := without(saving))
    ] or ["Everything stays on the GPU."]
    found = Plan(chosen, stages(chosen), limit, usable, tuple(reasons), bool(compile_sampler))
    return found if found.fits else dataclasses.replace(found, reasons=(*found.reasons, suggestion(found, configs)))


def choose(fits: Callable[[Residency], bool], least: Residency, savings: Sequence[Saving]) -> Residency:
    """Applies savings until it fits, then takes back those that are not needed, the most expensive first."""
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
    """Returns a sentence for what does not fit: the memory that is missing, and the settings to change."""
    stage = plan.largest
    if plan.limit is None or plan.usable is None:
        missing = f"memory is not enough: {stage.name} needs about {gigabytes(stage.total)} GB"
    elif plan.fits:
        sizes = f"{gigabytes(stage.total)} of {gigabytes(plan.limit)} GB"
        missing = f"the GPU is out of memory, though {stage.name} should need {sizes} (does another program use it?)"
    else:
        usable = f"the {gigabytes(plan.usable)} GB that can be planned with of the GPU's {gigabytes(plan.limit)}"
        more = gigabytes(stage.total - plan.usable)
        missing = f"{stage.name} needs {gigabytes(stage.total)} GB, {more} more than {usable}"
    settings = ["vae_tiling=on"] if stage.name == "vae" and not plan.residency.vae_tiled else []
    if not (plan.residency.transformer_streamed and plan.residency.text_streamed):
        settings.append("memory=stream")
    if configs.transformer.quant is None and (stage.name == "diffusion" or not plan.residency.transformer_streamed):
        settings.append("quant_linear=True")
    settings += ["a smaller resolution", *(["fewer num_frames"] if stage.name == "diffusion" else [])]
    return f"{missing}; set {', or '.join(settings)}"


def loading_suggestion(configs: ModelConfigs) -> str:
    """Returns the `suggestion` where the weights themselves are too large."""
    weights = configs.transformers * WeightBytes(configs).transformer.kept(streamed=False)
    quantize = "" if configs.transformer.quant else "quant_linear=True, or "
    return f"memory is not enough to load {gigabytes(weights)} GB of weights; set {quantize}memory=stream"


def gigabytes(size: int) -> str:
    return f"{size / GB:.{2 if size < GB / 10 else 1}f}"


def parse(memory: str | float, limit: int | None) -> tuple[str, int | None]:
    """Returns the mode, and the limit in bytes."""
    if memory in MODES:
        return str(memory), limit
    try:
        size = float(memory)
    except ValueError:
        size = 0.0
    if not 0 < size <= MOST_GB:
        raise UserError(f"memory={quoted(memory)} is unknown; choose {', '.join(MODES)} or the GPU's GB, such as 12")
    return "auto", int(size * GB)


def memory_stats() -> dict[str, int]:
    """Returns statistics of the first device's memory, in bytes; empty where it has none, as on a CPU."""
    return jax.devices()[0].memory_stats() or {}


def device_limit() -> int | None:
    """Returns the bytes that XLA may take of the first device; None where it does not say."""
    return memory_stats().get("bytes_limit")


# Weights.


class StreamableBytes(NamedTuple):
    """Bytes of a network's weights: those on the device when it is streamed, one layer of the rest, and layers."""

    fixed: int
    layer: int
    layers: int

    @classmethod
    def of(cls, skeleton: Skeleton) -> "StreamableBytes":
        layer = sum(size_of(spec) for spec in skeleton.layer_specs.values() if offload.is_streamed(spec))
        layers = skeleton.num_layers
        return cls(tree_bytes(skeleton.specs) - layer * layers, layer, layers)

    def kept(self, streamed: bool) -> int:
        """Returns the bytes on the device between calls."""
        return self.fixed if streamed else self.fixed + self.layer * self.layers

    def in_use(self, streamed: bool) -> int:
        """Returns the bytes on the device while the network runs."""
        return self.kept(streamed) + (min(offload.LAYERS_ON_DEVICE, self.layers) * self.layer if streamed else 0)


class WeightBytes:
    """Bytes of all weights."""

    def __init__(self, configs: ModelConfigs):
        wan, umt5 = wan_skeleton(configs.transformer), umt5_skeleton(configs.text)
        self.transformer, self.text = StreamableBytes.of(wan), StreamableBytes.of(umt5)
        self.embeddings = sum(size_of(spec) for name, spec in wan.specs.items() if name.split(".")[0] in EMBEDDINGS)
        self.transformers, self.int8 = configs.transformers, configs.transformer.quant is not None
        self.vae = tree_bytes(vae_skeleton(configs.vae).specs)
        self.clip = tree_bytes(clip_skeleton(configs.clip).specs) if configs.clip else 0
        self.largest_matrix = max(spec.size for network in (wan, umt5) for spec in network.layer_specs.values())

    def stages(self, residency: Residency, temporary: TemporaryMemory) -> tuple[StageMemory, ...]:
        """Returns what the stages of a call need, in their order."""
        streamed = residency.transformer_streamed
        swapped = residency.swap_experts and not streamed
        layers = self.transformer.in_use(streamed) - self.transformer.kept(streamed)
        embeddings = self.embeddings if residency.embeddings_offloaded else 0
        one = self.transformer.kept(streamed) - embeddings
        kept = one if swapped else one * self.transformers
        text = self.text.kept(residency.text_streamed)
        vae, clip = (0, 0) if residency.idle_offloaded else (self.vae, self.clip)  # on the device in all stages
        # What was read last, and a matrix on its way, in float32 while it is cast or quantized.
        loaded = max(vae + clip + embeddings, self.vae + clip, vae + self.clip)
        released = one if swapped and self.int8 else 0  # an int8 expert is off the device after its last step
        weights = {
            "load": kept + loaded + text,
            "text": kept + vae + clip + self.text.in_use(residency.text_streamed),
            "image": kept + self.vae + self.clip + text,
            "diffusion": kept + layers + vae + clip + text,
            "vae": kept - released + self.vae + clip + text,
        }
        if not temporary.image:
            del weights["image"]
        allocated = {"load": 4 * self.largest_matrix} | temporary._asdict()
        return tuple(StageMemory(name, size, allocated[name]) for name, size in weights.items())


# When it does not fit.


@contextmanager
def out_of_memory(suggest: Callable[[], str]) -> Iterator[None]:
    """Turns what JAX and Python raise when memory is short into a UserError with a suggestion."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not short_of_memory(error):
            raise
        raise UserError(suggest()) from error


def short_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)

"""The memory planner: what each stage of a call needs of a card, and what to keep on the card for it.

    parts = Parts(WanConfig.t2v_14b(quant=QuantConfig()), VAEConfig.wan2_1(), UMT5Config.xxl())
    print(plan(parts, Work((21, 90, 160, 16)), limit=24e9))

A stage needs the weights that are on the device at that time, known from shapes, and temporaries: arrays of its largest
program. On a GPU they are XLA's own memory analysis of the compiled programs; elsewhere they are estimated, see
`estimate`. All sizes are bytes; GB are 10^9 of them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from turbojax.errors import UserError
from turbojax.models import streaming, umt5
from turbojax.models import vae as vae_model
from turbojax.models.umt5 import TEXT_LEN, UMT5Config, UMT5Encoder
from turbojax.models.vae import VAEConfig, WanVAE
from turbojax.models.wan import WanConfig
from turbojax.weights.load import Skeleton, is_stacked, layer_of, wan_skeleton

GB = 1e9
MODES = ("auto", "resident", "stream")
CLEAR = 0.85  # of the limit: what is estimated to take less is not compiled to be sure


class Parts(NamedTuple):
    """The configurations of the three networks."""

    transformer: WanConfig
    vae: VAEConfig
    text: UMT5Config


class Work(NamedTuple):
    """What decides the temporaries of a call: latents `[t, h, w, c]` of one video, videos, and guidance."""

    latents: tuple[int, int, int, int]
    batch: int = 1
    guided: bool = False

    @property
    def latent_bytes(self) -> int:
        return 4 * self.batch * math.prod(self.latents)

    def tokens(self, config: WanConfig) -> int:
        """Of all videos, twice with guidance."""
        return self.batch * (1 + self.guided) * math.prod(self.latents[:3]) // config.patch_features


@dataclasses.dataclass(frozen=True)
class Residency:
    """Where weights are, and whether the VAE decodes whole frames; all of it on the device if nothing is set."""

    text_streamed: bool = False
    transformer_streamed: bool = False


class Measure(NamedTuple):
    """A way to take less memory: the field of `Residency` and how to say it."""

    field: str
    sentence: str


# In the order in which they cost time: a prompt 0.2 s, each step little where copies hide behind computation.
MEASURES = (
    Measure("text_streamed", "The text encoder stays in host memory and passes through the card a layer at a time"),
    Measure("transformer_streamed", "The transformer's blocks stay in host memory and are copied a layer ahead"),
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


class Temporaries(NamedTuple):
    text: int
    diffusion: int
    vae: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is where, what each stage needs, and why. `limit` is None where the device has none to tell."""

    residency: Residency
    stages: tuple[Stage, ...]
    limit: int | None
    reasons: tuple[str, ...]
    exact: bool

    @property
    def largest(self) -> Stage:
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def peak(self) -> int:
        return self.largest.total

    @property
    def fits(self) -> bool:
        return self.limit is None or self.peak <= self.limit

    def __str__(self) -> str:
        header = f"{'stage':<10}{'weights':>9}{'temporary':>11}{'total':>7}  GB"
        rows = [
            f"{s.name:<10}{s.weights / GB:>9.1f}{s.temporaries / GB:>11.1f}{s.total / GB:>7.1f}"
            + ("  <- peak" if s is self.largest else "")
            for s in self.stages
        ]
        card = "no limit is known" if self.limit is None else f"the limit is {self.limit / GB:.1f} GB"
        basis = "XLA's analysis of the compiled programs" if self.exact else "an estimate, no GPU was asked"
        return "\n".join([header, *rows, f"{card}; temporaries are {basis}", *self.reasons])


def plan(
    parts: Parts,
    work: Work,
    *,
    memory: str | float = "auto",
    limit: int | None = None,
    compile_sampler: Callable[[], Any] | None = None,
) -> Plan:
    """The first way of keeping weights that fits, in the order of `MEASURES`, without measures that are not needed.

    memory: "auto", "resident" (everything on the device), "stream" (text encoder and transformer from host memory), or
      a limit in GB in place of the device's.
    limit: bytes that the device has, None if unknown: then everything stays on the device.
    compile_sampler: gives the compiled sampler of the resident transformer; temporaries are then those of compiled
      programs, else they are estimated.

    The plan of the least memory is returned, too, where it does not fit; its last reason says what to change.
    Raises UserError for a memory that is none of these.
    """
    mode, limit = parse(memory, limit)
    sizes = Sizes(parts)

    @functools.cache
    def stages(residency: Residency) -> tuple[Stage, ...]:
        if compile_sampler is None:
            temporaries = estimate(parts, work)
        else:
            temporaries = compiled(parts, work, residency, compile_sampler)
        return sizes.stages(residency, temporaries)

    def fits(residency: Residency) -> bool:
        return limit is None or max(stage.total for stage in stages(residency)) <= limit

    chosen = Residency()
    if mode == "stream":
        chosen = Residency(text_streamed=True, transformer_streamed=True)
    elif mode == "auto":
        chosen = choose(fits)
    exact = compile_sampler is not None
    found = Plan(chosen, stages(chosen), limit, (), exact)
    reasons = [reason(measure, chosen, stages, limit, mode) for measure in MEASURES if getattr(chosen, measure.field)]
    if not reasons:
        reasons = ["Everything stays on the card."]
    if not found.fits:
        reasons.append(way_out(found, parts))
    return dataclasses.replace(found, reasons=tuple(reasons))


def choose(fits: Callable[[Residency], bool]) -> Residency:
    """Takes measures until it fits, then takes back those that the later ones made needless."""
    chosen = Residency()
    for measure in MEASURES:
        if fits(chosen):
            break
        chosen = dataclasses.replace(chosen, **{measure.field: True})
    for measure in MEASURES:
        without = dataclasses.replace(chosen, **{measure.field: False})
        if fits(without):
            chosen = without
    return chosen


def reason(measure: Measure, chosen: Residency, stages: Callable, limit: int | None, mode: str) -> str:
    """A sentence for a measure: what would not fit without it."""
    if mode != "auto":
        return f"{measure.sentence}, as asked for."
    worst = max(stages(dataclasses.replace(chosen, **{measure.field: False})), key=lambda stage: stage.total)
    assert limit is not None
    return f"{measure.sentence}: else {worst.name} would need {worst.total / GB:.1f} of {limit / GB:.1f} GB."


def way_out(plan: Plan, parts: Parts) -> str:
    """What to change when a plan does not fit: one sentence."""
    assert plan.limit is not None
    stage = plan.largest
    missing = f"{stage.name} needs {stage.total / GB:.1f} GB and the card has {plan.limit / GB:.1f}"
    ways = []
    if not (plan.residency.transformer_streamed and plan.residency.text_streamed):
        ways.append("memory=stream")
    if stage.name == "diffusion" and parts.transformer.quant is None:
        ways.append("quant_linear=True")
    ways.append("fewer num_samples, a smaller resolution" if stage.name == "vae" else "a smaller resolution")
    if stage.name == "diffusion":
        ways.append("fewer num_frames")
    return f"{missing}: {(stage.total - plan.limit) / GB:.1f} GB too much; set {', or '.join(ways)}."


def parse(memory: str | float, limit: int | None) -> tuple[str, int | None]:
    """The mode, and the limit in bytes."""
    if memory in MODES:
        return str(memory), limit
    try:
        size = float(memory)
    except ValueError:
        size = 0.0
    if not 0 < size < math.inf:
        raise UserError(f"memory={memory!r} is unknown; choose {', '.join(MODES)} or the card's GB, such as 12")
    return "auto", int(size * GB)


def device_limit() -> int | None:
    """Bytes that XLA may take of the first device; None where it does not say, as on a CPU."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit")


# Weights.


def size_of(spec: Any) -> int:
    return spec.size * spec.dtype.itemsize


class Streamable(NamedTuple):
    """Bytes of a network's weights: what stays on the device when it is streamed, one layer of the rest, and layers."""

    fixed: int
    layer: int
    layers: int

    @classmethod
    def of(cls, skeleton: Skeleton) -> "Streamable":
        total = sum(map(size_of, skeleton.specs.values()))
        stacked = [spec for name, spec in skeleton.specs.items() if is_stacked(name)]
        layer = sum(size_of(s) for s in map(layer_of, stacked) if streaming.is_streamed(s))
        return cls(total - layer * stacked[0].shape[0], layer, stacked[0].shape[0])

    def kept(self, streamed: bool) -> int:
        """On the device between calls."""
        return self.fixed if streamed else self.fixed + self.layer * self.layers

    def in_use(self, streamed: bool) -> int:
        """On the device while the network runs."""
        return self.kept(streamed) + (min(streaming.LAYERS_ON_DEVICE, self.layers) * self.layer if streamed else 0)


class Sizes:
    """Bytes of all weights."""

    def __init__(self, parts: Parts):
        skeletons = wan_skeleton(parts.transformer), text_skeleton(parts.text), vae_skeleton(parts.vae)
        self.transformer, self.text = (Streamable.of(skeleton) for skeleton in skeletons[:2])
        self.vae = sum(map(size_of, skeletons[2].specs.values()))
        layers = [layer_of(s) if is_stacked(name) else s for sk in skeletons for name, s in sk.specs.items()]
        self.largest_tensor = max(spec.size for spec in layers)

    def stages(self, where: Residency, temporaries: Temporaries) -> tuple[Stage, ...]:
        transformer = self.transformer.kept(where.transformer_streamed)
        text = self.text.kept(where.text_streamed)
        # One tensor on its way: in float32 while it is cast or quantized.
        load = Stage("load", transformer + self.vae, 4 * self.largest_tensor)
        encode = Stage("text", transformer + self.vae + self.text.in_use(where.text_streamed), temporaries.text)
        network = self.transformer.in_use(where.transformer_streamed)
        diffusion = Stage("diffusion", network + self.vae + text, temporaries.diffusion)
        return load, encode, diffusion, Stage("vae", transformer + self.vae + text, temporaries.vae)


@functools.cache
def text_skeleton(config: UMT5Config) -> Skeleton:
    return Skeleton.of(lambda: UMT5Encoder(config, rngs=nnx.Rngs(0)))


@functools.cache
def vae_skeleton(config: VAEConfig) -> Skeleton:
    return Skeleton.of(lambda: WanVAE(config, rngs=nnx.Rngs(0)))


# Temporaries.


def estimate(parts: Parts, work: Work) -> Temporaries:
    """Temporaries without a GPU, by what is alive at the programs' largest moment.

    L tokens, D width, F ffn width:

      text        6 arrays of scores `[heads, 512, 512]` in float32
      diffusion   the table of the rotary embedding, the latents, and the larger of
                    attention: `ATTENTION_ARRAYS` arrays `[L, D]`
                    ffn: the stream and the hidden state `[L, F]`, which is int8 with block scales, int8 and bfloat16 with
                         channel scales; `[L, D]` 3 and 3.5 times where the hidden state is small
                    what XLA tries matmuls with, see `tried`
      vae         the cache, and 9 arrays `[frames of a latent, height, width, dim]`: a convolution in time joins 3

    Fitted to XLA's analysis for an H100, checked against measured peaks, see docs/performance.md.
    """
    c, v = parts.transformer, parts.vae
    _, h, w, _ = work.latents
    item, tokens = jnp.dtype(c.dtype).itemsize, work.tokens(c)
    array = tokens * c.dim * item
    hidden = tokens * c.ffn_dim
    if c.quant is None:
        arrays, ffn = 6.5, item * hidden + 3.5 * array
    elif c.quant.scheme == "block128" and not c.quant.weight_only:
        arrays, ffn = ATTENTION_ARRAYS[c.attention_type], hidden + 3 * array
    else:
        arrays, ffn = ATTENTION_ARRAYS[c.attention_type], (1 + item) * hidden + array
    table = tokens * c.head_dim * jnp.dtype(jnp.float32).itemsize
    diffusion = max(int(max(arrays * array, ffn)) + table + work.latent_bytes, tried(c, work))
    frames = 9 * v.temporal_factor * h * w * v.spatial_factor**2 * v.dim * jnp.dtype(v.dtype).itemsize
    return Temporaries(6 * 4 * parts.text.num_heads * TEXT_LEN**2, diffusion, decode_cache(v, work) + frames)


# Arrays `[L, D]` alive at once with int8 layers: the stream, q, k, v, a result, and SageSLA's codes.
ATTENTION_ARRAYS = {"original": 5.0, "sla": 5.15, "sagesla": 5.65}


def tried(config: WanConfig, work: Work) -> int:
    """What XLA's search for the fastest matmul allocates, beside the weights, when a program is compiled.

    Its operands and two results, the one to check and the one to compare with, each between 16 MiB of guard bytes, and
    cuBLAS's 32 MiB. int8 layers have kernels of their own and are not searched.
    """
    if config.quant is not None:
        return 0
    tokens, item = work.tokens(config), jnp.dtype(config.dtype).itemsize
    numbers = tokens * config.dim + config.ffn_dim * config.dim + 2 * tokens * config.ffn_dim
    return item * numbers + (4 * 16 + 32) * 2**20


def decode_cache(config: VAEConfig, work: Work) -> int:
    vae = vae_skeleton(config).abstract()
    return tree_bytes(jax.eval_shape(lambda: vae.init_decode_cache(1, *work.latents[1:3])))


def compiled(parts: Parts, work: Work, residency: Residency, compile_sampler: Callable[[], Any]) -> Temporaries:
    """Temporaries by XLA's analysis of the programs, compiled for the first device."""
    c, t5 = parts.transformer, parts.text
    mask = jax.ShapeDtypeStruct((1, TEXT_LEN), jnp.int32)
    embedded = jax.ShapeDtypeStruct((1, TEXT_LEN, t5.dim), t5.dtype)
    if residency.text_streamed:
        text = of_streamed(text_skeleton(t5).abstract_streamed(), embedded, mask)
    else:
        encoder = umt5.run_encoder.lower(*nnx.split(text_skeleton(t5).abstract()), embedded, mask)
        text = of_program(encoder.compile())
    latents = jax.ShapeDtypeStruct((work.batch, *work.latents), jnp.float32)
    embedding = jax.ShapeDtypeStruct((work.batch, TEXT_LEN, c.text_dim), c.dtype)
    diffusion = tree_bytes((latents, embedding)) * (1 + work.guided)
    if residency.transformer_streamed:
        n = work.batch * (1 + work.guided)
        several = [jax.ShapeDtypeStruct((n, *a.shape[1:]), a.dtype) for a in (latents, embedding)]
        times = jax.ShapeDtypeStruct((n,), jnp.float32)
        diffusion += of_streamed(wan_skeleton(c).abstract_streamed(), several[0], times, several[1])
    else:
        diffusion += of_program(compile_sampler())
    vae = decode_cache(parts.vae, work) + decoding(parts.vae, work)
    return Temporaries(text, max(diffusion, tried(c, work)), vae)


def decoding(config: VAEConfig, work: Work) -> int:
    """Of the programs that decode a chunk."""
    programs = vae_model.compile_decoding(vae_skeleton(config).abstract(), (1, *work.latents), as_uint8=True)
    return max(of_program(program) for program in programs)


def of_streamed(model: streaming.Streamed, *inputs: jax.ShapeDtypeStruct) -> int:
    """Of the largest of the three programs of a streamed model, with what the others leave for it."""
    first = streaming.begin.lower(model.graph, model.state, inputs, {})
    x, context, rest = jax.eval_shape(functools.partial(streaming.begin, model.graph), model.state, inputs, {})
    blocks, index = model.blocks, jax.ShapeDtypeStruct((), jnp.int32)
    block = streaming.run_block.lower(blocks.graph, blocks.resident, blocks.layers[0], index, x, context)
    last = streaming.end.lower(model.graph, model.state, x, rest)
    return max(
        of_program(first.compile()),
        tree_bytes((x, context, rest)) + of_program(block.compile()),
        tree_bytes((x, rest)) + of_program(last.compile()),
    )


def of_program(program: Any) -> int:
    """What a compiled program allocates beside its arguments."""
    memory = program.memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes


def tree_bytes(tree: Any) -> int:
    return sum(map(size_of, jax.tree.leaves(tree)))


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

"""Temporary memory: the bytes that the programs of a call allocate on the device beside weights.

On a GPU it is XLA's own memory analysis of the compiled programs (`analyze`), elsewhere an estimate (`estimate`).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from turbojax.kernels.attention import SCORES_IN_MEMORY
from turbojax.models import offload, umt5
from turbojax.models import vae as vae_model
from turbojax.models.image_condition import encoding_bytes, image_shapes, takes_images
from turbojax.models.published import ModelConfigs
from turbojax.models.sizes import tree_bytes
from turbojax.models.tiling import compile_tiles, tile_sides
from turbojax.models.umt5 import TEXT_LEN
from turbojax.models.vae import VAEConfig
from turbojax.models.wan import WanConfig, kept_keys
from turbojax.weights.skeleton import umt5_skeleton, vae_skeleton, wan_skeleton


class Workload(NamedTuple):
    """Size of a call, which decides its temporary memory: latents `[t, h, w, c]` of a video, their number, settings."""

    latents: tuple[int, int, int, int]
    batch: int = 1
    guided: bool = False
    vae_tiling: str = "auto"

    def pixels(self, config: VAEConfig) -> tuple[int, int]:
        """Returns height and width."""
        return config.spatial_factor * self.latents[1], config.spatial_factor * self.latents[2]

    def tokens(self, config: WanConfig) -> int:
        """Returns the tokens of all videos, twice with guidance."""
        return self.batch * (1 + self.guided) * math.prod(self.latents[:3]) // config.patch_features


@dataclasses.dataclass(frozen=True)
class Residency:
    """Places of the weights, and if the VAE decodes whole frames; everything is on the device if nothing is set."""

    idle_offloaded: bool = False  # VAE, image encoder and embeddings, while others run
    text_streamed: bool = False
    vae_tiled: bool = False
    swap_experts: bool = False  # of two transformers one is on the device at a time
    transformer_streamed: bool = False

    @classmethod
    def from_mode(cls, mode: str) -> "Residency":
        """Returns what "stream" or "resident" asks for; for "auto", the residency that is fastest where it fits."""
        return cls(text_streamed=mode == "stream", transformer_streamed=mode == "stream")

    @property
    def embeddings_offloaded(self) -> bool:
        """True if the transformer's embeddings are in host memory; a streamed one computes them in each step."""
        return self.idle_offloaded and not self.transformer_streamed


class TemporaryMemory(NamedTuple):
    """Bytes by stage."""

    text: int
    diffusion: int
    vae: int
    image: int = 0


def estimate(configs: ModelConfigs, workload: Workload, residency: Residency) -> TemporaryMemory:
    """Estimates temporary memory without a GPU, by what is alive at the programs' largest moment.

    L tokens, D width, F ffn width:

      text        6 arrays of scores `[heads, 512, 512]` in float32
      diffusion   the table of the rotary embedding, the latents, and the larger of
                    attention: `ATTENTION_ARRAYS` arrays `[L, D]` and keys of the text that are kept
                    ffn: the hidden state `[L, F]`, int8 with block scales, both int8 and bfloat16 with channel scales,
                         beside 2 to 3.5 arrays `[L, D]` and these keys, which share a place with channel scales
                    XLA's autotuning of matmuls, see `autotuning_bytes`
      image       the VAE encoding an image, `turbojax.models.image_condition.encoding_bytes`
      vae         `vae.decoding_bytes`, in tiles of one tile; the middle block works on whole frames before

    Fitted to XLA's analysis for an H100, checked against measured peaks, see docs/notes/memory.md.
    """
    c = configs.transformer
    item, tokens = jnp.dtype(c.dtype).itemsize, workload.tokens(c)
    array = tokens * c.dim * item
    hidden = tokens * c.ffn_dim
    keys = 0 if residency.transformer_streamed else kept_keys(c, workload.batch * (1 + workload.guided) * c.text_len)
    if c.quant is None:
        arrays, ffn = 6.5, item * hidden + 3.5 * array + keys
    elif c.quant.scheme == "block128" and not c.quant.weight_only:
        arrays, ffn = ATTENTION_ARRAYS[c.attention_type], hidden + 3 * array + keys
    else:
        arrays, ffn = ATTENTION_ARRAYS[c.attention_type], (1 + item) * hidden + array + max(array, keys)
    table, latents = 4 * tokens * c.head_dim, 4 * workload.batch * math.prod(workload.latents)  # float32
    diffusion = max(int(max(arrays * array + keys, ffn)) + table + latents, autotuning_bytes(c, workload))
    text = 6 * 4 * configs.text.num_heads * TEXT_LEN**2
    vae = vae_bytes(configs.vae, workload, residency.vae_tiled)
    return TemporaryMemory(text, diffusion, vae, image_bytes(configs, workload))


@functools.lru_cache
def image_bytes(configs: ModelConfigs, workload: Workload) -> int:
    """Estimates what the VAE takes to encode images."""
    if not takes_images(configs.transformer):
        return 0
    return encoding_bytes(vae_skeleton(configs.vae).abstract(), *workload.pixels(configs.vae))


# Arrays `[L, D]` alive at once with int8 layers: the stream, q, k, v, a result, and SageSLA's codes.
ATTENTION_ARRAYS = {"original": 5.0, "sla": 5.1, "sagesla": 4.5}


def autotuning_bytes(config: WanConfig, workload: Workload) -> int:
    """Returns what XLA's autotuning of matmuls allocates, beside the weights, when a program is compiled.

    Its operands and two results, the one to check and the one to compare with, each between 16 MiB of guard bytes, and
    cuBLAS's 32 MiB. int8 layers have kernels of their own and are not autotuned.
    """
    if config.quant is not None:
        return 0
    tokens, item = workload.tokens(config), jnp.dtype(config.dtype).itemsize
    numbers = tokens * config.dim + config.ffn_dim * config.dim + 2 * tokens * config.ffn_dim
    return item * numbers + (4 * 16 + 32) * 2**20


@functools.lru_cache
def vae_bytes(config: VAEConfig, workload: Workload, tiled: bool) -> int:
    """Estimates the VAE's decoding; before the tiles, the middle block takes the whole clip's features and scores."""
    vae = vae_skeleton(config).abstract()
    t, h, w, _ = workload.latents
    if not tiled:
        return vae_model.decoding_bytes(vae, h, w)
    features = t * h * w * config.dim * config.dim_mult[-1] * jnp.dtype(config.dtype).itemsize
    scores = 3 * 4 * min((h * w) ** 2, SCORES_IN_MEMORY)
    return max(vae_model.decoding_bytes(vae, *tile_sides((h, w))), 2 * features + scores)


def analyze(
    configs: ModelConfigs, workload: Workload, compile_sampler: Callable[[bool], Any]
) -> Callable[[Residency], TemporaryMemory]:
    """Returns a function that gives temporary memory by XLA's analysis of programs, which it compiles when needed.

    compile_sampler: as `turbojax.memory.planner.plan` takes it.
    """
    c, t5 = configs.transformer, configs.text

    @functools.cache
    def text(streamed: bool) -> int:
        mask = jax.ShapeDtypeStruct((1, TEXT_LEN), jnp.int32)
        embedded = jax.ShapeDtypeStruct((1, TEXT_LEN, t5.dim), t5.dtype)
        skeleton = umt5_skeleton(t5)
        if streamed:
            return streamed_bytes(skeleton.abstract_streamed(), embedded, mask)
        return program_bytes(umt5.run_encoder.lower(*nnx.split(skeleton.abstract()), embedded, mask).compile())

    @functools.cache
    def diffusion(streamed: bool, embeddings_offloaded: bool) -> int:
        n = workload.batch * (1 + workload.guided)
        latents = jax.ShapeDtypeStruct((n, *workload.latents), jnp.float32)
        embedding = jax.ShapeDtypeStruct((n, TEXT_LEN, c.text_dim), c.dtype)
        if streamed:
            times = jax.ShapeDtypeStruct((n,), jnp.float32)
            images = image_shapes(c, configs.vae, latents.shape)
            network = streamed_bytes(wan_skeleton(c).abstract_streamed(), latents, times, embedding, **images)
        else:
            network = program_bytes(compile_sampler(embeddings_offloaded))
        return max(network + tree_bytes((latents, embedding)), autotuning_bytes(c, workload))

    @functools.cache
    def vae(tiled: bool) -> int:
        compile_vae = compile_tiles if tiled else vae_model.compile_decoding
        programs = compile_vae(vae_skeleton(configs.vae).abstract(), (1, *workload.latents), as_uint8=True)
        return max(program_bytes(program) + argument_bytes(program) for program in programs)

    return lambda residency: TemporaryMemory(
        text(residency.text_streamed),
        diffusion(residency.transformer_streamed, residency.embeddings_offloaded),
        vae(residency.vae_tiled),
        image_bytes(configs, workload),
    )


def streamed_bytes(model: offload.Streamed, *inputs: jax.ShapeDtypeStruct, **more: jax.ShapeDtypeStruct) -> int:
    """Returns the bytes of the largest of a streamed model's three programs, with the results that the others keep."""
    first = offload.embed.lower(model.graph, model.state, inputs, more)
    x, context, rest = jax.eval_shape(functools.partial(offload.embed, model.graph), model.state, inputs, more)
    blocks, index = model.blocks, jax.ShapeDtypeStruct((), jnp.int32)
    block = offload.run_block.lower(blocks.graph, blocks.resident, blocks.layers[0], index, x, context)
    last = offload.unembed.lower(model.graph, model.state, x, rest)
    return max(
        program_bytes(first.compile()),
        tree_bytes((x, context, rest)) + program_bytes(block.compile()),
        tree_bytes((x, rest)) + program_bytes(last.compile()),
    )


def program_bytes(program: Any) -> int:
    """Returns the bytes that a compiled program allocates beside its arguments."""
    memory = program.memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes


def argument_bytes(program: Any) -> int:
    """Returns the bytes of a program's arguments but the first, the weights."""
    arguments, _ = program.args_info
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(arguments[1:]))

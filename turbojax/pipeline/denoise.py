"""From noise to latents: the steps by a transformer that is on the device or streamed to it.

B batch; latents `[B, 1 + (frames - 1) / 4, height / 8, width / 8, 16]`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx

from turbojax.diffusion import RCM, Embed, Sampler, Schedule, Velocity, guide, normal, unembedded
from turbojax.errors import UserError
from turbojax.models.image_condition import image_shapes
from turbojax.models.offload import Streamed, embeddings_to_device
from turbojax.models.published import ModelConfigs
from turbojax.models.umt5 import TEXT_LEN
from turbojax.models.wan import TimeEmbedding, WanModel, patch_grid
from turbojax.pipeline.request import Request
from turbojax.weights.skeleton import wan_skeleton


class Denoiser(NamedTuple):
    """A network as the steps of a sampler call it, `velocity(x, embed(timesteps)[i])`."""

    velocity: Velocity
    embed: Embed


MakeVelocity = Callable[[jax.Array, jax.Array, dict[str, jax.Array]], Denoiser]  # of latents, text and images


def resident(graph: Any, state: Any, latents: jax.Array, text: jax.Array, images: dict[str, jax.Array]) -> Denoiser:
    """Makes the denoiser of a split transformer, under a trace; what the steps share is computed here."""
    state = embeddings_to_device(state)
    network: WanModel = nnx.merge(graph, state)
    context = network.prepare(text, patch_grid(latents, network.config.patch), clip=images.get("clip"))

    def velocity(x: jax.Array, time: TimeEmbedding) -> jax.Array:
        network: WanModel = nnx.merge(graph, state)  # a module belongs to the trace that it was made in
        every = TimeEmbedding(*(jnp.broadcast_to(a[None], (len(x), *a.shape)) for a in time))
        return network.velocity(x, every, context, y=images.get("y"))

    return Denoiser(velocity, network.embed_time)


def streamed(
    network: Streamed,
    before_step: Callable[[], None],
    latents: jax.Array,
    text: jax.Array,
    images: dict[str, jax.Array],
) -> Denoiser:
    """Makes the denoiser of a transformer whose blocks come from host memory, without a trace."""

    def velocity(x: jax.Array, timestep: jax.Array) -> jax.Array:
        before_step()
        return network(x, jnp.full(len(x), timestep), text, **images)

    return Denoiser(velocity, unembedded)


def sample(graph: Any, sampler: Sampler, span: tuple[int, int], state: Any, *arguments: Any) -> jax.Array:
    """Runs `denoise` by a split transformer, to be compiled: one scan over the steps."""
    return denoise(functools.partial(resident, graph, state), sampler, span, *arguments)


def denoise(
    make_velocity: MakeVelocity,
    sampler: Sampler,
    span: tuple[int, int],
    latents: jax.Array,
    text: jax.Array,
    negative: jax.Array | None,
    guidance_scale: jax.Array,
    key: jax.Array,
    noise: jax.Array | None,
    schedule: Schedule | None,
    images: dict[str, jax.Array],
    *,
    scan: bool = True,
) -> jax.Array:
    """Takes latents `[B, t, h, w, c]` through the steps [start, stop) of `span`, by text `[B, 512, D]`.

    make_velocity: `resident` or, with scan=False, `streamed`, of a transformer. negative: embedding of the negative
    prompt, None without guidance. schedule: of a sampler with the same `canonical`, None for this one's own. images:
    what the network takes of images, see `turbojax.models.image_condition`; one serves the whole batch.
    """
    batch = latents.shape[0]
    texts = text if negative is None else jnp.concatenate((text, negative))
    images = {name: jnp.broadcast_to(a, (len(texts), *a.shape[1:])) for name, a in images.items()}
    network, embed = make_velocity(latents, texts, images)

    def velocity(x: jax.Array, time: Any) -> jax.Array:
        if negative is None:
            return network(x, time)
        both = network(jnp.concatenate((x, x)), time)
        return guide(both[:batch], both[batch:], guidance_scale)

    start, stop = span
    return sampler.sample(
        velocity, latents, key=key, noise=noise, schedule=schedule, start=start, stop=stop, embed=embed, scan=scan
    )


def with_topk(transformer: Any, sla_topk: float | None) -> Any:
    """Returns the transformer, streamed or not, with another sla_topk; the weights are shared."""
    config = transformer.config
    if sla_topk is None or sla_topk == config.sla_topk:
        return transformer
    if config.attention_type == "original":
        raise UserError(f"{sla_topk=} has no effect on attention_type='original'; load with attention_type='sla'")
    skeleton = wan_skeleton(dataclasses.replace(config, sla_topk=sla_topk))
    if isinstance(transformer, Streamed):
        return skeleton.restructured(transformer)
    return nnx.merge(skeleton.graph, nnx.state(transformer))


def sampler_arguments(
    request: Request,
    configs: ModelConfigs,
    text: jax.Array,
    *,
    negative: jax.Array | None,
    images: dict[str, jax.Array],
) -> tuple:
    """Makes the arguments of `sample` besides the network.

    text, negative: embeddings `[B, 512, D]` of the prompts and, with guidance, of the negative prompt.
    """
    sampler, shape = request.sampler_for(configs.transformer), request.shape(configs.vae)
    latents, noise = request.latents, request.noise
    if request.sample_index:
        draws = sampler.num_steps if isinstance(sampler, RCM) and not sampler.ode else 0
        index = np.uint32(request.sample_index)
        own, own_noise, step_key = draw_later(seed_words(request.seed), shape, index, draws)
        state = sampler.initial(own if latents is None else jnp.asarray(latents))
        noise = own_noise if noise is None else noise
    else:
        state, step_key = first_state(sampler, shape, request.seed)
        state = state if latents is None else sampler.initial(jnp.asarray(latents))
    noise = None if noise is None else jnp.asarray(noise)
    timesteps, coefficients = sampler.schedule()  # on the host: no programs for small numbers
    schedule = timesteps, tuple(a.astype(state.dtype) for a in coefficients)
    guidance_scale = np.asarray(request.guidance_scale, np.float32)
    return state, text, negative, guidance_scale, step_key, noise, schedule, images


def abstract_arguments(request: Request, configs: ModelConfigs) -> tuple:
    """Returns shapes and dtypes of `sampler_arguments`."""
    shape = request.shape(configs.vae)
    text = jax.ShapeDtypeStruct((shape[0], TEXT_LEN, configs.text.dim), configs.text.dtype)

    def arguments(text: jax.Array, images: dict[str, jax.Array]) -> tuple:
        return sampler_arguments(request, configs, text, negative=text if request.guided else None, images=images)

    return jax.eval_shape(arguments, text, image_shapes(configs.transformer, configs.vae, (1, *shape[1:])))


def first_state(sampler: Sampler, shape: tuple[int, ...], seed: int) -> tuple[jax.Array, jax.Array]:
    """Draws the state before the first step from a seed, and the key of the steps."""
    noise, step_key = draw(seed_words(seed), shape)
    return sampler.initial(noise), step_key


def seed_words(seed: int) -> np.ndarray:
    """Returns the high and the low half of a seed, uint32 `[2]`."""
    return np.array([int(seed) >> 32, int(seed) & 0xFFFFFFFF], np.uint32)


def keys_of(seed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the keys of the latents and of the steps; of a seed of 32 bits, those of `jax.random.key(seed)`."""
    first_key, step_key = jax.random.split(jax.random.wrap_key_data(seed, impl="threefry2x32"))
    return first_key, step_key


@functools.partial(jax.jit, static_argnums=1)
def draw(seed: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Draws standard normal float32 of this shape, and the key of the steps."""
    first_key, step_key = keys_of(seed)
    return normal(first_key, shape), step_key


@functools.partial(jax.jit, static_argnums=(1, 3))
def draw_later(
    seed: jax.Array, shape: tuple[int, ...], sample: jax.Array, steps: int
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """Draws the latents of a seed's batch from a sample on, their noise `[steps, *shape]`, and the key of the steps.

    They are those parts of what `draw` and the sampler draw for a batch that has these samples: JAX numbers the places
    of a draw, and the bits of place i are those of the key folded with i.
    """
    first_key, step_key = keys_of(seed)
    start = sample * np.uint32(math.prod(shape[1:]))
    places = start + jnp.arange(math.prod(shape), dtype=jnp.uint32)

    def normal_there(key: jax.Array) -> jax.Array:
        high, low = jax.random.key_data(jax.vmap(jax.random.fold_in, (None, 0))(key, places)).T
        mantissa = (high ^ low) >> 9 | np.uint32(0x3F800000)
        below_one = jax.lax.bitcast_convert_type(mantissa, jnp.float32) - np.float32(1)
        least = np.nextafter(np.float32(-1), np.float32(0))
        uniform = jnp.maximum(least, below_one * (np.float32(1) - least) + least)
        return (np.float32(np.sqrt(2)) * jax.lax.erf_inv(uniform)).reshape(shape)

    step_keys = [jax.random.fold_in(step_key, i) for i in range(steps)]
    noise = jnp.stack([normal_there(key) for key in step_keys]) if steps else None
    return normal_there(first_key), noise, step_key


def sampler_program(
    sampler: Sampler, span: tuple[int, int], transformer: WanModel, arguments: tuple
) -> tuple[Hashable, Callable[[], Any]]:
    """Returns the name of the compiled `sample` for these settings and shapes, and the function that compiles it.

    Samplers with the same `canonical` share it: their times are among the arguments. Neither the transformer nor the
    arguments need be more than shapes.
    """
    graph, state = nnx.split(transformer)
    sampler = sampler.canonical
    shapes = jax.tree.map(lambda a: (a.shape, a.dtype), arguments)
    name = (sampler, span, transformer.config, jax.tree.structure(shapes), tuple(jax.tree.leaves(shapes)))

    def build() -> Any:
        logging.info("Compiling the sampler: %s, steps %d to %d", type(sampler).__name__, span[0] + 1, span[1])
        return jax.jit(sample, static_argnums=(0, 1, 2)).lower(graph, sampler, span, state, *arguments).compile()

    return name, build

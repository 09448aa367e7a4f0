"""The autoencoder in spatial tiles, for small GPUs: each overlaps its neighbours and passes into them.

A tile runs through the whole clip before the next one begins, so the cache of one tile is all that the device holds.
The attention in the middle sees a whole frame; it is small and runs untiled before the decoder's tiles and after the
encoder's. Near a cut a tile sees zeros where the picture goes on. The error fades within a few latents and is gone
after 13 in the decoder and 9 in the encoder, the convolutions' reach; so the ends of an overlap are not used at all,
and weights change along its middle half.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Float32, Num

from turbojax.errors import UserError
from turbojax.kernels.sizes import cdiv
from turbojax.models.vae import CHUNK, WanVAE, check_latents, check_video, chunk_sizes, part_of, run_decoder
from turbojax.models.vae_layers import Cache


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Largest side of a tile and least overlap of neighbours, in latents (8 pixels each)."""

    size: int = 48
    overlap: int = 16

    def __post_init__(self):
        if not 0 <= self.overlap <= self.size / 2 or self.size < 1:
            raise UserError(
                f"a tile of {self.size} latents cannot overlap by {self.overlap}; give 0 to {self.size // 2}"
            )


class Cut(NamedTuple):
    """Tiles along one axis, all of one side, so that they compile as one."""

    side: int
    starts: tuple[int, ...]


def cut(length: int, tiling: Tiling) -> Cut:
    """Returns as few tiles as do, as small as they may be, evenly placed."""
    if length <= tiling.size:
        return Cut(length, (0,))
    count = cdiv(length - tiling.overlap, tiling.size - tiling.overlap)
    side = cdiv(length + (count - 1) * tiling.overlap, count)
    return Cut(side, tuple(i * (length - side) // (count - 1) for i in range(count)))


def tile_sides(shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns height and width of the tiles of latents `[h, w]`."""
    rows, columns = (cut(length, Tiling()) for length in shape)
    return rows.side, columns.side


def decode_tiled(
    vae: WanVAE, latents: jax.Array | np.ndarray, *, tiling: Tiling = Tiling(), as_uint8: bool = False
) -> Num[np.ndarray, "b t h w 3"]:
    """Decodes in tiles, as `turbojax.models.vae.decode`; the video `[b, 1 + 4n, 8h, 8w, 3]` is joined on the host."""
    check_latents(latents.shape, vae.config)
    graph, state = nnx.split(vae)
    sizes = (1, *chunk_sizes(latents.shape[1] - 1, CHUNK))
    rows, columns = (cut(length, tiling) for length in latents.shape[2:4])
    features = in_chunks(functools.partial(run_decoder, graph, state, half=0), latents, sizes)
    second = functools.partial(run_decoder, graph, state, half=1, as_uint8=as_uint8)
    units = 1, vae.config.spatial_factor
    return in_tiles(lambda x: in_chunks(second, x, sizes), features, rows, columns, units=units)


def compile_tiles(vae: WanVAE, shape: tuple[int, ...], *, as_uint8: bool = False) -> list[jax.stages.Compiled]:
    """Compiles what `decode_tiled` runs for latents of a shape `[b, 1 + n, h, w, z_dim]`; vae may be abstract."""
    check_latents(shape, vae.config)
    graph, state = nnx.split(vae)
    x, programs = jax.ShapeDtypeStruct((shape[0], CHUNK, *shape[2:]), jnp.float32), []
    for half in (0, 1):
        options = {"half": half, "as_uint8": as_uint8 and half == 1}
        y, cache = jax.eval_shape(functools.partial(run_decoder, graph, **options), state, x, None)
        programs += [run_decoder.lower(graph, state, x, past, **options).compile() for past in (None, cache)]
        x = jax.ShapeDtypeStruct((*y.shape[:2], *tile_sides(shape[2:4]), y.shape[-1]), y.dtype)
    return programs


def encode_tiled(
    vae: WanVAE, video: jax.Array | np.ndarray, *, tiling: Tiling = Tiling()
) -> Float[np.ndarray, "b t h w z"]:
    """Encodes in tiles, as `turbojax.models.vae.encode`; the latents `[b, 1 + n, h/8, w/8, z_dim]` lie on the host."""
    check_video(video.shape, vae.config)
    graph, state = nnx.split(vae)
    factor, unit = vae.config.temporal_factor, vae.config.spatial_factor
    sizes = chunk_sizes((video.shape[1] - 1) // factor, CHUNK)
    frames = (1, *(factor * size for size in sizes))
    rows, columns = (cut(length // unit, tiling) for length in video.shape[2:4])
    first = functools.partial(_encode_half, graph, state, half=0)
    features = in_tiles(lambda x: in_chunks(first, x, frames), video, rows, columns, units=(unit, 1))
    return in_chunks(functools.partial(_encode_half, graph, state, half=1), features, (1, *sizes))


@functools.partial(jax.jit, static_argnames=("graph", "half"), donate_argnames="cache")
def _encode_half(graph, state, x: jax.Array, cache: Cache | None, *, half: int) -> tuple[jax.Array, Cache]:
    """Half 0 ends with the last change of resolution, half 1 is what follows at the latents' resolution."""
    vae, first = nnx.merge(graph, state), cache is None
    *larger, last = range(len(vae.encoder.stages))
    stages = (larger, [last])[half]
    if first:
        height, width = (size * (1, vae.config.spatial_factor)[half] for size in x.shape[2:4])
        blocks = range(vae.encoder.stages[stages[0]].start, vae.encoder.stages[stages[-1]].stop)
        cache = part_of(vae.encoder.init_cache(x.shape[0], height, width), blocks)
    for stage in stages:
        x, cache = vae.encode_chunk(x, cache, first=first, stage=stage)
    return x, cache


def in_chunks(
    step: Callable[[jax.Array, Cache | None], tuple[jax.Array, Cache]], x: jax.Array | np.ndarray, sizes: Sequence[int]
) -> np.ndarray:
    """Runs step on a clip's chunks, with the cache from one to the next; the results `[b, t, h, w, c]` on the host."""
    cache, start, results = None, 0, []
    for size in sizes:
        y, cache = step(jnp.asarray(x[:, start : start + size]), cache)
        y.copy_to_host_async()
        results.append(y)
        start += size
    return np.concatenate([np.asarray(y) for y in results], axis=1)


def in_tiles(
    run: Callable[[jax.Array | np.ndarray], np.ndarray],
    x: jax.Array | np.ndarray,
    rows: Cut,
    columns: Cut,
    *,
    units: tuple[int, int],
) -> np.ndarray:
    """Joins the results of run on tiles of x `[b, t, h, w, c]`; units: of x and of the result, in a latent."""
    unit_in, unit_out = units
    width = columns.side * unit_in

    def strip(y: int) -> np.ndarray:
        row = x[:, :, y * unit_in : (y + rows.side) * unit_in]
        return joined(lambda x: run(row[:, :, :, x * unit_in :][:, :, :, :width]), columns, unit_out, axis=3)

    return joined(strip, rows, unit_out, axis=2)


def joined(part: Callable[[int], np.ndarray], cut: Cut, unit: int, *, axis: int) -> np.ndarray:
    """Joins part(start) of each start along an axis of `[b, t, h, w, c]`."""
    first = part(0)
    if len(cut.starts) == 1:
        return first
    shape, filled = list(first.shape), cut.side * unit
    shape[axis] = (cut.starts[-1] + cut.side) * unit
    whole = np.empty(shape, first.dtype)
    lines = lambda a, start, stop: a[(slice(None),) * axis + (slice(start, stop),)]  # noqa: E731
    lines(whole, 0, filled)[...] = first
    for begin in (start * unit for start in cut.starts[1:]):
        new, weight = part(begin // unit), blend_weights(filled - begin)
        low, high = np.count_nonzero(weight == 0), np.count_nonzero(weight < 1)  # between them tiles are mixed
        weight = weight[low:high].reshape(-1, *[1] * (4 - axis))
        for t in range(shape[1]):  # a frame at a time is small in float32
            old = lines(whole[:, t : t + 1], begin + low, begin + high)
            mixed = old + weight * (lines(new[:, t : t + 1], low, high).astype(np.float32) - old.astype(np.float32))
            old[...] = np.round(mixed) if whole.dtype == np.uint8 else mixed
        filled = begin + cut.side * unit
        lines(whole, begin + high, filled)[...] = lines(new, high, None)
    return whole


def blend_weights(length: int) -> Float32[np.ndarray, " {length}"]:
    """Returns the weights of the later tile along an overlap: 0 in the first quarter, 1 in the last, linear between."""
    position = (np.arange(length, dtype=np.float32) + 0.5) / max(length, 1)
    return np.clip(2 * position - 0.5, 0, 1)

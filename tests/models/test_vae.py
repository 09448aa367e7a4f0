"""The Wan 2.1 autoencoder: parity with the reference, chunks, cache, names, shapes."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.closeness import relative_error
from tests.golden_io import GOLDEN, load
from tests.parity.vae import build, fixture_vae, recompute, weights_of
from turbojax.errors import CheckpointError, UserError
from turbojax.models import vae as vae_module
from turbojax.models.sizes import tree_bytes
from turbojax.models.vae import (
    VAEConfig,
    WanVAE,
    chunk_sizes,
    decode,
    decode_chunks,
    encode,
    to_uint8,
)
from turbojax.models.vae_layers import ChannelNorm, conv_over_time, join_frames
from turbojax.weights.rules import TensorKey, assign
from turbojax.weights.vae import VAE_DIFFUSERS, VAE_OFFICIAL, detect_vae_config, vae_rules

pytestmark = pytest.mark.usefixtures("exact_matmuls")

FILE = GOLDEN / "vae.safetensors"


@pytest.fixture(scope="module")
def golden():
    return load(FILE)


@pytest.fixture(scope="module")
def weights(golden):
    return weights_of(golden[1])


@pytest.fixture(scope="module")
def vae(golden):
    return fixture_vae(golden[1])


# Of the fixture's sizes, so that the functions compiled for it serve again.
@pytest.fixture(scope="module")
def latents():
    return jax.random.normal(jax.random.key(0), (1, 5, 4, 6, 16))


@pytest.fixture(scope="module")
def video():
    return jax.random.uniform(jax.random.key(1), (1, 17, 32, 48, 3), minval=-1, maxval=1)


def test_matches_the_reference(golden):
    config, t = golden
    results = recompute(config, t)
    assert set(results) == {key for key in t if key.startswith("out.")}
    for key, (value, tolerance) in results.items():
        assert value.shape == t[key].shape
        np.testing.assert_allclose(value, t[key], rtol=0, atol=tolerance, err_msg=key)


def test_default_statistics_are_the_recorded_ones(golden):
    _, t = golden
    np.testing.assert_array_equal(np.float32(VAEConfig.wan2_1().mean), t["in.mean"])
    np.testing.assert_array_equal(np.float32(VAEConfig.wan2_1().std), t["in.std"])


@pytest.mark.parametrize(("size", "stride"), [((3, 3, 3), 1), ((3, 1, 1), 1), ((3, 1, 1), 2)])
def test_convolution_over_time_is_the_3d_one(size, stride):
    """Joining frames on channels is the 3-D convolution without padding in time."""
    keys = jax.random.split(jax.random.key(2), 3)
    x = jax.random.normal(keys[0], (2, 7, 4, 6, 5))
    kernel, bias = jax.random.normal(keys[1], (*size, 5, 8)), jax.random.normal(keys[2], (8,))
    space = [(n // 2, n // 2) for n in size[1:]]
    dims = ("NDHWC", "DHWIO", "NDHWC")
    expected = jax.lax.conv_general_dilated(x, kernel, (stride, 1, 1), [(0, 0), *space], dimension_numbers=dims)
    expected = expected + bias[None, None, None, None]
    joined = join_frames(x, len(kernel), stride=stride)
    np.testing.assert_allclose(conv_over_time(joined, kernel, bias), expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize("chunk", [1, 2])
def test_chunks_do_not_change_the_decoded_clip(vae, latents, chunk):
    whole = np.asarray(decode(vae, latents, chunk=4))
    assert whole.shape == (1, 17, 32, 48, 3)
    pieces = list(decode_chunks(vae, latents, chunk=chunk))
    assert [p.shape[1] for p in pieces] == [1, *(4 * n for n in chunk_sizes(4, chunk))]
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole, rtol=0, atol=1e-4 * np.ptp(whole))


@pytest.mark.parametrize("chunk", [1, 2])
def test_chunks_do_not_change_the_latents(vae, video, chunk):
    whole = np.asarray(encode(vae, video, chunk=4))
    assert whole.shape == (1, 5, 4, 6, 16)
    assert whole.dtype == np.float32
    np.testing.assert_allclose(encode(vae, video, chunk=chunk), whole, rtol=0, atol=1e-4 * np.ptp(whole))


def test_later_frames_do_not_change_earlier_ones(vae, latents):
    """Causality: a clip's beginning decodes alike with and without the rest."""
    whole = decode(vae, latents, chunk=2)
    np.testing.assert_allclose(decode(vae, latents[:, :3], chunk=2), whole[:, :9], rtol=0, atol=1e-5)


def test_one_latent_is_one_frame(vae, latents, video):
    assert decode(vae, latents[:, :1]).shape == (1, 1, 32, 48, 3)
    assert encode(vae, video[:, :1]).shape == (1, 1, 4, 6, 16)


def test_host_arrays_of_other_dtypes_are_welcome(vae, video):
    pixels = np.asarray(video[:, :9])
    expected = encode(vae, video[:, :9])
    np.testing.assert_array_equal(encode(vae, pixels), expected)
    assert relative_error(encode(vae, pixels.astype(np.float16)), expected) < 1e-2
    assert relative_error(decode(vae, np.float64(expected)), decode(vae, expected)) == 0


def test_cache_keeps_its_size():
    """However many latents a chunk has, the cache comes out with the shapes that went in."""
    config = VAEConfig(dim=8)
    vae = nnx.eval_shape(lambda: WanVAE(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(vae)

    def after(coder, n, first):
        def run(state):
            vae = nnx.merge(graph, state)
            if coder == "decode":
                return vae.decode_chunk(jnp.zeros((1, n, 4, 4, 16)), vae.decoder.init_cache(1, 4, 4), first=first)
            video = jnp.zeros((1, 4 * n - 3 if first else 4 * n, 32, 32, 3))
            return vae.encode_chunk(video, vae.encoder.init_cache(1, 32, 32), first=first)

        x, cache = jax.eval_shape(run, state)
        return x.shape[1], jax.tree.map(lambda a: (a.shape, a.dtype), cache)

    for coder, frames in (("decode", 4), ("encode", 1)):
        start = vae.decoder.init_cache(1, 4, 4) if coder == "decode" else vae.encoder.init_cache(1, 32, 32)
        start = jax.tree.map(lambda a: (a.shape, a.dtype), start)
        assert after(coder, 1, True) == (1, start)
        assert after(coder, 3, True) == (1 + 2 * frames, start)
        assert after(coder, 1, False) == (frames, start)
        assert after(coder, 7, False) == (7 * frames, start)


def test_second_clip_compiles_nothing(vae, latents):
    decode(vae, latents, chunk=2)
    compiled = vae_module.run_decoder._cache_size()
    decode(nnx.merge(*nnx.split(vae)), latents + 1, chunk=2)
    assert vae_module.run_decoder._cache_size() == compiled


@pytest.mark.parametrize(("n", "chunk", "sizes"), [(20, 4, (4,) * 5), (6, 4, (3, 3)), (7, 4, (4, 3)), (0, 4, ())])
def test_chunk_sizes(n, chunk, sizes):
    assert chunk_sizes(n, chunk) == sizes


def test_levels_of_a_batch(vae, latents):
    """Frames as uint8, and samples that do not see each other."""
    batch = jnp.concatenate((latents, latents[:, :, :, ::-1]))
    levels = decode(vae, batch[:, :3], chunk=2, as_uint8=True)
    assert levels.shape == (2, 9, 32, 48, 3)
    assert levels.dtype == jnp.uint8
    for got, z in zip(levels, batch, strict=True):
        frames = np.asarray(decode(vae, z[None, :3], chunk=2)[0])
        expected = np.clip(np.round((frames + 1) * 127.5), 0, 255)
        np.testing.assert_allclose(np.asarray(got, np.int32), expected, atol=1)
    ends = to_uint8(jnp.asarray([-7.0, -1.0, 0.0, 1.0, 7.0], jnp.bfloat16))
    np.testing.assert_array_equal(ends, [0, 0, 128, 255, 255])


def test_bfloat16_stays_close(vae, weights, latents, video):
    half = build(weights, detect_vae_config(weights))
    assert half.config.dtype == jnp.bfloat16
    frames = decode(half, latents[:, :3], chunk=2)
    assert frames.dtype == jnp.bfloat16
    assert relative_error(frames, decode(vae, latents[:, :3], chunk=2)) < 0.03
    assert relative_error(encode(half, video[:, :9]), encode(vae, video[:, :9])) < 0.03


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_constant_input_gives_numbers(vae, value):
    assert np.isfinite(encode(vae, np.full((1, 9, 32, 48, 3), value))).all()
    assert np.isfinite(decode(vae, np.full((1, 3, 4, 6, 16), value))).all()


def test_norm_of_nothing_is_nothing():
    x = jnp.zeros((1, 1, 2, 2, 8), jnp.bfloat16)
    np.testing.assert_array_equal(ChannelNorm(8)(x).astype(jnp.float32), np.zeros((1, 1, 2, 2, 8)))


def test_bad_inputs(vae):
    with pytest.raises(UserError, match=r"frames=8 must be 1 \+ a multiple of 4; nearest: 5, 9"):
        encode(vae, np.zeros((1, 8, 16, 16, 3)))
    with pytest.raises(UserError, match=r"height=20 must be a multiple of 8; nearest: 16, 24"):
        encode(vae, np.zeros((1, 5, 20, 16, 3)))
    with pytest.raises(UserError, match=r"width=4 must be a multiple of 8; nearest: 8$"):
        encode(vae, np.zeros((1, 5, 16, 4, 3)))
    with pytest.raises(UserError, match="batch, frames, height, width, 3"):
        encode(vae, np.zeros((1, 3, 5, 16, 16)))
    with pytest.raises(UserError, match="batch, latents, height, width, 16"):
        decode(vae, np.zeros((1, 16, 5, 2, 2)))
    with pytest.raises(UserError, match="chunk=0"):
        decode_chunks(vae, np.zeros((1, 2, 2, 2, 16)), chunk=0)  # raises at the call, not at the first piece
    with pytest.raises(UserError, match="3 flags"):
        VAEConfig(temporal_downsample=(True,))
    with pytest.raises(UserError, match="z_dim=8"):
        VAEConfig(z_dim=8)


# Names


def diffusers_name(name: str) -> str:
    """An official name as AutoencoderKLWan calls it; written apart from turbojax.weights.vae's tables."""
    head = {
        "conv1": "quant_conv",
        "conv2": "post_quant_conv",
        "encoder.conv1": "encoder.conv_in",
        "decoder.conv1": "decoder.conv_in",
        "encoder.head.0": "encoder.norm_out",
        "decoder.head.0": "decoder.norm_out",
        "encoder.head.2": "encoder.conv_out",
        "decoder.head.2": "decoder.conv_out",
    }
    path, leaf = name.rsplit(".", 1)
    if path in head:
        return f"{head[path]}.{leaf}"
    half, kind, index, rest = path.split(".", 3)
    if kind == "middle":
        block = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}[index]
        block = f"mid_block.{block}"
    elif kind == "downsamples":
        block = f"down_blocks.{index}"
    else:
        stage, place = divmod(int(index), 4)
        block = f"up_blocks.{stage}." + ("upsamplers.0" if place == 3 else f"resnets.{place}")
    parts = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2"}
    return ".".join((half, block, parts.get(rest, "conv_shortcut" if rest == "shortcut" else rest), leaf))


def released_shapes() -> dict[str, tuple[int, ...]]:
    """The layout of Wan2.1_VAE.pth, written out from the fixture's names with the released width."""
    _, t = load(FILE)

    def widen(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        fixed = {3, 16, 32}  # colours and latents; only these convolutions have them
        ends = {"conv1", "conv2", "encoder.head.2", "decoder.conv1", "encoder.conv1", "decoder.head.2"}
        path = name.rsplit(".", 1)[0]
        outer = [96 * n // 8 for n in shape[:2]]
        if path in ends and not (path == "encoder.conv1" and len(shape) == 1):
            outer = {
                "conv1": [32, 32],
                "conv2": [16, 16],
                "encoder.conv1": [96, 3],
                "encoder.head.2": [32, 384],
                "decoder.conv1": [384, 16],
                "decoder.head.2": [3, 96],
            }[path][: len(shape)]
            assert fixed & set(outer) or len(shape) == 1
        if name.endswith("gamma"):
            return (outer[0], *shape[1:])
        return (*outer[: len(shape)], *shape[2:])

    return {name: widen(name, w.shape) for name, w in weights_of(t).items()}


def test_diffusers_names_give_the_same_model(weights, vae):
    renamed = {diffusers_name(name): value for name, value in weights.items()}
    assert len(renamed) == len(weights)
    assert vae_rules(weights) is VAE_OFFICIAL
    assert vae_rules(renamed) is VAE_DIFFUSERS
    assert detect_vae_config(renamed) == detect_vae_config(weights)
    same = jax.tree.map(np.array_equal, nnx.state(build(renamed)), nnx.state(vae))
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("naming", [lambda name: name, diffusers_name])
def test_released_layout_fills_the_released_model(naming):
    """Shapes only: every parameter of the full size is filled exactly once."""
    tensors = {naming(name): np.broadcast_to(np.float32(0), shape) for name, shape in released_shapes().items()}
    config = detect_vae_config(tensors)
    assert config == VAEConfig.wan2_1()
    state = nnx.state(nnx.eval_shape(lambda: WanVAE(config, rngs=nnx.Rngs(0))))
    parameters = {".".join(map(str, path)): value for path, value in nnx.to_flat_state(state)}
    expected = {TensorKey(name, None): value for name, value in parameters.items()}
    assert len(assign(tensors, vae_rules(tensors), expected, what="vae")) == len(tensors) == 194
    assert sum(math.prod(value.shape) for value in parameters.values()) == 126_892_531
    assert all(
        value.dtype == (jnp.float32 if name.endswith("gamma") else jnp.bfloat16) for name, value in parameters.items()
    )


def test_full_size_shapes():
    """480 x 832 pixels: shapes of a chunk, and the cache's bytes in bf16."""
    graph, state = nnx.split(nnx.eval_shape(lambda: WanVAE(VAEConfig.wan2_1(), rngs=nnx.Rngs(0))))

    def run(state):
        vae = nnx.merge(graph, state)
        return vae.decode_chunk(jnp.zeros((1, 4, 60, 104, 16)), vae.decoder.init_cache(1, 60, 104), first=False)

    frames, cache = jax.eval_shape(run, state)
    assert frames.shape == (1, 16, 480, 832, 3)
    assert tree_bytes(cache) == 1_888_573_440


def test_damaged_and_foreign_files(weights):
    with pytest.raises(CheckpointError, match=r"no Wan 2\.1 autoencoder"):
        vae_rules({"blocks.0.norm3.weight": np.zeros(3)})
    with pytest.raises(CheckpointError, match=r"no Wan 2\.1 autoencoder"):
        detect_vae_config({})
    foreign = {name: w for name, w in weights.items() if not re.match(r"encoder\.downsamples", name)}
    with pytest.raises(CheckpointError, match=r"no Wan 2\.1 autoencoder"):
        detect_vae_config(foreign)
    missing = {name: w for name, w in weights.items() if name != "decoder.head.2.bias"}
    with pytest.raises(CheckpointError, match=r"1 missing: decoder\.conv_out\.bias"):
        build(missing)

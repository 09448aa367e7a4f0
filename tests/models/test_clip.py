"""The CLIP image encoder against a plain NumPy implementation in float64, its checkpoints' names, its full size."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from tests.closeness import relative_error
from tests.weights.checkpoints import save
from turbojax.errors import CheckpointError, UserError
from turbojax.models.clip import PIXEL_MEAN, PIXEL_STD, CLIPConfig, CLIPVision, cubic_taps, encode_image, prepare
from turbojax.weights.encoders import load_encoder, open_clip
from turbojax.weights.layouts import clip_layout, generated

pytestmark = pytest.mark.usefixtures("exact_matmuls")

SMALL = CLIPConfig(dim=160, mlp_dim=192, num_heads=2, num_layers=2, image_size=42, patch=14, dtype=jnp.float32)

TRANSFORMERS_NAMES = {  # of a layer, besides to_qkv
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}


@pytest.fixture(scope="module")
def official():
    """A checkpoint as published: one layer more than runs, its head, and a text encoder."""
    layout = clip_layout(dataclasses.replace(SMALL, num_layers=SMALL.num_layers + 1))
    rest = {
        "visual.post_norm.weight": (SMALL.dim,),
        "visual.post_norm.bias": (SMALL.dim,),
        "visual.head": (SMALL.dim, 8),
        "textual.token_embedding.weight": (5, 4),
        "textual.blocks.0.attn.q.weight": (4, 4),
        "log_scale": (),
    }
    return dict(generated(layout, np.float32)) | {name: np.ones(shape, np.float32) for name, shape in rest.items()}


def transformers(official: dict) -> dict:
    """The same under the names of transformers' CLIPVisionModel."""
    dim = SMALL.dim
    out = {
        "vision_model.embeddings.class_embedding": official["visual.cls_embedding"].reshape(dim),
        "vision_model.embeddings.position_embedding.weight": official["visual.pos_embedding"][0],
        "vision_model.embeddings.patch_embedding.weight": official["visual.patch_embedding.weight"],
        "vision_model.embeddings.position_ids": np.arange(SMALL.tokens)[None],
    }
    for part in ("weight", "bias"):
        out[f"vision_model.pre_layrnorm.{part}"] = official[f"visual.pre_norm.{part}"]
        out[f"vision_model.post_layernorm.{part}"] = official[f"visual.post_norm.{part}"]
        for i in range(SMALL.num_layers + 1):
            ours, theirs = f"visual.transformer.{i}", f"vision_model.encoder.layers.{i}"
            for name, other in TRANSFORMERS_NAMES.items():
                out[f"{theirs}.{other}.{part}"] = official[f"{ours}.{name}.{part}"]
            for name, value in zip("qkv", np.split(official[f"{ours}.attn.to_qkv.{part}"], 3), strict=True):
                out[f"{theirs}.self_attn.{name}_proj.{part}"] = value
    return out


def definition(w: dict, image: np.ndarray) -> np.ndarray:
    """The encoder's definition in float64, from the published weights and the resized, normalised image [S, S, 3]."""
    w = {name.removeprefix("visual."): np.float64(value) for name, value in w.items() if name.startswith("visual.")}

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    erf = np.vectorize(math.erf)
    size, heads = SMALL.patch, SMALL.num_heads
    rows = [w["cls_embedding"].reshape(-1)]
    for i in range(0, image.shape[0], size):
        for j in range(0, image.shape[1], size):
            patch = np.float64(image[i : i + size, j : j + size]).transpose(2, 0, 1)
            rows.append((w["patch_embedding.weight"] * patch).sum((1, 2, 3)))
    x = norm(np.stack(rows) + w["pos_embedding"][0], "pre_norm")
    for i in range(SMALL.num_layers):
        layer = f"transformer.{i}"
        qkv = np.split(linear(norm(x, f"{layer}.norm1"), f"{layer}.attn.to_qkv"), 3, axis=1)
        outs = []
        for q, k, v in zip(*(np.split(a, heads, axis=1) for a in qkv), strict=True):
            scores = np.exp(q @ k.T / math.sqrt(q.shape[1]))
            outs.append(scores / scores.sum(1, keepdims=True) @ v)
        x = x + linear(np.concatenate(outs, axis=1), f"{layer}.attn.proj")
        h = linear(norm(x, f"{layer}.norm2"), f"{layer}.mlp.0")
        x = x + linear(h * (1 + erf(h / math.sqrt(2))) / 2, f"{layer}.mlp.2")
    return x


def load_clip(path, **options):
    return load_encoder(open_clip(path, **options))


@pytest.mark.parametrize("names", [dict, transformers], ids=["official", "transformers"])
def test_equals_its_definition(tmp_path, official, names):
    clip = load_clip(save(tmp_path / "clip.safetensors", names(official)), dtype=jnp.float32)
    assert clip.config == SMALL
    image = np.random.default_rng(1).integers(0, 256, (50, 30, 3), np.uint8)
    tokens = encode_image(clip, image)
    assert tokens.shape == (1, SMALL.tokens, SMALL.dim)
    np.testing.assert_allclose(tokens[0], definition(official, prepare(image, 42)), rtol=0, atol=5e-5)


def test_half_precision(tmp_path, official):
    path = save(tmp_path / "clip.safetensors", official)
    image = np.random.default_rng(1).integers(0, 256, (30, 30, 3), np.uint8)
    exact = np.asarray(encode_image(load_clip(path, dtype=jnp.float32), image))
    half = encode_image(load_clip(path), image)
    assert half.dtype == jnp.float16
    assert relative_error(half, exact) < 3e-3


def test_resizing_is_bicubic_between_pixels():
    index, weights = cubic_taps(5, 5)
    assert (weights == [0, 1, 0, 0]).all()
    assert index[:, 1].tolist() == [0, 1, 2, 3, 4]
    index, weights = cubic_taps(4, 8)  # every result lies a quarter from a pixel
    np.testing.assert_allclose(weights[1], [-0.10546875, 0.87890625, 0.26171875, -0.03515625])
    assert index[0].tolist() == [0, 0, 0, 1]
    np.testing.assert_allclose(cubic_taps(1000, 7)[1].sum(1), 1, rtol=1e-6)  # no antialiasing: four taps at any ratio


def test_preparing():
    flat = prepare(np.full((3, 5, 3), 51, np.uint8), 8)
    np.testing.assert_allclose(flat, np.broadcast_to((0.2 - np.array(PIXEL_MEAN)) / PIXEL_STD, (8, 8, 3)), rtol=1e-5)
    image = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
    np.testing.assert_allclose(prepare(image, 8).swapaxes(0, 1), prepare(image.swapaxes(0, 1), 8), rtol=1e-4, atol=1e-5)
    # Pillow's cubic has a = -0.5 and other edges; enlarging a smooth image they agree within a level or two.
    smooth = np.asarray(Image.fromarray(image).resize((40, 40), Image.Resampling.BICUBIC))
    ours = prepare(smooth, 80) * np.array(PIXEL_STD) + np.array(PIXEL_MEAN)
    theirs = np.asarray(Image.fromarray(smooth).resize((80, 80), Image.Resampling.BICUBIC)) / 255
    assert np.abs(ours - theirs)[4:-4, 4:-4].max() < 0.03


def test_full_size():
    config = CLIPConfig.vit_h_14()
    state = nnx.state(nnx.eval_shape(lambda: CLIPVision(config, rngs=nnx.Rngs(0))))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state))
    layout = clip_layout(config)
    assert count == sum(map(math.prod, layout.values()))
    layer = sum(math.prod(shape) for name, shape in layout.items() if ".transformer.30." in name)
    assert count + layer + 2 * 1280 + 1280 * 1024 == 632_076_800  # as published, with the last layer, norm and head
    assert layout["visual.pos_embedding"] == (1, 257, 1280)
    assert layout["visual.transformer.30.attn.to_qkv.weight"] == (3840, 1280)
    assert "visual.transformer.31.norm1.weight" not in layout
    tokens = nnx.eval_shape(
        lambda images: CLIPVision(config, rngs=nnx.Rngs(0))(images), jnp.zeros((1, 224, 224, 3), jnp.float32)
    )
    assert (tokens.shape, tokens.dtype) == ((1, 257, 1280), jnp.float16)


def test_errors(tmp_path, official):
    with pytest.raises(CheckpointError, match=r"other\.safetensors: no CLIP image encoder"):
        load_clip(save(tmp_path / "other.safetensors", {"encoder.conv1.weight": np.zeros(3)}))
    broken = {name: value for name, value in official.items() if "transformer.1.attn.to_qkv.bias" not in name}
    with pytest.raises(CheckpointError, match="3 missing"):
        load_clip(save(tmp_path / "broken.safetensors", broken))
    del broken["visual.patch_embedding.weight"]
    with pytest.raises(CheckpointError, match="lacks visual"):
        load_clip(save(tmp_path / "broken.safetensors", broken))
    with pytest.raises(UserError, match="must divide"):
        CLIPConfig(image_size=225)

"""What is checked of a checkpoint's tensors before anything is made of them: types, and how many layers there are."""

import re

import ml_dtypes
import numpy as np
import pytest

from tests.weights.checkpoints import save, small, turbo
from turbojax.errors import CheckpointError
from turbojax.kernels.int8 import QuantConfig
from turbojax.models.clip import CLIPConfig
from turbojax.weights.encoders import open_clip, open_umt5, open_vae
from turbojax.weights.io import read_tensors
from turbojax.weights.layouts import clip_layout, generated
from turbojax.weights.load import open_wan
from turbojax.weights.lora import LoRA, read_lora
from turbojax.weights.rules import count_layers

CLIP = CLIPConfig(dim=160, mlp_dim=96, num_heads=2, num_layers=2, image_size=28, patch=14)


def refused(read, path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(path)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 2000
    return message


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.safetensors"
    return save(path, dict(generated(clip_layout(CLIP), np.float32)))


# Types


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.bool_])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_must_be_floating_point(tmp_path, demo, clip, suffix, dtype):
    files = {
        open_vae: (demo / "Wan2.1_VAE.pth", "decoder.head.2.bias"),
        open_umt5: (demo / "models_t5_umt5-xxl-enc-bf16.pth", "blocks.1.ffn.gate.0.weight"),
        open_clip: (clip, "visual.transformer.0.mlp.2.weight"),
        open_wan: (save(tmp_path / "wan.safetensors", turbo()), "blocks.1.cross_attn.o.weight"),
    }
    for read, (file, name) in files.items():
        tensors = dict(read_tensors(file))
        tensors[name] = np.ones(tensors[name].shape, dtype)
        message = refused(read, save(tmp_path / f"bad{suffix}", tensors))
        assert f"1 of the wrong type: {name} {np.dtype(dtype)} instead of floating point." in message


def test_any_floating_point_will_do(tmp_path):
    tensors = turbo()
    for dtype in (np.float64, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn):
        open_wan(save(tmp_path / "x.safetensors", {name: value.astype(dtype) for name, value in tensors.items()}))


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("blocks.0.ffn.0.int8_weight", np.float32, "float32 instead of int8"),
        ("blocks.0.ffn.0.int8_weight", np.uint8, "uint8 instead of int8"),
        ("blocks.0.ffn.0.scale", np.int32, "int32 instead of floating point"),
        ("blocks.0.ffn.0.bias", np.int16, "int16 instead of floating point"),
    ],
)
def test_codes_are_int8_and_scales_floating_point(tmp_path, name, dtype, message):
    tensors = turbo(small(quant=QuantConfig()))
    open_wan(save(tmp_path / "good.safetensors", tensors))
    tensors[name] = tensors[name].astype(dtype)
    assert f"1 of the wrong type: {name} {message}" in refused(open_wan, save(tmp_path / "bad.safetensors", tensors))


def test_codes_without_scales(tmp_path):
    tensors = {name: (100 * value).astype(np.int8) for name, value in turbo().items()}
    assert "of the wrong type: " in refused(open_wan, save(tmp_path / "codes.safetensors", tensors))


def test_token_table_must_be_floating_point(tmp_path, demo):
    tensors = dict(read_tensors(demo / "models_t5_umt5-xxl-enc-bf16.pth"))
    for table in (np.ones(tensors["token_embedding.weight"].shape, np.bool_), np.ones((0, 32), np.float32)):
        path = save(tmp_path / "x.safetensors", tensors | {"token_embedding.weight": table})
        assert "token_embedding.weight is " in refused(open_umt5, path)


@pytest.mark.parametrize("part", ["lora_up.weight", "lora_down.weight", "diff", "diff_b", "alpha"])
def test_lora_must_be_floating_point(tmp_path, part):
    module = "diffusion_model.blocks.0.self_attn.q"
    shapes = {"lora_up.weight": (256, 4), "lora_down.weight": (4, 256), "alpha": ()}
    if part in ("diff", "diff_b"):
        shapes = {"diff": (256, 256), "diff_b": (256,)}
    tensors = {f"{module}.{name}": np.ones(shape, np.float32) for name, shape in shapes.items()}
    read_lora(LoRA(save(tmp_path / "good.safetensors", tensors)), small())
    tensors[f"{module}.{part}"] = tensors[f"{module}.{part}"].astype(np.bool_)
    path = save(tmp_path / "bad.safetensors", tensors)
    message = refused(lambda path: read_lora(LoRA(path), small()), path)
    assert f"{module}.{part}' is bool and must be floating point" in message


def test_lora_alpha_may_be_a_whole_number(tmp_path):
    module = "diffusion_model.blocks.0.self_attn.q"
    parts = {"lora_up.weight": np.ones((256, 4)), "lora_down.weight": np.ones((4, 256)), "alpha": np.array(8)}
    tensors = {f"{module}.{name}": value for name, value in parts.items()}
    (change,) = read_lora(LoRA(save(tmp_path / "x.safetensors", tensors)), small()).values()
    assert change.scale == 2.0


# Layers


def test_layers_are_counted_by_what_is_there():
    assert count_layers([0, 0, 1, 1, 2, 2]) == 3
    assert count_layers([0, 0, 0, 1, 1, 1, 10**8]) == 2
    assert count_layers([0, 10**8]) == 4  # two that are there, two that are missing
    assert count_layers([0, 2]) == 3
    assert count_layers([]) == 0


@pytest.mark.parametrize("number", ["100000000", "9" * 5000, "٣", "01", "-1"])
def test_a_number_in_a_name_costs_nothing(tmp_path, demo, clip, number):
    files = {
        open_umt5: (demo / "models_t5_umt5-xxl-enc-bf16.pth", "blocks.{}.norm1.weight"),
        open_vae: (demo / "Wan2.1_VAE.pth", "encoder.downsamples.{}.residual.2.weight"),
        open_wan: (save(tmp_path / "wan.safetensors", turbo()), "blocks.{}.norm3.weight"),
    }
    for read, (file, name) in files.items():
        tensors = dict(read_tensors(file)) | {name.format(number): np.ones(64, np.float32)}
        refused(read, save(tmp_path / "bad.safetensors", tensors))
    tensors = dict(read_tensors(clip)) | {f"visual.transformer.{number}.norm1.weight": np.ones(64, np.float32)}
    path = save(tmp_path / "bad.safetensors", tensors)
    if number == "100000000":  # a layer behind those that run
        assert open_clip(path).skeleton.specs.keys() == open_clip(clip).skeleton.specs.keys()
    else:
        refused(open_clip, path)


@pytest.mark.parametrize("shape", [(0, 10**9), (10**9, 0), ()])
def test_sizes_are_not_taken_from_empty_tensors(tmp_path, demo, clip, shape):
    files = {
        open_umt5: (demo / "models_t5_umt5-xxl-enc-bf16.pth", "blocks.0.(ffn.fc1|attn.q|pos_embedding.*).weight"),
        open_vae: (demo / "Wan2.1_VAE.pth", r"(encoder\.conv1|conv2|encoder\.downsamples\.0\.residual\.2)\.weight"),
        open_clip: (clip, r"visual\.(transformer.0.mlp.0.weight|patch_embedding.weight|pos_embedding|.*to_qkv.bias)"),
        open_wan: (save(tmp_path / "wan.safetensors", turbo()), r"blocks\..*(ffn\.0|norm3)\.(weight|bias)"),
    }
    for read, (file, pattern) in files.items():
        tensors = dict(read_tensors(file))
        broken = {name: np.ones(shape, np.float32) for name in tensors if re.fullmatch(pattern, name)}
        assert broken
        refused(read, save(tmp_path / "bad.safetensors", tensors | broken))


def test_names_are_shortened(tmp_path):
    names = {f"surprise\n{i}\x1b[31m" + "x" * 400: np.ones(2, np.float32) for i in range(3)}
    message = refused(open_wan, save(tmp_path / "x.safetensors", turbo() | names))
    assert "\x1b" not in message
    assert len(message) < 600

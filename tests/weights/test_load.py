"""Transformer checkpoints: every arrangement gives the same network, and what does not fit is told in one sentence."""

import dataclasses
import json
import logging as python_logging
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.closeness import relative_error
from tests.golden_io import GOLDEN, load
from tests.weights.checkpoints import (
    diffusers,
    load_umt5,
    official,
    parameters,
    save,
    save_shards,
    small,
    training,
    turbo,
)
from turbojax.errors import CheckpointError, UserError
from turbojax.kernels.int8 import QuantConfig
from turbojax.models.umt5 import UMT5Config, UMT5Encoder
from turbojax.models.vae import VAEConfig, WanVAE
from turbojax.models.wan import WanConfig, WanModel
from turbojax.weights import convert, layouts
from turbojax.weights.encoders import load_vae
from turbojax.weights.io import read_tensors
from turbojax.weights.load import check_wan, load_wan, open_wan
from turbojax.weights.options import NetworkOptions
from turbojax.weights.rules import assign
from turbojax.weights.skeleton import Skeleton, wan_skeleton
from turbojax.weights.umt5 import umt5_rules
from turbojax.weights.vae import vae_rules

BLOCK128 = QuantConfig("block128")  # as TurboDiffusion publishes them


def assert_same(model: nnx.Module, expected: nnx.Module):
    ours, theirs = parameters(model), parameters(expected)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


def run(model: WanModel) -> np.ndarray:
    """The network's result for fixed inputs."""
    c = model.config
    keys = jax.random.split(jax.random.key(1), 3)
    x = jax.random.normal(keys[0], (1, 2, 4, 6, c.in_channels))
    text = jax.random.normal(keys[1], (1, 16, c.text_dim))
    clip = jax.random.normal(keys[2], (1, 257, c.clip_dim)) if c.clip_dim else None
    return np.asarray(jax.jit(model.__call__)(x, jnp.full(1, 500.0), text, clip=clip))


def one_sentence(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.fixture(scope="module")
def file(tensors, tmp_path_factory):
    return save(tmp_path_factory.mktemp("turbo") / "transformer.pth", tensors)


@pytest.fixture(scope="module")
def model(file):
    return load_wan(file, NetworkOptions(dtype=jnp.float32))


@pytest.fixture(scope="module")
def quantized_file(tmp_path_factory):
    config = small(quant=BLOCK128)
    return save(tmp_path_factory.mktemp("quant") / "transformer-quant.pth", turbo(config, seed=3))


# The same network from every arrangement.


def test_parameters_are_the_tensors_of_the_file(tensors, model):
    ours = parameters(model)
    assert sum(value.size for value in ours.values()) == sum(value.size for value in tensors.values())
    np.testing.assert_array_equal(ours["patch_embedding.weight"], tensors["patch_embedding.weight"])
    np.testing.assert_array_equal(ours["head.modulation"], tensors["head.modulation"][0])
    for layer in (0, 1):
        for theirs, name in (
            ("self_attn.q.weight", "self_attn.q.weight"),
            ("cross_attn.norm_k.weight", "cross_attn.norm_k.weight"),
            ("ffn.2.bias", "ffn.fc2.bias"),
        ):
            np.testing.assert_array_equal(ours[f"blocks.{name}"][layer], tensors[f"blocks.{layer}.{theirs}"])
    assert np.isfinite(run(model)).all()


@pytest.mark.parametrize("arrange", [official, diffusers, training], ids=lambda f: f.__name__)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_names_and_files(tmp_path, tensors, model, arrange, suffix):
    path = save(tmp_path / f"model{suffix}", arrange(tensors))
    assert open_wan(path).config == dataclasses.replace(small(), dtype=jnp.bfloat16)
    assert_same(load_wan(path, NetworkOptions(dtype=jnp.float32)), model)


@pytest.mark.parametrize("arrange", [official, diffusers], ids=lambda f: f.__name__)
def test_shards_by_index_and_by_folder(tmp_path, tensors, model, arrange):
    index = save_shards(tmp_path / "shards", arrange(tensors))
    assert_same(load_wan(index, NetworkOptions(dtype=jnp.float32)), model)
    assert_same(load_wan(index.parent, NetworkOptions(dtype=jnp.float32)), model)


@pytest.mark.parametrize("output", ["converted.safetensors", "folder"])
def test_converted(tmp_path, file, model, output):
    kind = "safetensors" if "." in output else "orbax"
    convert.convert(file, tmp_path / output, dtype=jnp.float32, format=kind)
    assert_same(load_wan(tmp_path / output, NetworkOptions(dtype=jnp.float32)), model)
    half = parameters(load_wan(tmp_path / output, NetworkOptions(dtype=jnp.bfloat16)))
    assert half["blocks.ffn.fc1.weight"].dtype == jnp.bfloat16
    assert half["blocks.norm3.weight"].dtype == np.float32
    np.testing.assert_array_equal(
        half["blocks.ffn.fc1.weight"], parameters(model)["blocks.ffn.fc1.weight"].astype(jnp.bfloat16)
    )


@pytest.mark.parametrize("arrange", [official, diffusers], ids=lambda f: f.__name__)
@pytest.mark.parametrize("images", [1, 2])
def test_image_to_video_with_clip(tmp_path, arrange, images):
    config = small(in_channels=36, clip_dim=128, clip_images=images)
    path = save(tmp_path / "i2v.safetensors", arrange(turbo(config)))
    assert open_wan(path).config == dataclasses.replace(config, dtype=jnp.bfloat16)
    expected = load_wan(save(tmp_path / "turbo.pth", turbo(config)), NetworkOptions(dtype=jnp.float32))
    assert_same(load_wan(path, NetworkOptions(dtype=jnp.float32)), expected)


# What the shapes tell.


@pytest.mark.parametrize("name", ["t2v", "t2v_hd128", "t2v_sla", "official", "i2v_clip"])
def test_configuration_of_the_golden_fixtures(name):
    described, t = load(GOLDEN / f"wan21_{name}.safetensors")
    weights = {key.removeprefix("w."): value for key, value in t.items() if key.startswith("w.")}
    args = described["args"]
    config = check_wan(weights, num_heads=args["num_heads"], what=name).config
    for ours, theirs in (
        *(("dim", "dim"), ("ffn_dim", "ffn_dim"), ("num_heads", "num_heads"), ("num_layers", "num_layers")),
        *(("in_channels", "in_dim"), ("out_channels", "out_dim"), ("freq_dim", "freq_dim"), ("text_dim", "text_dim")),
    ):
        assert getattr(config, ours) == args[theirs], ours
    assert config.attention_type == ("sla" if "sla" in name else "original")
    assert (config.clip_dim is not None) == ("clip" in name)
    assert config.quant is None


def skeleton_of_zeros(layout) -> dict[str, np.ndarray]:
    """Arrays of full size that take no memory."""
    codes, number = np.zeros((), np.int8), np.zeros((), np.float16)
    return {
        name: np.broadcast_to(codes if name.endswith("int8_weight") else number, shape)
        for name, shape in layout.items()
    }


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (WanConfig.t2v_1_3b(), 825),
        (WanConfig.t2v_1_3b(attention_type="sla"), 885),
        (WanConfig.t2v_14b(), 1095),
        (WanConfig.i2v_14b(), 1303),
        (WanConfig.i2v_a14b(attention_type="sla"), 1175),
        (WanConfig.t2v_1_3b(quant=BLOCK128, attention_type="sla"), 885 + 30 * 10),
    ],
    ids=["1.3B", "1.3B sla", "14B", "I2V 14B", "I2V A14B sla", "1.3B sla int8"],
)
def test_full_size_layouts_fill_every_parameter_once(config, count):
    layout = layouts.wan_layout(config)
    assert len(layout) == count
    checkpoint = check_wan(skeleton_of_zeros(layout), num_heads=None, what="full size")
    assert checkpoint.config == config
    assert len(checkpoint.tensors) == count


def test_full_size_layouts_of_the_others():
    for module, config, rules, layout, count in (
        (UMT5Encoder, UMT5Config.xxl(), umt5_rules, layouts.umt5_layout, 241),
        (WanVAE, VAEConfig.wan2_1(), vae_rules, layouts.vae_layout, 194),
    ):
        skeleton = Skeleton.of(lambda module=module, config=config: module(config, rngs=nnx.Rngs(0)))
        tensors = skeleton_of_zeros(layout(config))
        found = assign(tensors, rules(tensors), skeleton.tensor_specs(), what="zeros", layout=layout(config))
        table = 1 if module is UMT5Encoder else 0  # stays on the host
        assert len(found) == len(skeleton.tensor_specs()) == len(tensors) - table == count


def test_number_of_heads(tmp_path, tensors):
    plain = save(tmp_path / "plain" / "model.pth", tensors)
    assert open_wan(plain).config.num_heads == 2  # 128 wide, as all released models have them
    for key in ("num_heads", "num_attention_heads"):
        (plain.parent / "config.json").write_text(json.dumps({key: 4, "dim": 256}))
        assert open_wan(plain).config.num_heads == 4
    converted = tmp_path / "converted.safetensors"
    convert.convert(plain, converted)
    assert open_wan(converted).config.num_heads == 4
    convert.convert(plain, tmp_path / "folder", format="orbax")
    assert load_wan(tmp_path / "folder").config.num_heads == 4
    for bad in ("<html>", "[1]", '{"num_heads": "4"}', '{"num_heads": true}', '{"num_heads": 1e30}', "[" * 100_000):
        (plain.parent / "config.json").write_text(bad)
        with pytest.raises(CheckpointError, match=r"config\.json.*; download it again") as error:
            open_wan(plain)
        one_sentence(error)
    (plain.parent / "config.json").write_text(json.dumps({"num_heads": 7}))
    with pytest.raises(CheckpointError, match=r"model\.pth: dim=256 does not give num_heads=7"):
        open_wan(plain)


# int8.


def test_quantized_checkpoint(quantized_file):
    checkpoint = open_wan(quantized_file)
    assert checkpoint.config.quant == BLOCK128
    model = load_wan(quantized_file, NetworkOptions(dtype=jnp.float32))
    ours = parameters(model)
    assert ours["blocks.self_attn.q.weight"].dtype == ours["blocks.ffn.fc2.weight"].dtype == np.int8
    assert ours["blocks.ffn.fc2.scale"].shape == (2, 2, 3)
    assert ours["blocks.ffn.fc2.scale"].dtype == ours["head.proj.weight"].dtype == np.float32
    plain = load_wan(quantized_file, NetworkOptions(quant_linear=False, dtype=jnp.float32))
    assert plain.config.quant is None
    q, scale = ours["blocks.ffn.fc2.weight"][1], ours["blocks.ffn.fc2.scale"][1]
    by_hand = q * np.kron(scale, np.ones((128, 128)))[: q.shape[0], : q.shape[1]]
    np.testing.assert_allclose(parameters(plain)["blocks.ffn.fc2.weight"][1], by_hand, rtol=1e-6)
    assert relative_error(run(model), run(plain)) < 2e-2  # the int8 network rounds its activations too


@pytest.mark.parametrize("output", ["int8.safetensors", "folder"])
def test_quantizing_while_loading_equals_converting_before(tmp_path, file, output):
    kind = "safetensors" if "." in output else "orbax"
    convert.convert(file, tmp_path / output, quantize="block128", dtype=jnp.float32, format=kind)
    before = load_wan(tmp_path / output, NetworkOptions(dtype=jnp.float32))
    assert before.config.quant == BLOCK128
    assert_same(load_wan(file, NetworkOptions(quant_linear=True, dtype=jnp.float32)), before)
    again = load_wan(tmp_path / output, NetworkOptions(quant_linear=False, dtype=jnp.float32))
    assert again.config.quant is None


def quantization_log(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if "linear layers" in record.getMessage()]


@pytest.mark.parametrize(
    ("stored", "options", "line"),
    [
        (None, {}, None),
        (None, {"quant_linear": True}, "Quantized 20 linear layers (block128): 0.0 GB -> 0.0 GB"),
        (
            None,
            {"quant_linear": True, "quant_scheme": "block128_rows"},
            "Quantized 20 linear layers (block128_rows): 0.0 GB -> 0.0 GB",
        ),
        ("block128", {}, "20 linear layers are int8 as stored (block128), run as block128"),
        (
            "block128",
            {"quant_scheme": "block128_weights"},
            "20 linear layers are int8 as stored (block128), run as block128_weights",
        ),
        (
            "block128",
            {"quant_scheme": "channel_weights"},
            "Quantized 20 linear layers again, from block128 to channel_weights: 0.0 GB -> 0.0 GB",
        ),
        ("channel", {"quant_linear": False}, "Dequantized 20 linear layers (channel) to bfloat16"),
    ],
)
@pytest.mark.parametrize("kind", ["safetensors", "orbax"])
def test_the_log_names_the_schemes(tmp_path, file, stored, options, line, kind, caplog):
    path = tmp_path / ("model" if kind == "orbax" else "model.safetensors")
    convert.convert(file, path, quantize=stored, format=kind)
    with caplog.at_level("INFO", logger="absl"):
        load_wan(path, NetworkOptions(**options))
    assert quantization_log(caplog) == ([line] if line else [])


def test_a_scheme_that_has_no_effect(file, quantized_file):
    with pytest.raises(UserError, match="quant_scheme='channel' has no effect with quant_linear=False; leave out one"):
        load_wan(quantized_file, NetworkOptions(quant_linear=False, quant_scheme="channel"))
    with pytest.raises(
        UserError, match="quant_scheme='channel' has no effect on a checkpoint without int8 layers; add"
    ):
        load_wan(file, NetworkOptions(quant_scheme="channel"))
    assert load_wan(quantized_file, NetworkOptions(quant_scheme="channel")).config.quant == QuantConfig("channel")


# SLA.


def test_dense_attention_on_an_sla_checkpoint(tmp_path, tensors):
    sla = turbo(small(attention_type="sla"))
    path = save(tmp_path / "sla.pth", sla)
    assert open_wan(path).config.attention_type == "sla"
    dense = load_wan(path, NetworkOptions(attention_type="original", dtype=jnp.float32))
    assert not [name for name in parameters(dense) if "proj_l" in name]
    sparse = load_wan(path, NetworkOptions(sla_topk=0.3))
    assert (sparse.config.attention_type, sparse.config.sla_topk) == ("sla", 0.3)
    assert load_wan(path, NetworkOptions(attention_type="sagesla", sage_values="exact")).config.sage_values == "exact"
    convert.convert(path, tmp_path / "folder", format="orbax")
    assert load_wan(tmp_path / "folder", NetworkOptions(attention_type="original")).config.attention_type == "original"
    assert load_wan(tmp_path / "folder", NetworkOptions(sla_topk=0.3)).config.sla_topk == 0.3


def test_sla_on_a_checkpoint_without(file, model, caplog):
    with caplog.at_level(python_logging.WARNING, logger="absl"):
        sparse = load_wan(file, NetworkOptions(attention_type="sla", sla_topk=1.0, dtype=jnp.float32))
    assert [record.message for record in caplog.records] == [
        "transformer.pth was not trained with SLA: proj_l starts at zero"
    ]
    assert not parameters(sparse)["blocks.self_attn.proj_l.weight"].any()
    np.testing.assert_allclose(run(sparse), run(model), atol=2e-5)  # all blocks chosen, no linear branch


# What does not fit.

BROKEN = [
    ("blocks.1.cross_attn.k.weight", "blocks.0.self_attn.norm_q.weight"),
    ("head.head.bias", "patch_embedding.bias"),
    ("patch_embedding.bias", "blocks.0.ffn.0.weight"),
    ("blocks.0.ffn.0.weight", "time_projection.1.weight"),
    ("time_embedding.0.weight", "blocks.1.norm3.weight"),
    ("blocks.0.norm3.weight", "text_embedding.2.weight"),
    ("blocks.0.self_attn.q.bias", "head.head.weight"),
    ("text_embedding.0.weight", "blocks.1.modulation"),
    ("blocks.1.modulation", "head.modulation"),
]


@pytest.mark.parametrize(("missing", "misshapen"), BROKEN)
@pytest.mark.parametrize("unknown", ["blocks.1.self_attn.surprise", "blocks.7.norm3.weight"])
def test_one_error_lists_everything(tmp_path, tensors, missing, misshapen, unknown):
    broken = dict(tensors)
    del broken[missing]
    shape = broken[misshapen].shape
    broken |= {misshapen: np.zeros((*shape[:-1], shape[-1] + 4), np.float32), unknown: np.zeros(256, np.float32)}
    with pytest.raises(CheckpointError) as error:
        open_wan(save(tmp_path / "broken.pth", broken))
    message = one_sentence(error)
    assert message.startswith("broken.pth does not fit this model")
    assert f"1 missing: {missing};" in message
    assert f"; 1 unknown: {unknown}; 1 misshapen: {misshapen} [" in message


FULL_SIZE = layouts.wan_layout(WanConfig.t2v_1_3b(attention_type="sla"))


@pytest.mark.parametrize("misshapen", [name for name in FULL_SIZE if re.match(r"blocks\.0\.|(?!blocks)", name)])
def test_any_tensor_of_a_released_model(misshapen):
    """Even those that show the model's size."""
    tensors = skeleton_of_zeros(FULL_SIZE)
    shape = FULL_SIZE[misshapen]
    wrong = {misshapen: np.broadcast_to(np.zeros((), np.float16), (*shape[:-1], shape[-1] + 8))}
    others = [name for name in FULL_SIZE if name != misshapen]
    missing = others[len(misshapen) * 7919 % len(others)]
    del tensors[missing]
    with pytest.raises(CheckpointError) as error:
        check_wan(tensors | wrong | {"surprise": np.zeros(3)}, num_heads=None, what="full size")
    expected = f"; 1 missing: {missing}; 1 unknown: surprise; 1 misshapen: {misshapen} ["
    assert expected in one_sentence(error)


def test_axes_too_few_or_too_many_are_misshapen(tmp_path, tensors):
    for name, shape in (
        ("patch_embedding.weight", (5,)),
        ("head.head.weight", ()),
        ("blocks.0.modulation", (6,)),
        ("head.modulation", (2, 2, 2, 2)),
        ("blocks.0.self_attn.q.weight", (256, 256, 1)),
        ("blocks.0.ffn.0.bias", (0,)),
    ):
        broken = tensors | {name: np.zeros(shape, np.float32)}
        with pytest.raises(CheckpointError, match=f"; 1 misshapen: {name}"):
            open_wan(save(tmp_path / "broken.pth", broken))


def test_a_doubled_parameter(tmp_path, tensors):
    twice = tensors | {"net.head.head.bias": tensors["head.head.bias"]}
    with pytest.raises(CheckpointError, match=r"holds 'head\.head\.bias' twice, once as 'net\.head\.head\.bias'"):
        open_wan(save(tmp_path / "twice.pth", twice))
    twice = tensors | {"blocks.0.self_attn.q.int8_weight": np.zeros((256, 256), np.int8)}
    with pytest.raises(CheckpointError, match=r"given twice: |missing"):
        open_wan(save(tmp_path / "twice.pth", twice))


def test_int8_weights_without_scales(tmp_path, quantized_file):
    stored = {name: tensor for name, tensor in read_tensors(quantized_file).items() if not name.endswith("scale")}
    with pytest.raises(CheckpointError, match=r"20 missing: blocks\.0\.\w+\.\w+\.scale, "):
        open_wan(save(tmp_path / "broken.pth", stored))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_is_named(tmp_path, tensors, value):
    weight = tensors["blocks.1.ffn.2.weight"].copy()
    weight[3, 5] = value
    path = save(tmp_path / "nan.pth", tensors | {"blocks.1.ffn.2.weight": weight})
    for quant_linear in (None, True):
        with pytest.raises(
            CheckpointError, match=r"nan\.pth holds NaN or infinity in blocks\.ffn\.fc2\.\w+\[layer 1\];"
        ):
            load_wan(path, NetworkOptions(quant_linear=quant_linear))


def test_another_components_file(demo, file):
    vae, t5 = demo / "Wan2.1_VAE.pth", demo / "models_t5_umt5-xxl-enc-bf16.pth"
    for path in (vae, t5):
        with pytest.raises(CheckpointError, match=f"{path.name} is not a Wan transformer") as error:
            load_wan(path)
        one_sentence(error)
    for path in (file, t5):
        with pytest.raises(CheckpointError, match=rf"{path.name}: this is no Wan 2\.1 autoencoder") as error:
            load_vae(path)
        one_sentence(error)
    for path in (file, vae):
        with pytest.raises(CheckpointError, match=f"{path.name}: no umT5 encoder") as error:
            load_umt5(path)
        one_sentence(error)


def test_errors_of_the_others_name_file_and_tensors(tmp_path, demo):
    for name, open_file, missing in (
        ("Wan2.1_VAE.pth", load_vae, "decoder.head.2.bias"),
        ("models_t5_umt5-xxl-enc-bf16.pth", load_umt5, "blocks.1.ffn.gate.0.weight"),
    ):
        stored = dict(read_tensors(demo / name))
        del stored[missing]
        stored["surprise"] = np.zeros(2, np.float32)
        with pytest.raises(CheckpointError, match=rf"broken\.pth: .*1 missing: {missing}; 1 unknown: surprise\."):
            open_file(save(tmp_path / "broken.pth", stored))


@pytest.fixture(scope="module")
def folder(file, tmp_path_factory):
    path = tmp_path_factory.mktemp("orbax") / "model"
    convert.convert(file, path, format="orbax")
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "is no JSON"),
        ("[]", r"it is \[\] and must be an object"),
        ("{}", "is missing"),
        ("[" * 100_000, "nested 100000 deep"),
        ({"surprise": 1}, "the unknown field 'surprise'"),
        ({"num_layers": 10**30}, "num_layers is 1000.* and must be a whole number from 1 to 1024"),
        ({"num_layers": 1024}, r"does not fit: blocks\..*: saved bfloat16\(2, .*, wanted bfloat16\(1024, "),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"num_layers": 2.0}, r"num_layers is 2\.0"),
        ({"dim": 257}, "dim=257 does not give num_heads=2"),
        ({"dim": 512}, "does not fit"),
        ({"dim": -256}, "dim is -256"),
        ({"ffn_dim": 10**9}, "ffn_dim is 1000000000"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"num_heads": None}, "num_heads is None"),
        ({"patch": [1, 2]}, r"patch is \[1, 2\] and must be a list of 3 items"),
        ({"patch": [1, 2, 0]}, r"patch\[2\] is 0"),
        ({"patch": [1, 2, "2"]}, r"patch\[2\] is '2'"),
        ({"sla_blocks": [128]}, r"sla_blocks is \[128\]"),
        ({"sla_blocks": [0, 64]}, r"sla_blocks\[0\] is 0"),
        ({"sla_topk": 0}, "sla_topk is 0 and must be a number above 0"),
        ({"sla_topk": "0.1"}, "sla_topk is '0.1'"),
        ({"sigma_max": -80}, "sigma_max is -80"),
        ({"eps": 0}, "eps is 0"),
        ({"dtype": "int8"}, "dtype is 'int8' and must be"),
        ({"dtype": {"a": 1}}, "dtype is {'a': 1}"),
        ({"quant": {}}, r"quant\.scheme is missing"),
        ({"quant": {"scheme": "block128", "group": 64, "weight_only": False}}, r"quant\.group is 64"),
        ({"quant": {"scheme": "channel", "group": 1, "weight_only": False}}, "is none of the schemes"),
        ({"attention_type": "flash"}, "attention_type is 'flash'"),
        ({"attention_type": ["sla"]}, "attention_type is"),
        ({"clip_dim": 32}, r"does not fit: blocks\.cross_attn\.k_img\.bias: saved nothing"),
        ({"clip_images": 3}, "clip_images is 3"),
        ({"remat": 0}, "remat is 0"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_damaged_converted_folder(tmp_path, folder, change, message):
    for part in folder.iterdir():
        if part.is_dir():
            (tmp_path / part.name).symlink_to(part)
    text = (
        change if isinstance(change, str) else json.dumps(json.loads((folder / "turbojax.json").read_text()) | change)
    )
    (tmp_path / "turbojax.json").write_text(text)
    with pytest.raises(CheckpointError, match=message) as error:
        open_wan(tmp_path)
    assert len(one_sentence(error)) < 1500


def test_arrays_that_a_converted_folder_lacks(tmp_path, folder):
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert open_wan(copy).config == open_wan(folder).config
    shutil.rmtree(copy / "arrays" / "head.proj.bias")
    with pytest.raises(CheckpointError, match=r"head\.proj\.bias: saved nothing, wanted "):
        open_wan(copy)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"num_heads": "0"}, "num_heads is 0 and must be a whole number from 1 to 1024"),
        ({"num_heads": "two"}, "num_heads is 'two'"),
        ({"num_heads": "9" * 10**5}, "num_heads is '999"),
        ({"num_heads": "3"}, "dim=256 does not give num_heads=3"),
        ({"sla_topk": "nan"}, "sla_topk is 'nan' and must be a number above 0 and up to 1"),
        ({"sla_topk": "1e999"}, "sla_topk is '1e999'"),
        ({"sigma_max": "-1"}, "sigma_max is -1"),
        ({"sla_blocks": "[64]"}, "sla_blocks is"),
        ({"quant_scheme": '"channel"'}, "holds other tensors than its header says"),
        ({"attention_type": '"sla"'}, "holds other tensors than its header says"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_headers_that_cannot_be(tmp_path, tensors, header, message):
    path = save(tmp_path / "model.safetensors", tensors, **header)
    with pytest.raises(CheckpointError, match=message) as error:
        open_wan(path)
    assert len(one_sentence(error)) < 400


def test_unknown_options(file):
    for option in ({"attention_type": "flash"}, {"attention_type": "sla", "sla_topk": 0.0}, {"sage_values": "int4"}):
        with pytest.raises(UserError):
            load_wan(file, NetworkOptions(**option))


def test_entries_count_layers():
    entries = wan_skeleton(small()).tensor_specs()
    assert len(entries) == len(layouts.wan_layout(small()))

"""Conversion: what is written is the source, cast or quantized; bad sources and settings leave no trace."""

import dataclasses
import json
import tracemalloc

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from tests.weights.checkpoints import diffusers, load_umt5, official, save, save_shards, small, training, turbo
from turbojax.errors import CheckpointError, UserError
from turbojax.kernels.int8 import QUANT_SCHEMES, quantize_blocks
from turbojax.models.wan import WanConfig
from turbojax.pipeline.request import first_noise_level
from turbojax.weights import convert as module
from turbojax.weights.convert import convert
from turbojax.weights.encoders import load_vae
from turbojax.weights.io import file_metadata, read_tensors
from turbojax.weights.layouts import generated, wan_layout
from turbojax.weights.load import WanCheckpoint, check_wan, load_wan
from turbojax.weights.options import NetworkOptions

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture
def source(tmp_path, tensors):
    return save(tmp_path / "source" / "model.pth", tensors)


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out" / "transformer.safetensors"


def checkpoint_of(config: WanConfig) -> WanCheckpoint:
    """A checkpoint of this configuration, of generated values."""
    stored = dict(generated(wan_layout(config), np.float32))
    return check_wan(stored, num_heads=config.num_heads, what="generated")._replace(config=config)


def refused(*arguments, **options) -> str:
    with pytest.raises(UserError) as error:
        convert(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("arrange", [dict, official, diffusers, training], ids=lambda f: f.__name__)
def test_names_and_values_are_turbodiffusions(tmp_path, output, tensors, arrange):
    summary = convert(save(tmp_path / "model.safetensors", arrange(tensors)), output, dtype=jnp.float32)
    written = read_tensors(output)
    assert list(written) == list(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)
    assert summary == ("transformer", len(tensors), sum(tensor.nbytes for tensor in tensors.values()))
    with safe_open(output, "np") as file:  # other programs read it, too
        assert file.metadata() == {"format": "turbojax", "num_heads": "2"}


@pytest.mark.parametrize(("names", "arrange"), [("official", official), ("diffusers", diffusers)])
@pytest.mark.parametrize("clip", [None, 32])
def test_other_names(tmp_path, output, names, arrange, clip):
    """The text-to-video model, and the one with an image's features."""
    tensors = turbo(small(clip_dim=clip, in_channels=36 if clip else 16))
    convert(save(tmp_path / "model.pth", tensors), output, dtype=jnp.float32, names=names)
    written, expected = read_tensors(output), arrange(tensors)
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)
    back = tmp_path / "back.pth"
    convert(output, back, dtype=jnp.float32, format="pth")
    assert list(read_tensors(back)) == list(tensors)


@pytest.mark.parametrize("names", ["official", "diffusers"])
def test_sla_and_int8_have_turbodiffusions_names_alone(tmp_path, source, output, names):
    sla = save(tmp_path / "sla.pth", turbo(small(attention_type="sla")))
    for arguments, options in (((sla, output), {}), ((source, output), {"quantize": "channel"})):
        message = refused(*arguments, names=names, **options)
        assert (
            message == f"names='{names}' have no place for int8 weights and SLA's proj_l; take names='turbodiffusion'"
        )
    assert not output.exists()


def test_shards(tmp_path, output, tensors):
    index = save_shards(tmp_path / "shards", official(tensors))
    convert(index.parent, output, dtype=jnp.float32)
    assert list(read_tensors(output)) == list(tensors)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtype(source, output, tensors, dtype):
    convert(source, output, dtype=dtype)
    written = read_tensors(output)
    assert {tensor.dtype for tensor in written.values()} == {np.dtype(dtype)}
    name = "blocks.1.ffn.0.weight"
    np.testing.assert_array_equal(written[name], tensors[name].astype(dtype))


def test_quantized(source, output, tensors):
    convert(source, output, quantize="block128")
    written = read_tensors(output)
    assert list(written) == list(wan_layout(small(quant=module.open_wan(output).config.quant)))
    linears = [name.removesuffix(".int8_weight") for name in written if name.endswith("int8_weight")]
    assert len(linears) == 20
    for name in linears:
        assert written[f"{name}.int8_weight"].dtype == np.int8
        assert written[f"{name}.scale"].dtype == np.float32
        assert written[f"{name}.bias"].dtype == BFLOAT16
        q, scale = quantize_blocks(jnp.asarray(tensors[f"{name}.weight"]))
        np.testing.assert_array_equal(written[f"{name}.int8_weight"], q)
        np.testing.assert_allclose(written[f"{name}.scale"], scale, rtol=1e-6)
    again = output.with_name("again.safetensors")
    convert(output, again)  # stays as it is
    assert again.read_bytes() == output.read_bytes()


@pytest.mark.parametrize("quantize", [None, "block128"])
def test_there_and_back_by_orbax(source, output, tmp_path, quantize):
    convert(source, output, quantize=quantize)
    convert(output, tmp_path / "folder", format="orbax")
    convert(tmp_path / "folder", tmp_path / "back.safetensors")
    written, back = read_tensors(output), read_tensors(tmp_path / "back.safetensors")
    assert written.keys() == back.keys()
    for name, tensor in written.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)
        assert back[name].dtype == tensor.dtype
    if quantize:  # the weight and its scale come from two arrays
        convert(tmp_path / "folder", tmp_path / "channel.safetensors", quantize="channel")
        assert read_tensors(tmp_path / "channel.safetensors")["blocks.1.ffn.0.scale"].shape == (384,)


def test_orbax_folder(source, tmp_path):
    output = tmp_path / "out" / "model"
    convert(source, output, format="orbax", quantize="block128")
    fields = json.loads((output / "turbojax.json").read_text())
    assert (fields["dim"], fields["dtype"], fields["quant"]["scheme"]) == (256, "bfloat16", "block128")
    assert sorted(path.name for path in output.parent.iterdir()) == ["model"]
    assert load_wan(output).config.quant is not None


@pytest.mark.parametrize(
    ("name", "component", "load"),
    [("Wan2.1_VAE.pth", "VAE", load_vae), ("models_t5_umt5-xxl-enc-bf16.pth", "text encoder", load_umt5)],
)
def test_other_components_keep_their_names(tmp_path, demo, name, component, load):
    output = tmp_path / "x.safetensors"
    summary = convert(demo / name, output, dtype=jnp.float32)
    stored, written = read_tensors(demo / name), read_tensors(output)
    assert summary.component == component
    assert list(written) == list(stored)
    assert all(np.array_equal(written[n], stored[n].astype(np.float32)) for n in stored)
    load(output)
    for options in ({"quantize": "block128"}, {"names": "official"}, {"format": "orbax"}):
        again = tmp_path / ("y" if "format" in options else "y.safetensors")
        assert f"{name} is a {component}" in refused(demo / name, again, **options)
        assert not again.exists()
    convert(output, tmp_path / "x.pth", dtype=jnp.float32, format="pth")
    assert list(read_tensors(tmp_path / "x.pth")) == list(stored)


def test_one_tensor_at_a_time(tmp_path):
    """Memory does not grow with the file: 25 MB go through less than twice the largest tensor's 1.8 MB."""
    config = WanConfig(dim=384, ffn_dim=768, num_heads=3, num_layers=8, text_dim=64)
    source = tmp_path / "model.pth"
    save(source, dict(generated(wan_layout(config), jnp.bfloat16)))
    largest = 6 * 384 * 384 * 2
    assert source.stat().st_size > 12 * largest
    tracemalloc.start()
    try:
        convert(source, tmp_path / "model.safetensors")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * largest


# What is refused leaves everything as it was.


def test_existing_outputs(source, output, tmp_path):
    save(output, {"old": np.zeros(3)})
    before = output.read_bytes()
    assert "already exists" in refused(source, output)
    assert output.read_bytes() == before
    convert(source, output, overwrite=True)
    assert output.read_bytes() != before
    convert(output, output, dtype=jnp.float32, overwrite=True)  # in place: the source is read from the old file
    assert read_tensors(output)["head.head.bias"].dtype == np.float32

    folder = tmp_path / "precious"
    (folder / "photos").mkdir(parents=True)
    assert "already exists" in refused(source, folder, format="orbax")
    assert "no converted model" in refused(source, folder, format="orbax", overwrite=True)
    assert (folder / "photos").is_dir()
    convert(source, tmp_path / "model", format="orbax")
    convert(source, tmp_path / "model", format="orbax", dtype=jnp.float32, overwrite=True)
    assert json.loads((tmp_path / "model" / "turbojax.json").read_text())["dtype"] == "float32"


def test_settings(source, output):
    assert "format='gguf'" in refused(source, output, format="gguf")
    assert "must be a file that ends in .safetensors" in refused(source, output.with_suffix(".pth"))
    assert "names='mine' are unknown" in refused(source, output, names="mine")
    assert "an Orbax folder has turbojax's own" in refused(source, output, names="official", format="orbax")
    assert "'int3'" in refused(source, output, quantize="int3")
    output.mkdir(parents=True)
    assert "must be a file" in refused(source, output, overwrite=True)
    assert "does not exist" in refused(source.with_name("nothing.pth"), output.with_name("a.safetensors"))


@pytest.mark.parametrize("kind", ["safetensors", "orbax"])
def test_a_bad_source_leaves_nothing(tmp_path, tensors, kind):
    output = tmp_path / "out" / ("x.safetensors" if kind == "safetensors" else "x")
    broken = {name: tensor for name, tensor in tensors.items() if name != "blocks.1.modulation"}
    with pytest.raises(CheckpointError, match=r"1 missing: blocks\.1\.modulation"):
        convert(save(tmp_path / "missing.pth", broken), output, format=kind)
    whole = save(tmp_path / "whole.pth", tensors)
    cut = tmp_path / "cut.pth"
    cut.write_bytes(whole.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"cut\.pth is damaged"):
        convert(cut, output, format=kind)
    assert not output.parent.exists()


@pytest.mark.parametrize("kind", ["safetensors", "orbax"])
def test_a_failure_while_writing_leaves_nothing(source, tmp_path, monkeypatch, kind):
    output = tmp_path / "out" / ("x.safetensors" if kind == "safetensors" else "x")
    tensor = module.TensorSource.__call__

    def full_disk(self, key):
        if "ffn" in key.target:
            raise OSError(28, "No space left on device")
        return tensor(self, key)

    monkeypatch.setattr(module.TensorSource, "__call__", full_disk)
    assert "No space left on device" in refused(source, output, format=kind)
    assert list(output.parent.iterdir()) == []


def test_an_output_that_cannot_be(source, tmp_path):
    (tmp_path / "file").write_text("")
    for name, kind in (("x.safetensors", "safetensors"), ("x", "orbax")):
        assert "cannot be written" in refused(source, tmp_path / "file" / name, format=kind)


def test_what_it_is_to_be_run_with(tmp_path, output):
    """The header says it, loading follows it where nothing else is asked for, and another conversion keeps it."""
    source = save(tmp_path / "model.safetensors", turbo(small(attention_type="sla")))
    convert(source, output, sla_topk=0.25, sigma_max=1600.0)
    assert file_metadata(output) == {"format": "turbojax", "num_heads": "2", "sla_topk": "0.25", "sigma_max": "1600.0"}
    again, folder = tmp_path / "again.safetensors", tmp_path / "folder"
    convert(output, again, quantize="block128", sla_topk=0.5)
    convert(again, folder, format="orbax")
    for path, topk in ((output, 0.25), (again, 0.5), (folder, 0.5)):
        config = load_wan(path).config
        assert (config.sla_topk, config.sigma_max) == (topk, 1600.0)
    assert load_wan(again, NetworkOptions(sla_topk=0.9)).config.sla_topk == 0.9
    assert "sla_topk=1.5 must be in (0, 1]" in refused(source, tmp_path / "high.safetensors", sla_topk=1.5)
    assert first_noise_level(config, None) == 1600
    assert first_noise_level(config, 20.0) == 20
    assert first_noise_level(load_wan(source).config, None) == 80


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(sigma_max=1.0, format="pth"), "a .pth file has no place for sigma_max"),
        (dict(sigma_max=-1.0), "sigma_max=-1.0 must be finite and above 0"),
        (dict(sla_topk=0.5), "sla_topk has no effect on model.pth, which was not trained with SLA"),
    ],
)
def test_settings_that_cannot_be(tmp_path, source, options, message):
    output = tmp_path / f"model.{options.get('format', 'safetensors')}"
    with pytest.raises(UserError, match=message):
        convert(source, output, **options)
    assert not output.exists()


def test_damaged_settings(tmp_path, output, tensors):
    damaged = save(tmp_path / "model.safetensors", tensors, sigma_max="high")
    assert "sigma_max is 'high' and must be a number" in refused(damaged, output)


FORMATS = [("safetensors", "turbodiffusion"), ("safetensors", "official"), ("safetensors", "diffusers")]
FORMATS += [("pth", "turbodiffusion"), ("pth", "official"), ("pth", "diffusers"), ("orbax", "turbodiffusion")]
# Changes of a network that names and shapes do not show, and the settings that a warning names.
UNDETECTED = {
    "heads": ({"num_heads": 4}, None),
    "sigma_max": ({"sigma_max": 200.0}, "--config.sigma_max=200.0"),
    "top-k": ({"attention_type": "sla", "sla_topk": 0.67}, "--config.sla_topk=0.67"),
    "SLA heads": ({"attention_type": "sla", "num_heads": 4}, ""),
    "blocks": ({"attention_type": "sla", "sla_blocks": (64, 64)}, None),
    "sage": (
        {"attention_type": "sagesla", "sage_values": "exact"},
        "--config.attention_type=sagesla --config.sage_values=exact",
    ),
    "text": ({"text_len": 256}, None),
    "rows": ({"quant": QUANT_SCHEMES["block128_rows"]}, "--config.quant_scheme=block128_rows"),
    "weights": ({"quant": QUANT_SCHEMES["channel_weights"]}, "--config.quant_scheme=channel_weights"),
    "nothing": ({}, ""),
}


@pytest.mark.parametrize(("format", "names"), FORMATS)
@pytest.mark.parametrize("setting", UNDETECTED)
def test_no_format_loses_a_setting_in_silence(tmp_path, format, names, setting, caplog):
    """A file is read as the network that was written, or a warning names the settings to give, or it is refused."""
    changes, flags = UNDETECTED[setting]
    config = small(dtype=jnp.bfloat16, **changes)
    source = tmp_path / "source.safetensors"
    module.write_transformer(checkpoint_of(config), source)
    assert module.open_wan(source).config == config
    output = tmp_path / ("model" if format == "orbax" else f"model.{format}")
    if names != "turbodiffusion" and (config.quant or config.attention_type != "original"):
        assert "have no place for int8 weights and SLA" in refused(source, output, format=format, names=names)
        return
    if format == "pth" and flags is None:
        (name, value), *_ = [(name, value) for name, value in changes.items() if name != "attention_type"]
        message = f"model.pth has no place for {name}={value}, and its tensors do not tell; take format='safetensors'"
        assert refused(source, output, format=format, names=names) == message
        return
    with caplog.at_level("WARNING", logger="absl"):
        convert(source, output, format=format, names=names)
    if format == "pth" and flags:
        assert f"has no place for what the network is run with: give {flags} with it" in caplog.text
        given = dict(flag.removeprefix("--config.").split("=") for flag in flags.split())
        given = {name: float(value) if name == "sla_topk" else value for name, value in given.items()}
        sigma_max = given.pop("sigma_max", None)
        options = {"quant_linear": True} if "quant_scheme" in given else {}
        read = NetworkOptions(**given, **options).apply(module.open_wan(output).config)
        read = dataclasses.replace(read, sigma_max=sigma_max and float(sigma_max))
    else:
        assert "has no place" not in caplog.text
        read = module.open_wan(output).config
    assert read == dataclasses.replace(config, dtype=read.dtype)


def test_the_settings_of_a_folders_file_are_kept(tmp_path, tensors, output):
    save(tmp_path / "in" / "model.safetensors", tensors, num_heads="4", sigma_max="200.0")
    convert(tmp_path / "in", output)
    assert file_metadata(output) == {"format": "turbojax", "num_heads": "4", "sigma_max": "200.0"}


def test_a_patch_that_no_file_tells(tmp_path, output):
    config = small(dtype=jnp.bfloat16, patch=(1, 4, 4), in_channels=4, out_channels=4)
    module.write_transformer(checkpoint_of(config), tmp_path / "source", format="orbax")
    assert "would not tell" in (message := refused(tmp_path / "source", output))
    assert "patch=(1, 4, 4)" in message

"""Tensors that are looked at while they are read: those of zeros alone are told, wrong bytes are refused."""

import logging
import re

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tests.weights.checkpoints import load_umt5, save, small, turbo
from turbojax.errors import CheckpointError
from turbojax.kernels.int8 import QuantConfig
from turbojax.weights.convert import convert
from turbojax.weights.encoders import load_vae
from turbojax.weights.io import read_tensors
from turbojax.weights.lazy import all_zero
from turbojax.weights.load import load_wan
from turbojax.weights.lora import LoRA, read_lora
from turbojax.weights.merge import merge
from turbojax.weights.options import NetworkOptions

VAE, UMT5 = "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"


def told(caplog) -> str:
    """The one warning of zeros, or nothing."""
    messages = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    found = [message for message in messages if "all zero" in message]
    caplog.clear()
    assert len(found) < 2
    return "".join(found)


def unfinished(path, tensors, names=None):
    """A file of which the last half, or the named tensors, never came."""
    names = list(tensors)[len(tensors) // 2 :] if names is None else names
    return save(path, dict(tensors) | {name: np.zeros_like(tensors[name]) for name in names})


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.int8])
def test_all_zero(dtype):
    zeros = np.zeros((40, 60), dtype)
    assert all_zero(zeros)
    assert all_zero(zeros.T)
    assert all_zero(np.zeros((), dtype))
    assert not all_zero(np.zeros((0, 4), dtype))
    zeros[-1, -1] = 1
    assert not all_zero(zeros)
    assert not all_zero(zeros.T)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("config", [small(attention_type="sla"), small(quant=QuantConfig())], ids=["sla", "int8"])
def test_half_of_a_transformer(tmp_path, caplog, suffix, config):
    tensors = turbo(config)
    load_wan(save(tmp_path / f"whole{suffix}", tensors))
    assert not told(caplog)
    path = unfinished(tmp_path / f"half{suffix}", tensors)
    for change in ({}, {"quant_linear": True}, {"quant_linear": False}):
        load_wan(path, NetworkOptions(**change))
        message = told(caplog)
        assert message.startswith(f"half{suffix}: ")
        assert " % of the bytes: " in message
        assert re.search(r": blocks\.\S+\[layer [01]\], .* and \d+ more; ", message)
        assert ".bias" not in message


def test_a_single_weight(tmp_path, caplog):
    tensors = turbo()
    load_wan(unfinished(tmp_path / "x.safetensors", tensors, ["blocks.1.ffn.0.weight"]))
    share = 100 * tensors["blocks.1.ffn.0.weight"].nbytes / sum(value.nbytes for value in tensors.values())
    zeros = f"1 of {len(tensors)} tensors are all zero, {share:.1f} % of the bytes: blocks.ffn.fc1.weight[layer 1]; "
    assert told(caplog).startswith(f"x.safetensors: {zeros}")


def test_what_may_be_zero_is_not_told(tmp_path, caplog):
    """Biases, and the projection that SLA's training begins with at zero."""
    tensors = turbo(small(attention_type="sla"))
    names = [name for name in tensors if name.endswith("bias") or ".proj_l." in name]
    assert len(names) > 20
    load_wan(unfinished(tmp_path / "x.safetensors", tensors, names))
    assert not told(caplog)


@pytest.mark.parametrize(("name", "load"), [(VAE, load_vae), (UMT5, load_umt5)])
def test_half_of_the_others(tmp_path, demo, caplog, name, load):
    load(demo / name)
    assert not told(caplog)
    path = unfinished(tmp_path / "half.safetensors", read_tensors(demo / name))
    load(path)
    assert told(caplog).startswith("half.safetensors: ")
    convert(path, tmp_path / "out.safetensors")
    assert told(caplog).startswith("half.safetensors: ")
    convert(demo / name, tmp_path / "whole.safetensors")
    assert not told(caplog)


def test_a_lora(tmp_path, caplog):
    """Its up may be zero, where training has not changed a module."""
    tensors = {}
    for name in ("blocks.0.self_attn.q", "blocks.1.self_attn.q"):
        tensors[f"diffusion_model.{name}.lora_down.weight"] = np.ones((4, 256), np.float32)
        tensors[f"diffusion_model.{name}.lora_up.weight"] = np.ones((256, 4), np.float32)
    for half, message in (
        ("up", ""),
        ("down", "x.safetensors: 1 of 4 tensors are all zero, 25.0 % of the bytes: down of blocks.self_attn.q.weight["),
    ):
        name = f"diffusion_model.blocks.1.self_attn.q.lora_{half}.weight"
        path = unfinished(tmp_path / "x.safetensors", tensors, [name])
        read_lora(LoRA(path), small())
        assert told(caplog).startswith(message) if message else not told(caplog)


@pytest.mark.parametrize("format", ["safetensors", "pth", "orbax"])
def test_convert_and_merge_tell_and_check(tmp_path, caplog, format):
    tensors, output = turbo(), tmp_path / (f"out.{format}" if format != "orbax" else "out")
    good = save(tmp_path / "good.pth", tensors)
    half = unfinished(tmp_path / "half.pth", tensors)
    damaged = tmp_path / "damaged.pth"
    content = bytearray(good.read_bytes())
    at = content.index(tensors["blocks.1.ffn.2.weight"].tobytes()) + 4 * 300 * 256
    content[at] ^= 1
    damaged.write_bytes(content)

    for quantize in (None, "block128"):
        convert(half, output, format=format, quantize=quantize, overwrite=True)
        assert told(caplog).startswith("half.pth: ")
        with pytest.raises(
            CheckpointError, match=r"damaged\.pth is damaged: its bytes \d+ to \d+ do not have the CRC-32"
        ):
            convert(damaged, output, format=format, quantize=quantize, overwrite=True)
    merge(good, good, half, output, format=format, overwrite=True)
    assert told(caplog).startswith("half.pth: ")
    for three in ((damaged, good, good), (good, damaged, good), (good, good, damaged)):
        with pytest.raises(CheckpointError, match=r"damaged\.pth is damaged: .* CRC-32"):
            merge(*three, output, format=format, overwrite=True)
    convert(good, output, format=format, overwrite=True)
    assert not told(caplog)


def test_convert_checks_the_others(tmp_path, demo):
    for name in (VAE, UMT5):
        content = bytearray((demo / name).read_bytes())
        largest = max(read_tensors(demo / name).values(), key=lambda tensor: tensor.nbytes).tobytes()
        content[content.index(largest) + len(largest) // 2] ^= 1
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match="CRC-32"):
            convert(tmp_path / name, tmp_path / "out.safetensors", dtype=jnp.float32)
        assert not (tmp_path / "out.safetensors").exists()

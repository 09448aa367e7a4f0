"""Every case of the command `benchmark` from flags to JSON and report, of a toy by the reference implementations."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import pytest

from tests.marks import slow
from tests.weights.checkpoints import small
from turbojax.app.commands import benchmark as command
from turbojax.bench import attention, linear, measure, vae, video_file
from turbojax.bench.report import report
from turbojax.models import published
from turbojax.models.vae import VAEConfig
from turbojax.pipeline import loading
from turbojax.weights.random import random_module

TOKENS = 256
FLAGS = ["benchmark", "--model=toy", "--num_frames=5", "--num_inference_steps=1", "--num_layers=1", "--sla_topk=0.5"]


@pytest.fixture
def toy(monkeypatch, demo_pipe):
    """Small networks by every name that the cases use, small shapes, and no more than a call or two of each."""
    others = {"random umT5": demo_pipe.text.encoder, "random VAE": demo_pipe.vae}
    monkeypatch.setattr(loading, "random_module", lambda *a, what, **k: others.get(what) or random_module(*a, **k))
    monkeypatch.setattr(published.UMT5Config, "xxl", lambda dtype: demo_pipe.text.encoder.config)
    narrow = VAEConfig(dim=8, dtype=jnp.float32)
    monkeypatch.setattr(VAEConfig, "wan2_1", lambda **_: narrow)
    toys = {"toy": {}, "toy_images": {"in_channels": 36}}
    for name, own in toys.items():
        make = functools.partial(dict, {"num_layers": 1} | own)
        monkeypatch.setitem(published.MODELS, name, lambda make=make, **changes: small(**make(**changes)))
    monkeypatch.setattr(command, "video_size", lambda *_: (48, 32))
    monkeypatch.setattr(measure, "median_seconds", functools.partial(measure.median_seconds, repeats=1))
    layers, decoding = linear.measure_linear_layers, vae.measure_decoding
    monkeypatch.setattr(linear, "measure_linear_layers", functools.partial(layers, shapes=((136, 128, 256),)))
    monkeypatch.setattr(vae, "measure_decoding", lambda chunks, **size: decoding(chunks=chunks[-1:], **size))
    monkeypatch.setattr(attention, "SHAPES", ((1, TOKENS, 0.5),))
    monkeypatch.setattr(attention, "WITH_PARTS", ())  # by kernels, which run on GPUs alone
    monkeypatch.setattr(attention, "IMPLEMENTATIONS", ("reference",))
    monkeypatch.setitem(attention.GRIDS, TOKENS, (4, 8, 8))
    for name in ("measure_backward", "measure_errors"):
        small_ones = functools.partial(getattr(attention, name), heads=1, tokens=TOKENS)
        monkeypatch.setattr(attention, name, small_ones)
    monkeypatch.setattr(video_file, "CANDIDATES", video_file.CANDIDATES[:1])
    waves = vae.waves
    low = lambda frames, height, *others, **length: waves(1, height // 24 * 8, *others, **length)  # noqa: E731
    monkeypatch.setattr(vae, "waves", low)
    cached = jax.config.jax_enable_compilation_cache
    yield
    jax.config.update("jax_enable_compilation_cache", cached)
    for flag in command.FLAGS:
        command.FLAGS[flag].unparse()


def numbers(result) -> list[float]:
    """All figures of a result."""
    if isinstance(result, dict | list):
        parts = result.values() if isinstance(result, dict) else result
        return [number for part in parts for number in numbers(part)]
    return [result] if isinstance(result, int | float) else []


@pytest.mark.parametrize("case", [slow(case) if case in ("vae", "tiles") else case for case in command.CASES])
def test_case(case, toy, tmp_path):
    flags = [*FLAGS, f"--case={case}", f"--out={tmp_path}/{case}.json"]
    flags += ["--model=toy_images"] if case == "image_to_video" else []
    flags += ["--quant_scheme=block128"] if case == "layer" else []
    command.FLAGS(flags)
    saved = command.save(command.CASES[case]())
    written = json.loads((tmp_path / f"{case}.json").read_text())
    assert written["case"] == case
    assert written["result"] == json.loads(json.dumps(saved["result"]))
    figures = numbers(saved["result"])
    assert figures
    assert all(map(math.isfinite, figures))
    assert case in report(written)

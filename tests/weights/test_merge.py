"""Merging: TurboDiffusion's rule on checkpoints of every layout, written in every layout, one tensor at a time."""

import tracemalloc

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tests.app.test_generate import ROOT, run_all
from tests.weights.checkpoints import diffusers, official, save, save_shards, small, training, turbo
from turbojax.errors import CheckpointError, UserError
from turbojax.kernels.int8 import QuantConfig, quantize_blocks
from turbojax.models.wan import WanConfig
from turbojax.weights.convert import convert
from turbojax.weights.io import read_tensors
from turbojax.weights.layouts import generated, wan_layout
from turbojax.weights.load import load_wan
from turbojax.weights.merge import MergedTensors, merge

SCRIPT = str(ROOT / "scripts" / "merge.py")
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def states():
    """Base in bfloat16 but for its norms, the pretrained one, and that one tuned with SLA."""
    base = {
        name: tensor if "norm" in name else tensor.astype(BFLOAT16)
        for name, tensor in turbo(small(dtype=jnp.float32), seed=1).items()
    }
    return base, turbo(seed=2), turbo(small(attention_type="sla"), seed=3)


@pytest.fixture(scope="module")
def expected(states):
    base, low, high = states
    merged = {
        name: (tensor.astype(np.float32) + (high[name] - low[name])).astype(tensor.dtype)
        for name, tensor in base.items()
    }
    return merged | {name: high[name] for name in high if "proj_l" in name}


@pytest.fixture
def paths(tmp_path, states):
    return [save(tmp_path / "in" / f"{i}.safetensors", state) for i, state in enumerate(states)]


def check(output, expected):
    written = read_tensors(output)
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        assert written[name].dtype == tensor.dtype, name
        np.testing.assert_allclose(
            written[name].astype(np.float32), tensor.astype(np.float32), rtol=1e-6, atol=1e-6, err_msg=name
        )


def refused(*arguments, **options) -> str:
    with pytest.raises(UserError) as error:
        merge(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def orbax(path, state):
    """A converted folder has the module's dtypes: float32 throughout keeps the values."""
    convert(save(path.with_suffix(".safetensors"), state), path, format="orbax", dtype=jnp.float32)
    return path


# How each of the three inputs may be arranged.
LAYOUTS = {
    "turbodiffusion": save,
    "pth": lambda path, state: save(path.with_suffix(".pth"), state),
    "training": lambda path, state: save(path.with_suffix(".pth"), training(state)),
    "official": lambda path, state: save(path, official(state)),
    "shards": lambda path, state: save_shards(path.with_suffix(""), official(state)).parent,
    "diffusers": lambda path, state: save(path, diffusers(state)),
    "orbax": lambda path, state: orbax(path.with_suffix(""), state),
}


@pytest.mark.parametrize(
    "layouts",
    [
        ("turbodiffusion", "turbodiffusion", "turbodiffusion"),
        ("pth", "shards", "training"),
        ("diffusers", "official", "pth"),
        ("training", "orbax", "diffusers"),
    ],
    ids="-".join,
)
def test_layouts(tmp_path, states, expected, layouts):
    paths = [
        LAYOUTS[layout](tmp_path / f"{i}.safetensors", state)
        for i, (layout, state) in enumerate(zip(layouts, states, strict=True))
    ]
    output = tmp_path / "out" / "x.safetensors"
    summary = merge(*paths, output)
    check(output, expected)
    assert summary == ("transformer", len(expected), sum(tensor.nbytes for tensor in expected.values()))
    assert load_wan(output).config.attention_type == "sla"


def test_what_it_is_run_with_comes_with_the_projection(tmp_path, states, caplog):
    """Also into a file that has no place for it, which says what to give."""
    settings = {"sla_topk": "0.67", "sla_blocks": "[64, 64]", "sage_values": '"exact"'}
    base, low, high = (
        save(tmp_path / f"{i}.safetensors", state, **header)
        for i, (state, header) in enumerate(zip(states, ({"sigma_max": "200.0"}, {}, settings), strict=True))
    )
    merge(base, low, high, tmp_path / "x.safetensors")
    config = load_wan(tmp_path / "x.safetensors").config
    assert (config.sla_topk, config.sla_blocks, config.sage_values, config.sigma_max) == (
        0.67,
        (64, 64),
        "exact",
        200.0,
    )
    assert "has no place for sla_blocks=(64, 64)" in refused(base, low, high, tmp_path / "x.pth", format="pth")
    high = save(tmp_path / "high.safetensors", states[2], sla_topk="0.67")
    merge(base, low, high, tmp_path / "x.pth", format="pth")
    assert "give --config.sla_topk=0.67 --config.sigma_max=200.0 with it" in caplog.text


def test_weight(paths, states, tmp_path):
    merge(*paths, tmp_path / "x.safetensors", weight=0.5, dtype=jnp.float32)
    base, low, high = (state["blocks.1.ffn.2.weight"].astype(np.float32) for state in states)
    written = read_tensors(tmp_path / "x.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {np.dtype(np.float32)}
    wanted = (base + 0.5 * (high - low)).astype(BFLOAT16)  # the rule gives base's dtype, whatever is written
    np.testing.assert_array_equal(written["blocks.1.ffn.2.weight"], wanted.astype(np.float32))


def test_nothing_is_added_with_weight_zero(paths, states, tmp_path):
    merge(*paths, tmp_path / "x.safetensors", weight=0.0)
    written = read_tensors(tmp_path / "x.safetensors")
    assert all(written[name].tobytes() == tensor.tobytes() for name, tensor in states[0].items())


def test_quantized(paths, expected, tmp_path):
    merge(*paths, tmp_path / "x.safetensors", quantize="block128")
    written = read_tensors(tmp_path / "x.safetensors")
    assert list(written) == list(wan_layout(small(attention_type="sla", quant=QuantConfig())))
    for name in ("blocks.0.self_attn.q", "blocks.1.ffn.0"):
        q, scale = quantize_blocks(jnp.asarray(expected[f"{name}.weight"]))
        np.testing.assert_allclose(written[f"{name}.scale"], scale, rtol=1e-2)
        assert np.abs(written[f"{name}.int8_weight"].astype(int) - np.asarray(q, int)).max() <= 1
        assert written[f"{name}.scale"].dtype == np.float32
    assert written["head.head.weight"].dtype == BFLOAT16


def test_pth_and_orbax(paths, expected, tmp_path):
    merge(*paths, tmp_path / "x.pth", format="pth")
    check(tmp_path / "x.pth", expected)
    merge(*paths, tmp_path / "folder", format="orbax")
    config = load_wan(tmp_path / "folder").config
    assert (config.attention_type, config.num_heads, config.dtype) == ("sla", 2, BFLOAT16)
    convert(tmp_path / "folder", tmp_path / "back.safetensors")  # and from there to TurboDiffusion's names
    check(tmp_path / "back.safetensors", {name: tensor.astype(BFLOAT16) for name, tensor in expected.items()})


def test_other_names(paths, states, tmp_path):
    message = refused(*paths, tmp_path / "x.safetensors", names="diffusers")
    assert message.startswith("names='diffusers' have no place for int8 weights and SLA's proj_l")
    dense = {name: tensor for name, tensor in states[2].items() if "proj_l" not in name}
    paths[2] = save(tmp_path / "dense.safetensors", dense)
    merge(*paths, tmp_path / "turbo.safetensors")
    for names, arrange in (("official", official), ("diffusers", diffusers)):
        merge(*paths, tmp_path / f"{names}.safetensors", names=names)
        check(tmp_path / f"{names}.safetensors", arrange(read_tensors(tmp_path / "turbo.safetensors")))


def test_what_only_one_has(tmp_path, paths, states, caplog):
    """Image conditioning of the base stays, whatever the other two are."""
    base = turbo(small(in_channels=36, attention_type="sla"), seed=1)
    merge(save(tmp_path / "i2v.safetensors", base), *paths[1:], tmp_path / "x.safetensors")
    written = read_tensors(tmp_path / "x.safetensors")
    kept = [name for name in base if "proj_l" in name or name == "patch_embedding.weight"]
    assert [name for name in base if np.array_equal(written[name], base[name])] == kept


def test_int8_is_refused(tmp_path, paths):
    convert(paths[1], tmp_path / "int8.safetensors", quantize="block128")
    for i in range(3):
        given = [*paths[:i], tmp_path / "int8.safetensors", *paths[i + 1 :]]
        assert "int8.safetensors holds int8 weights; merge the unq" in refused(*given, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_what_does_not_belong_together(tmp_path, paths):
    large = save(tmp_path / "large.safetensors", turbo(small(num_layers=3)))
    message = refused(paths[0], large, paths[2], tmp_path / "x.safetensors")
    assert "large.safetensors is 3 layers of width 256 and 384 and 0.safetensors 2 layers" in message
    clip = save(tmp_path / "clip.safetensors", turbo(small(clip_dim=32)))
    assert "clip.safetensors has " in refused(paths[0], paths[1], clip, tmp_path / "x.safetensors")
    assert "weight=nan must be a number" in refused(*paths, tmp_path / "x.safetensors", weight=float("nan"))
    broken = {name: tensor for name, tensor in turbo().items() if name != "blocks.1.modulation"}
    with pytest.raises(CheckpointError, match=r"broken.* 1 missing: blocks\.1\.modulation"):
        merge(paths[0], save(tmp_path / "broken.safetensors", broken), paths[2], tmp_path / "x.safetensors")
    assert not list(tmp_path.glob("*x.safetensors*"))


def test_one_tensor_at_a_time(tmp_path):
    """Memory does not grow with the files: float32 copies of one tensor, here 1.8 MB in bfloat16, of 25 MB each."""
    config = WanConfig(dim=384, ffn_dim=768, num_heads=3, num_layers=8, text_dim=64)
    paths = [save(tmp_path / f"{i}.pth", dict(generated(wan_layout(config), jnp.bfloat16, seed=i))) for i in range(3)]
    largest = 6 * 384 * 384 * 2
    assert paths[0].stat().st_size > 12 * largest
    tracemalloc.start()
    try:
        merge(*paths, tmp_path / "x.safetensors")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 * largest


def test_tensors_by_any_name():
    """MergedTensors is a mapping over any keys: the order is base's, then what is new."""
    base = {"b": np.asarray([1, 2], np.int32), "a": np.ones(2, np.float32)}
    low = {"b": np.asarray([0.5, 0.5]), "x": np.ones(1)}
    high = {"new": np.ones(3), "b": np.asarray([1.2, 0.2]), "x": np.zeros(1)}
    merged = MergedTensors(base, low, high)
    assert list(merged) == ["b", "a", "new", "x"]
    assert len(merged) == 4
    assert merged["b"].tolist() == [1, 1]  # 1.7 and 1.7, cut off
    assert merged["b"].dtype == np.int32
    assert merged["x"].tolist() == [0]
    assert merged.specs["new"].shape == (3,)
    with pytest.raises(KeyError):
        merged["nothing"]


def test_the_script(tmp_path, paths):
    given = [f"--{name}={path}" for name, path in zip(("base", "diff_base", "diff_target"), paths, strict=True)]
    outcomes = run_all(
        {
            "done": [SCRIPT, *given, "--output=FOLDER/x.pth", "--format=pth", "--weight=0.5", "--dtype=float32"],
            "again": [SCRIPT, *given, "--output=FOLDER/x.pth", "--format=pth"],
            "no target": [SCRIPT, *given[:2], "--output=FOLDER/y.safetensors"],
            "no file": [SCRIPT, *given, "--base=FOLDER/nothing.pth", "--output=FOLDER/y.safetensors"],
            "no number": [SCRIPT, *given, "--weight=much"],
            "names": [SCRIPT, *given, "--names=mine"],
        },
        tmp_path,
    )
    code, _, stderr = outcomes.pop("done")
    assert code == 0, stderr
    assert f"{len(turbo()) + 4} tensors" in stderr.splitlines()[-1]
    assert {tensor.dtype for tensor in read_tensors(tmp_path / "x.pth").values()} == {np.dtype(np.float32)}
    messages = {
        "again": "x.pth already exists",
        "no target": "give --base=, --diff_base=, --diff_target= and --output=",
        "no file": "nothing.pth does not exist",
        "no number": "--weight=much",
        "names": "--names=mine",
    }
    for name, (code, _, stderr) in outcomes.items():
        assert code == 2, stderr
        assert messages[name] in stderr.splitlines()[-1]

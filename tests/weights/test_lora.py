"""LoRA files in each naming, merged into float and int8 networks, and files that do not fit."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.weights.checkpoints import DIFFUSERS, parameters, save, small
from turbojax.app.generate import read_settings
from turbojax.config import base_config
from turbojax.errors import CheckpointError, UserError
from turbojax.weights import convert
from turbojax.weights.load import load_wan
from turbojax.weights.lora import LoRA, read_lora
from turbojax.weights.options import NetworkOptions

RNG = np.random.default_rng(0)
CONFIG = small()
D, F, R = CONFIG.dim, CONFIG.ffn_dim, 4
# The modules that are changed, in the original naming: [out, in].
MODULES = {
    "blocks.0.self_attn.q": (D, D),
    "blocks.1.self_attn.o": (D, D),
    "blocks.1.cross_attn.k": (D, D),
    "blocks.0.ffn.0": (F, D),
    "blocks.1.ffn.2": (D, F),
    "text_embedding.0": (D, CONFIG.text_dim),
    "head.head": (64, D),
}


def drawn(*shape: int) -> np.ndarray:
    return (0.1 * RNG.standard_normal(shape)).astype(np.float32)


@pytest.fixture(scope="module")
def products():
    """up and down by module."""
    return {name: (drawn(out, R), drawn(R, features)) for name, (out, features) in MODULES.items()}


@pytest.fixture(scope="module")
def file(tensors, tmp_path_factory):
    return save(tmp_path_factory.mktemp("lora") / "transformer.safetensors", tensors)


def original(products, alpha: float | None = None) -> dict[str, np.ndarray]:
    out = {}
    for name, (up, down) in products.items():
        out[f"diffusion_model.{name}.lora_up.weight"] = up
        out[f"diffusion_model.{name}.lora_down.weight"] = down
        if alpha is not None:
            out[f"diffusion_model.{name}.alpha"] = np.array(alpha, np.float32)
    return out


def diffusers(products, prefix: str = "transformer.") -> dict[str, np.ndarray]:
    out = {}
    for name, (up, down) in products.items():
        name += "."
        for ours, theirs in DIFFUSERS:
            name = name.replace(ours, theirs)
        out |= {f"{prefix}{name}lora_A.weight": down, f"{prefix}{name}lora_B.weight": up}
    return out


def kohya(products, alpha: float) -> dict[str, np.ndarray]:
    out = {}
    for name, (up, down) in products.items():
        name = "lora_unet_" + name.replace(".", "_")
        out |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": np.float32(alpha)}
    return {name: np.asarray(value) for name, value in out.items()}


def peft(products) -> dict[str, np.ndarray]:
    """Names as PEFT itself and DiffSynth save them: the adapter's name inside."""
    out = {}
    for name, (up, down) in products.items():
        out |= {f"base_model.model.{name}.lora_A.default.weight": down, f"{name}.lora_B.default.weight": up}
    return out


def merged(tensors, products, scale: float) -> dict[str, np.ndarray]:
    """The checkpoint with the products added by NumPy."""
    changes = {f"{name}.weight": scale * (up @ down) for name, (up, down) in products.items()}
    return tensors | {name: (tensors[name] + change).astype(np.float32) for name, change in changes.items()}


def assert_close(model, expected):
    ours, theirs = parameters(model), parameters(expected)
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("names", "scale"),
    [
        (lambda p: original(p), 1.0),
        (lambda p: original(p, alpha=2.0), 0.5),
        (diffusers, 1.0),
        (lambda p: kohya(p, alpha=8.0), 2.0),
        (peft, 1.0),
    ],
    ids=["original", "original_alpha", "diffusers", "kohya", "peft"],
)
def test_namings(tmp_path, tensors, file, products, names, scale):
    path = save(tmp_path / "lora.safetensors", names(products))
    model = load_wan(file, NetworkOptions(dtype=jnp.float32), loras=[LoRA(path, 0.7)])
    expected = save(tmp_path / "merged.safetensors", merged(tensors, products, 0.7 * scale))
    assert_close(model, load_wan(expected, NetworkOptions(dtype=jnp.float32)))


def test_alpha_in_the_header(tmp_path, tensors, file, products):
    header = '{"transformer.r": 4, "transformer.lora_alpha": 2}'
    path = save(tmp_path / "lora.safetensors", diffusers(products), lora_adapter_metadata=header)
    expected = save(tmp_path / "merged.safetensors", merged(tensors, products, 0.5))
    assert_close(
        load_wan(file, NetworkOptions(dtype=jnp.float32), loras=[LoRA(path)]),
        load_wan(expected, NetworkOptions(dtype=jnp.float32)),
    )


def test_quantized_after_merging(tmp_path, tensors, file, products):
    path = save(tmp_path / "lora.safetensors", original(products))
    expected = save(tmp_path / "merged.safetensors", merged(tensors, products, 1.0))
    ours = parameters(load_wan(file, NetworkOptions(quant_linear=True, dtype=jnp.float32), loras=[LoRA(path)]))
    theirs = parameters(load_wan(expected, NetworkOptions(quant_linear=True, dtype=jnp.float32)))
    for name, value in theirs.items():
        step = 1 if value.dtype == np.int8 else 1e-5  # a sum in another order may round to the next integer
        np.testing.assert_allclose(ours[name].astype(np.float32), value.astype(np.float32), atol=step, err_msg=name)


def test_into_an_int8_checkpoint(tmp_path, tensors, file, products):
    convert.convert(file, tmp_path / "int8.safetensors", quantize="block128", dtype=jnp.float32)
    path = save(tmp_path / "lora.safetensors", original(products))
    plain = parameters(load_wan(tmp_path / "int8.safetensors", NetworkOptions(dtype=jnp.float32)))
    model = load_wan(tmp_path / "int8.safetensors", NetworkOptions(dtype=jnp.float32), loras=[LoRA(path)])
    assert model.config.quant is not None
    ours = parameters(model)
    weights = parameters(load_wan(tmp_path / "int8.safetensors", NetworkOptions(quant_linear=False, dtype=jnp.float32)))
    again = parameters(
        load_wan(
            tmp_path / "int8.safetensors", NetworkOptions(quant_linear=False, dtype=jnp.float32), loras=[LoRA(path)]
        )
    )
    up, down = products["blocks.0.self_attn.q"]
    name = "blocks.self_attn.q.weight"
    np.testing.assert_allclose(again[name][0] - weights[name][0], up @ down, atol=1e-5)
    assert not np.array_equal(ours[name][0], plain[name][0])
    np.testing.assert_array_equal(ours[name][1], plain[name][1])  # not in the LoRA: stays as it is in the file


def test_differences(tmp_path, tensors, file):
    shapes = {
        "blocks.0.self_attn.v.diff": (D, D),
        "blocks.0.self_attn.v.diff_b": (D,),
        "blocks.1.cross_attn.norm_k.diff": (D,),
        "blocks.1.norm3.diff_b": (D,),
        "blocks.1.diff_m": (1, 6, D),
        "head.diff_m": (1, 2, D),
        "patch_embedding.diff": (D, 16, 1, 2, 2),
    }
    changes = {name: drawn(*shape) for name, shape in shapes.items()}
    path = save(tmp_path / "lora.safetensors", {f"diffusion_model.{name}": value for name, value in changes.items()})
    kinds = {"diff": "weight", "diff_b": "bias", "diff_m": "modulation"}
    expected = dict(tensors)
    for name, value in changes.items():
        module, _, kind = name.rpartition(".")
        name = f"{module}.{kinds[kind]}"
        expected[name] = expected[name] + np.float32(0.5) * value.reshape(expected[name].shape)
    expected = save(tmp_path / "merged.safetensors", expected)
    assert_close(
        load_wan(file, NetworkOptions(dtype=jnp.float32), loras=[LoRA(path, 0.5)]),
        load_wan(expected, NetworkOptions(dtype=jnp.float32)),
    )


def test_several_and_experts(tmp_path, tensors, file, products):
    first, second = ({name: products[name]} for name in ("blocks.0.ffn.0", "blocks.1.ffn.2"))
    both = save(tmp_path / "both.safetensors", original(first))
    low = save(tmp_path / "low.safetensors", original(second))
    pair = save(tmp_path / "pair.safetensors", diffusers(first) | diffusers(second, "transformer_2."))
    for loras, expert, changes in (
        ([LoRA(both), LoRA(low, expert="low")], "high", first),
        ([LoRA(both), LoRA(low, expert="low")], "low", first | second),
        ([LoRA(pair)], "high", first),
        ([LoRA(pair)], "low", second),
    ):
        expected = save(tmp_path / "merged.safetensors", merged(tensors, changes, 1.0))
        model = load_wan(file, NetworkOptions(dtype=jnp.float32), loras=loras, expert=expert)
        assert_close(model, load_wan(expected, NetworkOptions(dtype=jnp.float32)))


def test_a_converted_model(tmp_path, tensors, file, products):
    convert.convert(file, tmp_path / "model", dtype=jnp.float32, format="orbax")
    path = save(tmp_path / "lora.safetensors", original(products))
    expected = save(tmp_path / "merged.safetensors", merged(tensors, products, 1.0))
    model = load_wan(tmp_path / "model", NetworkOptions(dtype=jnp.float32), loras=[LoRA(path)])
    assert_close(model, load_wan(expected, NetworkOptions(dtype=jnp.float32)))


def test_what_has_no_place_is_named(tmp_path, file, products, caplog):
    foreign = {"blocks.0.cross_attn.k_img": (drawn(D, R), drawn(R, D)), "blocks.7.ffn.0": (drawn(F, R), drawn(R, D))}
    path = save(tmp_path / "lora.safetensors", original(products | foreign) | {"text_encoder.x": drawn(2)})
    with caplog.at_level("WARNING", logger="absl"):
        load_wan(file, NetworkOptions(dtype=jnp.float32), loras=[LoRA(path)])
    assert "3 parts fit nowhere" in caplog.text
    for name in ("k_img", "blocks.7.ffn.0", "text_encoder.x"):
        assert name in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {"blocks.0.self_attn.q.weight": drawn(D, D)}, "is no LoRA of this network: it holds blocks.0"),
        (lambda t: original({"blocks.0.ffn.0": (drawn(F, R), drawn(R, 128))}), r"ffn.0.weight \[384, 128\] instead of"),
        (
            lambda t: original({"blocks.0.ffn.0": (drawn(F, R), drawn(R + 1, D))}),
            r"ffn.0.weight has factors of shapes \[384, 4\] and \[5, 256\], which have no product",
        ),
        (lambda t: {name: v for name, v in t.items() if "lora_up" not in name}, "has down only"),
        (
            lambda t: t | {"diffusion_model.blocks.0.ffn.0.dora_scale": drawn(F, 1)},
            "has parts that are not read .*ffn.0.dora_scale.*: DoRA",
        ),
        (lambda t: t | diffusers({"blocks.0.ffn.0": (drawn(F, R), drawn(R, D))}), "is given twice"),
    ],
    ids=["weights", "misshapen", "ranks", "half", "dora", "twice"],
)
def test_files_that_do_not_fit(tmp_path, file, products, change, message):
    path = save(tmp_path / "lora.safetensors", change(original(products)))
    with pytest.raises(CheckpointError, match=message) as error:
        load_wan(file, NetworkOptions(dtype=jnp.float32), loras=[LoRA(path)])
    assert "\n" not in str(error.value)


Q = "diffusion_model.blocks.0.self_attn.q"
K = "diffusion_model.blocks.0.self_attn.k"
UP, DOWN = f"{Q}.lora_up.weight", f"{Q}.lora_down.weight"
PAIR = {UP: np.ones((D, R), np.float32), DOWN: np.ones((R, D), np.float32)}


def shaped(*shape: int) -> np.ndarray:
    """An array that takes no memory."""
    return np.broadcast_to(np.float32(1), shape)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({UP: shaped(D, 0), DOWN: shaped(0, D)}, r"q.weight has no values: up is \[256, 0\]"),
        ({UP: shaped(0, R)}, r"q.weight has no values: up is \[0, 4\]"),
        ({f"{Q}.alpha": shaped(0)}, r"has an alpha of shape \[0\], which must be one number"),
        ({f"{Q}.alpha": shaped(3)}, r"has an alpha of shape \[3\]"),
        ({f"{Q}.alpha": shaped(1, 1)}, r"has an alpha of shape \[1, 1\]"),
        ({f"{Q}.alpha": np.float32("nan")}, "has the alpha nan, which must be a number up to 1e"),
        ({f"{Q}.alpha": np.float32("inf")}, "has the alpha inf"),
        ({f"{Q}.alpha": np.bool_(True)}, "alpha' is bool and must be floating point"),
        ({UP: np.float32(1)}, r"has factors of shapes \[\] and \[4, 256\], which have no product"),
        ({UP: shaped(D)}, r"has factors of shapes \[256\] and"),
        ({UP: shaped(D, R, 2)}, r"has factors of shapes \[256, 4, 2\] and"),
        ({DOWN: shaped(R, D, 2)}, r"q.weight \[256, 512\] instead of \[256, 256\]"),
        ({UP: shaped(D, 10**6), DOWN: shaped(10**6, D)}, r"has rank 1000000, more than the sizes of \[256, 256\]"),
        ({UP: np.full((D, R), np.nan, np.float32)}, "holds NaN or infinity in its up"),
        ({DOWN: np.full((R, D), np.inf, np.float32)}, "holds NaN or infinity in its down"),
        ({f"{Q}.diff": np.full((D, D), np.nan, np.float32), UP: None, DOWN: None}, "NaN or infinity in its difference"),
        ({f"{Q}.diff": shaped(D, 0), UP: None, DOWN: None}, "has no values: diff is"),
        ({f"{Q}.diff": shaped(), UP: None, DOWN: None}, r"q.weight \[\] instead of \[256, 256\]"),
        ({f"{Q}.diff": shaped(D, D)}, "has up and down and diff, and only a difference alone"),
        ({f"{Q}.lora_B.weight": shaped(D, R)}, "q.weight has its up twice"),
        ({f"{Q}.lora_up.default.weight": shaped(D, R)}, "q.weight has its up twice"),
        ({"lora_unet_blocks_0_self_attn_q.lora_up.weight": shaped(D, R)}, "q.weight has its up twice"),
        ({f"{K}.alpha": np.float32(1)}, "k.weight has alpha only"),
    ],
)
def test_impossible_parts(monkeypatch, change, message):
    tensors = {name: np.asarray(value) for name, value in (PAIR | change).items() if value is not None}
    monkeypatch.setattr("turbojax.weights.lora.read_tensors", lambda path: tensors)
    with pytest.raises(CheckpointError, match=message) as error:
        read_lora(LoRA("lora.pth"), CONFIG)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    "name",
    [
        f"{Q}.lora_B.bias",
        f"{Q}.lora_B.default.bias",
        f"{Q}.lora_mid.weight",
        f"{Q}.dora_scale",
        f"{Q}.lora_magnitude_vector",
        f"{Q}.lora_magnitude_vector.weight",
        f"{Q}.lora_magnitude_vector.default.weight",
        f"{Q}.magnitude",
        "transformer.blocks.0.attn1.to_q.dora.magnitude",
        "blocks.0.self_attn.q.weight_m",
        "lora_unet_blocks_0_self_attn_q.dora_scale",
        f"{K}.lokr_w1",
        f"{K}.lokr_w2_a",
        f"{K}.hada_w1_a",
        f"{K}.oft_blocks",
        f"{K}.w_norm",
        f"{K}.surprise.with.more",
        "transformer.blocks.1.ffn.net.2.b_norm",
        "lycoris_blocks_0_self_attn_k.lokr_w1",
        f"{K}.weight",
    ],
)
def test_parts_that_are_not_read_are_refused_by_name(tmp_path, name):
    path = save(tmp_path / "lora.safetensors", PAIR | {name: drawn(D)})
    with pytest.raises(CheckpointError, match=rf"has parts that are not read \({name}\)"):
        read_lora(LoRA(path), CONFIG)


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), -float("inf"), 1e4, "1", None])
def test_a_strength_that_is_no_number(strength):
    with pytest.raises(UserError, match=r"lora_strength=.* must be a number from -100 to 100"):
        LoRA("lora.safetensors", strength)


def test_a_strength_is_checked_before_anything_is_loaded():
    config = base_config(weights="demo", lora="nowhere.safetensors", lora_strength=float("nan"))
    with pytest.raises(UserError, match="lora_strength is nan and must be a number from -100 to 100"):
        read_settings(config)


@pytest.mark.parametrize(
    ("strength", "change"),
    [(0.0, {}), (1.0, {f"{Q}.alpha": np.float32(0)}), (1.0, {UP: np.zeros((D, R), np.float32)})],
    ids=["strength", "alpha", "factor"],
)
def test_what_changes_nothing_leaves_int8_codes(tmp_path, file, strength, change, caplog):
    int8 = tmp_path / "int8.safetensors"
    convert.convert(file, int8, quantize="block128")
    tensors = {name: np.asarray(value) for name, value in (PAIR | change).items()}
    lora = LoRA(save(tmp_path / "lora.safetensors", tensors), strength)
    stored, ours = parameters(load_wan(int8)), parameters(load_wan(int8, loras=[lora]))
    for name, value in stored.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
    with caplog.at_level("INFO", logger="absl"):
        load_wan(int8, loras=[LoRA(save(tmp_path / "one.safetensors", PAIR))])
    line = "20 linear layers are int8 as stored (block128), run as block128, 1 of them quantized again with LoRAs"
    assert line in caplog.text


def test_the_scale_of_each_network_is_its_own(tmp_path):
    header = '{"transformer.lora_alpha": 2, "transformer_2.lora_alpha": 8, "text_encoder.lora_alpha": 1}'
    pair = {
        f"transformer.{module}.{half}.weight": value
        for module, half, value in (
            ("blocks.0.attn1.to_q", "lora_A", drawn(R, D)),
            ("blocks.0.attn1.to_q", "lora_B", drawn(D, R)),
        )
    }
    pair |= {name.replace("transformer.", "transformer_2."): value for name, value in pair.items()}
    path = save(tmp_path / "lora.safetensors", pair, lora_adapter_metadata=header)
    for expert, scale in (("high", 0.5), ("low", 2.0)):
        (change,) = read_lora(LoRA(path), CONFIG, expert=expert).values()
        assert change.scale == scale


def test_parts_of_a_second_network_are_told(tmp_path, caplog):
    pair = {"transformer.blocks.0.attn1.to_q.lora_A.weight": drawn(R, D)}
    pair |= {"transformer.blocks.0.attn1.to_q.lora_B.weight": drawn(D, R), "transformer_2.x": drawn(2)}
    read_lora(LoRA(save(tmp_path / "lora.safetensors", pair)), CONFIG)
    assert "1 parts fit nowhere and are left out: transformer_2.x" in caplog.text


def test_alpha_in_pefts_configuration(tmp_path):
    path = save(
        tmp_path / "adapter_model.safetensors",
        {
            f"base_model.model.blocks.0.self_attn.q.{half}.weight": value
            for half, value in (("lora_A", drawn(R, D)), ("lora_B", drawn(D, R)))
        },
    )
    beside = tmp_path / "adapter_config.json"
    for text, scale in ((None, 1.0), ('{"lora_alpha": 2, "r": 4, "peft_type": "LORA"}', 0.5), ("{}", 1.0)):
        if text:
            beside.write_text(text)
        (change,) = read_lora(LoRA(path), CONFIG).values()
        assert change.scale == scale
    for text, message in (
        ('{"lora_alpha": "2"}', "adapter_config.json: lora_alpha is '2' and must be a number"),
        ('{"use_dora": true}', "says use_dora=True, a scale of its own"),
        ("[" * 100_000, "nested 100000 deep"),
    ):
        beside.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            read_lora(LoRA(path), CONFIG)


def test_headers_that_cannot_be_followed(tmp_path, file, products):
    for header, message in (
        ("{", "lora_adapter_metadata in its header is no JSON"),
        ('{"transformer.lora_alpha": [1]}', "lora_alpha is .1. and must"),
        ('{"transformer.use_rslora": true}', "scale of its own"),
    ):
        path = save(tmp_path / "lora.safetensors", diffusers(products), lora_adapter_metadata=header)
        with pytest.raises(CheckpointError, match=message):
            load_wan(file, NetworkOptions(dtype=jnp.float32), loras=[LoRA(path)])

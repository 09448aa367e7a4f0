"""LoRA files in each naming, merged into float and int8 networks, and files that do not fit."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.weights.checkpoints import DIFFUSERS, parameters, save, small, turbo
from turbojax.errors import CheckpointError
from turbojax.weights import convert
from turbojax.weights.load import load_wan
from turbojax.weights.lora import LoRA

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
def tensors():
    return turbo()


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
    """As PEFT itself and DiffSynth save: the adapter's name inside."""
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
    model = load_wan(file, dtype=jnp.float32, loras=[LoRA(path, 0.7)])
    expected = save(tmp_path / "merged.safetensors", merged(tensors, products, 0.7 * scale))
    assert_close(model, load_wan(expected, dtype=jnp.float32))


def test_alpha_in_the_header(tmp_path, tensors, file, products):
    header = '{"transformer.r": 4, "transformer.lora_alpha": 2}'
    path = save(tmp_path / "lora.safetensors", diffusers(products), lora_adapter_metadata=header)
    expected = save(tmp_path / "merged.safetensors", merged(tensors, products, 0.5))
    assert_close(load_wan(file, dtype=jnp.float32, loras=[LoRA(path)]), load_wan(expected, dtype=jnp.float32))


def test_quantized_after_merging(tmp_path, tensors, file, products):
    path = save(tmp_path / "lora.safetensors", original(products))
    expected = save(tmp_path / "merged.safetensors", merged(tensors, products, 1.0))
    ours = parameters(load_wan(file, quant_linear=True, dtype=jnp.float32, loras=[LoRA(path)]))
    theirs = parameters(load_wan(expected, quant_linear=True, dtype=jnp.float32))
    for name, value in theirs.items():
        step = 1 if value.dtype == np.int8 else 1e-5  # a sum in another order may round to the next integer
        np.testing.assert_allclose(ours[name].astype(np.float32), value.astype(np.float32), atol=step, err_msg=name)


def test_into_an_int8_checkpoint(tmp_path, tensors, file, products):
    convert.convert(file, tmp_path / "int8.safetensors", quantize="block128", dtype=jnp.float32)
    path = save(tmp_path / "lora.safetensors", original(products))
    plain = parameters(load_wan(tmp_path / "int8.safetensors", dtype=jnp.float32))
    model = load_wan(tmp_path / "int8.safetensors", dtype=jnp.float32, loras=[LoRA(path)])
    assert model.config.quant is not None
    ours = parameters(model)
    weights = parameters(load_wan(tmp_path / "int8.safetensors", quant_linear=False, dtype=jnp.float32))
    again = parameters(
        load_wan(tmp_path / "int8.safetensors", quant_linear=False, dtype=jnp.float32, loras=[LoRA(path)])
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
    assert_close(load_wan(file, dtype=jnp.float32, loras=[LoRA(path, 0.5)]), load_wan(expected, dtype=jnp.float32))


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
        model = load_wan(file, dtype=jnp.float32, loras=loras, expert=expert)
        assert_close(model, load_wan(expected, dtype=jnp.float32))


def test_a_converted_model(tmp_path, tensors, file, products):
    convert.convert(file, tmp_path / "model", dtype=jnp.float32, format="orbax")
    path = save(tmp_path / "lora.safetensors", original(products))
    expected = save(tmp_path / "merged.safetensors", merged(tensors, products, 1.0))
    model = load_wan(tmp_path / "model", dtype=jnp.float32, loras=[LoRA(path)])
    assert_close(model, load_wan(expected, dtype=jnp.float32))


def test_what_has_no_place_is_named(tmp_path, file, products, caplog):
    foreign = {"blocks.0.cross_attn.k_img": (drawn(D, R), drawn(R, D)), "blocks.7.ffn.0": (drawn(F, R), drawn(R, D))}
    path = save(tmp_path / "lora.safetensors", original(products | foreign) | {"text_encoder.x": drawn(2)})
    with caplog.at_level("WARNING", logger="absl"):
        load_wan(file, dtype=jnp.float32, loras=[LoRA(path)])
    assert "3 parts fit nowhere" in caplog.text
    for name in ("k_img", "blocks.7.ffn.0", "text_encoder.x"):
        assert name in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {"blocks.0.self_attn.q.weight": drawn(D, D)}, "is no LoRA of this network: it holds blocks.0"),
        (lambda t: original({"blocks.0.ffn.0": (drawn(F, R), drawn(R, 128))}), r"ffn.0.weight \[384, 128\] instead of"),
        (lambda t: original({"blocks.0.ffn.0": (drawn(F, R), drawn(R + 1, D))}), "ffn.0.weight has up and down only"),
        (lambda t: {name: v for name, v in t.items() if "lora_up" not in name}, "has down only"),
        (lambda t: t | {"diffusion_model.blocks.0.ffn.0.dora_scale": drawn(F, 1)}, "is a DoRA"),
        (lambda t: t | diffusers({"blocks.0.ffn.0": (drawn(F, R), drawn(R, D))}), "is given twice"),
    ],
    ids=["weights", "misshapen", "ranks", "half", "dora", "twice"],
)
def test_files_that_do_not_fit(tmp_path, file, products, change, message):
    path = save(tmp_path / "lora.safetensors", change(original(products)))
    with pytest.raises(CheckpointError, match=message) as error:
        load_wan(file, dtype=jnp.float32, loras=[LoRA(path)])
    assert "\n" not in str(error.value)


def test_headers_that_cannot_be_followed(tmp_path, file, products):
    for header, message in (("{", "damaged header"), ('{"transformer.use_rslora": true}', "scale of its own")):
        path = save(tmp_path / "lora.safetensors", diffusers(products), lora_adapter_metadata=header)
        with pytest.raises(CheckpointError, match=message):
            load_wan(file, dtype=jnp.float32, loras=[LoRA(path)])

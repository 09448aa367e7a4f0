"""umT5 encoder: parity with the recorded reference, padding, dtypes, checkpoint names, full size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.golden_io import GOLDEN, load
from tests.parity.umt5 import build, recompute
from turbojax.errors import CheckpointError, UserError
from turbojax.models import umt5
from turbojax.models.umt5 import UMT5Config, UMT5Encoder, embed_tokens, encode_text
from turbojax.weights.umt5 import detect_umt5_config, token_table, umt5_rules

pytestmark = pytest.mark.usefixtures("exact_matmuls")

FIXTURE_CONFIG = UMT5Config(
    vocab_size=200, dim=64, attention_dim=64, ffn_dim=128, num_heads=4, num_layers=3, dtype=jnp.float32
)

TRANSFORMERS_NAMES = {
    "token_embedding": "shared",
    "norm": "encoder.final_layer_norm",
    "norm1": "0.layer_norm",
    "norm2": "1.layer_norm",
    "attn.q": "0.SelfAttention.q",
    "attn.k": "0.SelfAttention.k",
    "attn.v": "0.SelfAttention.v",
    "attn.o": "0.SelfAttention.o",
    "pos_embedding.embedding": "0.SelfAttention.relative_attention_bias",
    "ffn.gate.0": "1.DenseReluDense.wi_0",
    "ffn.fc1": "1.DenseReluDense.wi_1",
    "ffn.fc2": "1.DenseReluDense.wo",
}


@pytest.fixture(scope="module")
def golden():
    return load(GOLDEN / "umt5.safetensors")


@pytest.fixture(scope="module")
def weights(golden):
    return {name[2:]: value for name, value in golden[1].items() if name.startswith("w.")}


@pytest.fixture(scope="module")
def prompts(golden):
    return golden[1]["in.ids"], golden[1]["in.mask"]


@pytest.fixture(scope="module")
def encoder(weights):
    return build(weights)


def as_transformers(name: str) -> str:
    stem = name.removesuffix(".weight")
    if not stem.startswith("blocks."):
        return TRANSFORMERS_NAMES[stem] + ".weight"
    _, layer, part = stem.split(".", 2)
    return f"encoder.block.{layer}.layer.{TRANSFORMERS_NAMES[part]}.weight"


def test_matches_the_reference(golden):
    config, tensors = golden
    results = recompute(config, tensors)
    assert set(results) == {name for name in tensors if name.startswith("out.")}
    for name, (value, tolerance) in results.items():
        np.testing.assert_allclose(value, tensors[name], rtol=0, atol=tolerance, err_msg=name)


def test_padding_does_not_change_the_prompt(encoder, weights, prompts):
    ids, mask = prompts
    short = encode_text(encoder, weights["token_embedding.weight"], ids[:1, :17], mask[:1, :17], length=32)
    both = encode_text(encoder, weights["token_embedding.weight"], ids, mask, length=32)
    np.testing.assert_allclose(short[0], both[0], rtol=0, atol=1e-5)


def test_rows_past_the_prompt_are_zero(encoder, weights, prompts):
    out = np.asarray(encode_text(encoder, weights["token_embedding.weight"], *prompts))
    assert out.shape == (2, 512, 64)
    assert not out[0, 17:].any()
    assert not out[1, 24:].any()
    assert out[0, :17].any(axis=-1).all()
    assert out[1, :24].any(axis=-1).all()


def test_a_function_serves_as_encoder(encoder, weights, prompts):
    table = weights["token_embedding.weight"]
    ours = encode_text(encoder, table, *prompts, length=32)
    theirs = encode_text(lambda x, mask: encoder(x, mask), table, *prompts, length=32)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_second_prompt_does_not_compile_again(encoder, weights, prompts):
    ids, mask = prompts
    encode_text(encoder, weights["token_embedding.weight"], ids, mask)
    compiled = umt5.run_encoder._cache_size(), umt5.zero_past_end._cache_size()
    encode_text(build(weights), weights["token_embedding.weight"], ids[::-1], mask[::-1])
    assert (umt5.run_encoder._cache_size(), umt5.zero_past_end._cache_size()) == compiled


def test_bfloat16_stays_near_float32(weights, prompts):
    table = weights["token_embedding.weight"]
    expected = np.asarray(encode_text(build(weights), table, *prompts))
    low = encode_text(build(weights, jnp.bfloat16), table.astype(jnp.bfloat16), *prompts)
    assert low.dtype == jnp.bfloat16
    error = np.asarray(low, np.float32) - expected
    assert np.sqrt(np.mean(error**2) / np.mean(expected**2)) < 2e-2  # measured: 1.4e-2


@pytest.mark.parametrize("tables", [("shared",), ("encoder.embed_tokens",), ("shared", "encoder.embed_tokens")])
def test_transformers_names_give_the_same(encoder, weights, prompts, tables):
    renamed = {as_transformers(name): value for name, value in weights.items()}
    table = renamed.pop("shared.weight")
    renamed |= {f"{name}.weight": table for name in tables}
    theirs = build(renamed)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(theirs), nnx.state(encoder))
    assert token_table(renamed) is table


def test_prefixed_official_names_give_the_same(encoder, weights):
    theirs = build({f"encoder.{name}": value for name, value in weights.items()})
    jax.tree.map(np.testing.assert_array_equal, nnx.state(theirs), nnx.state(encoder))


def test_config_is_detected(weights):
    assert detect_umt5_config(weights, dtype=jnp.float32) == FIXTURE_CONFIG
    renamed = {as_transformers(name): value for name, value in weights.items()}
    assert detect_umt5_config(renamed, dtype=jnp.float32) == FIXTURE_CONFIG
    assert detect_umt5_config(weights).dtype == jnp.bfloat16


@pytest.mark.parametrize("read", [umt5_rules, detect_umt5_config, token_table])
@pytest.mark.parametrize("foreign", [{}, {"blocks.0.self_attn.q.weight": np.zeros((4, 4), np.float32)}])
def test_foreign_checkpoints_are_refused(read, foreign):
    with pytest.raises(CheckpointError, match="no umT5 encoder"):
        read(foreign)


def test_incomplete_checkpoints_are_refused(weights):
    def without(name):
        return {key: value for key, value in weights.items() if key != name}

    with pytest.raises(CheckpointError, match=r"token_embedding\.weight"):
        detect_umt5_config(without("token_embedding.weight"))
    with pytest.raises(CheckpointError, match=r"blocks\.ffn\.fc1\.weight"):
        detect_umt5_config(without("blocks.0.ffn.fc1.weight"))
    with pytest.raises(CheckpointError, match=r"blocks\.attn\.k\.weight\[layer 1\]"):
        build(without("blocks.1.attn.k.weight"))
    flat = weights | {"token_embedding.weight": np.zeros(8, np.float32)}
    with pytest.raises(CheckpointError, match="must be floating point numbers \\[vocab, width\\]"):
        token_table(flat)


def test_table_may_be_memory_mapped(weights, prompts, tmp_path):
    table = weights["token_embedding.weight"]
    table.tofile(tmp_path / "table")
    mapped = np.memmap(tmp_path / "table", np.float32, mode="r", shape=table.shape)
    rows = embed_tokens(mapped, prompts[0])
    assert not isinstance(rows, np.memmap)
    np.testing.assert_array_equal(rows, table[prompts[0]])


@pytest.mark.parametrize("bad", [200, -1])
def test_ids_outside_the_table_are_refused(weights, bad):
    with pytest.raises(UserError, match=f"token id {bad} is outside .* 200 embeddings"):
        embed_tokens(weights["token_embedding.weight"], np.array([[3, bad, 1]], np.int32))


def test_misfitting_ids_and_mask_are_refused(encoder, weights, prompts):
    ids, mask = prompts
    for arguments, length in (((ids, mask[:, :5]), 512), ((ids, mask), 16), ((ids[0], mask[0]), 512)):
        with pytest.raises(UserError, match="tokens <="):
            encode_text(encoder, weights["token_embedding.weight"], *arguments, length=length)


def test_config_is_checked():
    with pytest.raises(UserError, match="attention_dim"):
        UMT5Config.xxl(num_heads=60)
    with pytest.raises(UserError, match="float16"):
        UMT5Config.xxl(dtype=jnp.float16)


def test_full_size():
    config = UMT5Config.xxl()
    encoder = nnx.eval_shape(lambda: UMT5Encoder(config, rngs=nnx.Rngs(0)))
    sizes = [leaf.size for leaf in jax.tree.leaves(nnx.state(encoder))]
    per_layer = 4 * 4096**2 + 3 * 4096 * 10240 + 32 * 64 + 2 * 4096
    assert sum(sizes) == 24 * per_layer + 4096
    x = jax.ShapeDtypeStruct((1, 512, 4096), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct((1, 512), jnp.int32)
    out = jax.eval_shape(umt5.run_encoder, *nnx.split(encoder), x, mask)
    assert (out.shape, out.dtype) == ((1, 512, 4096), jnp.bfloat16)

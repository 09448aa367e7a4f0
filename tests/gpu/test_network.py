"""The network on a GPU: float32 against the fixtures' tolerances, bfloat16 (with cuDNN attention) against float32."""

import jax
import jax.numpy as jnp
import pytest

from tests.closeness import relative_error
from turbojax.kernels.attention import dot_product_attention
from turbojax.models.wan import WanConfig
from turbojax.weights.random import random_module
from turbojax.weights.skeleton import wan_skeleton

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")


@pytest.mark.parametrize("length", [64, 1560, 4097])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_cudnn_attention_equals_reference(length, head_dim):
    keys = jax.random.split(jax.random.key(length + head_dim), 3)
    q, k, v = (jax.random.normal(key, (2, length, 3, head_dim), jnp.bfloat16) for key in keys)
    cudnn = dot_product_attention(q, k, v, implementation="cudnn")
    with jax.default_matmul_precision("highest"):
        f = (x.astype(jnp.float32) for x in (q, k, v))
        reference = dot_product_attention(*f, implementation="reference")
    assert relative_error(cudnn, reference) < 5e-3


@pytest.mark.parametrize("attention_type", ["original", "sla", "sagesla"])
def test_bfloat16_network_is_close_to_float32(attention_type):
    config = WanConfig(dim=512, ffn_dim=1024, num_heads=4, num_layers=4, text_dim=256, attention_type=attention_type)
    x = jax.random.normal(jax.random.key(1), (1, 5, 32, 32, 16))
    text = jax.random.normal(jax.random.key(2), (1, 512, 256))
    timesteps = jnp.full(1, 900.0)
    results = []
    for dtype in (jnp.float32, jnp.bfloat16):
        model = random_module(wan_skeleton(WanConfig(**{**vars(config), "dtype": dtype})))
        with jax.default_matmul_precision("highest"):
            results.append(jax.jit(model.__call__)(x, timesteps, text))
    assert relative_error(results[1], results[0]) < (4e-2 if attention_type == "sagesla" else 2e-2)

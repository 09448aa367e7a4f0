"""The transformer: full sizes as shapes only, patches, attention without [L, L], one scan over the layers, settings."""

import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.closeness import relative_error
from tests.weights.checkpoints import small, turbo
from turbojax.diffusion import RCM
from turbojax.errors import UserError
from turbojax.kernels import attention, sla
from turbojax.models import wan
from turbojax.models.layers import time_sinusoid
from turbojax.models.wan import WanConfig, WanModel, patch_grid, patchify, unpatchify
from turbojax.pipeline import denoise
from turbojax.weights.load import build_wan, check_wan
from turbojax.weights.options import NetworkOptions
from turbojax.weights.skeleton import wan_skeleton

pytestmark = pytest.mark.usefixtures("exact_matmuls")

TOKENS_480P = 21 * 30 * 52  # 81 frames of 832 x 480: 32,760
SIZES = {
    "1.3B": WanConfig.t2v_1_3b(),
    "1.3B sla": WanConfig.t2v_1_3b(attention_type="sla"),
    "14B": WanConfig.t2v_14b(),
    "I2V 14B": WanConfig.i2v_14b(),
    "I2V A14B": WanConfig.i2v_a14b(),
}


def arguments(config: WanConfig, *, batch: int = 1, frames: int = 21, height: int = 60, width: int = 104) -> dict:
    """Shapes of the network's arguments; those of 81 frames of 832 x 480."""
    shape = (batch, frames, height, width)
    return {
        "x": jax.ShapeDtypeStruct((*shape, 16), jnp.float32),
        "timesteps": jax.ShapeDtypeStruct((batch,), jnp.float32),
        "text": jax.ShapeDtypeStruct((batch, 512, config.text_dim), config.dtype),
        "y": jax.ShapeDtypeStruct((*shape, 20), jnp.float32) if config.in_channels == 36 else None,
        "clip": jax.ShapeDtypeStruct((batch, 257, config.clip_dim), config.dtype) if config.clip_dim else None,
    }


def drawn(config: WanConfig, **sizes) -> dict:
    """Random arguments of these shapes."""
    shapes, tree = jax.tree.flatten(arguments(config, **sizes))
    keys = jax.random.split(jax.random.key(1), len(shapes))
    values = [jax.random.normal(key, s.shape, s.dtype) for key, s in zip(keys, shapes, strict=True)]
    return jax.tree.unflatten(tree, values) | {"timesteps": jnp.linspace(900, 100, values[1].shape[0])}


def network(config: WanConfig):
    """The network as a function of its parameters and arguments, and the shapes of its parameters."""
    graph, state = nnx.split(nnx.eval_shape(lambda: WanModel(config, rngs=nnx.Rngs(0))))
    return (lambda state, arguments: nnx.merge(graph, state)(**arguments)), state


def built(config: WanConfig, **options) -> WanModel:
    """A network with generated weights."""
    checkpoint = check_wan(turbo(config), num_heads=None, what="test")
    return build_wan(checkpoint, NetworkOptions(dtype=config.dtype, **options))


def equations(jaxpr) -> Iterator:
    """All equations of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            if hasattr(inner, "eqns"):
                yield from equations(inner)
            elif hasattr(inner, "jaxpr"):
                yield from equations(inner.jaxpr)


def largest_intermediate(function, *shapes) -> int:
    """Elements of the largest array that the function makes on its way."""
    jaxpr = jax.make_jaxpr(function)(*shapes).jaxpr
    return max(math.prod(out.aval.shape) for equation in equations(jaxpr) for out in equation.outvars)


# Full sizes.


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("1.3B", 1_418_996_800),
        ("1.3B sla", 1_418_996_800 + 30 * (128 * 128 + 128)),
        ("14B", 14_288_491_584),
        ("I2V 14B", 14_288_491_584 + 409_600 + 8_211_200 + 40 * 52_444_160),  # patches, CLIP tokens, k_img and v_img,
        ("I2V A14B", 14_288_901_184),
    ],
)
def test_number_of_parameters(name, count):
    assert sum(math.prod(spec.shape) for spec in wan_skeleton(SIZES[name]).specs.values()) == count


@pytest.mark.parametrize("name", SIZES)
def test_shapes_at_full_size(name):
    run, state = network(SIZES[name])
    out = jax.eval_shape(run, state, arguments(SIZES[name], batch=2))
    assert (out.shape, out.dtype) == ((2, 21, 60, 104, 16), jnp.float32)


def test_dtypes_of_parameters():
    for name, spec in wan_skeleton(SIZES["I2V 14B"]).specs.items():
        single = "norm" in name or name.endswith("modulation")
        assert spec.dtype == (jnp.float32 if single else jnp.bfloat16), name


def test_one_scan_over_the_layers():
    counts = []
    for layers in (4, 30):
        config = WanConfig.t2v_1_3b(num_layers=layers)
        run, state = network(config)
        found = list(equations(jax.make_jaxpr(run)(state, arguments(config)).jaxpr))
        counts.append(len(found))
        assert [e.params["length"] for e in found if e.primitive.name == "scan" and e.params["length"] == layers]
    assert counts[0] == counts[1]


def test_constant_work_is_outside_the_steps():
    """Of a whole sampling: text keys and values, rotary table and time embedding are in no step."""
    config = WanConfig.t2v_1_3b()
    graph, state = nnx.split(nnx.eval_shape(lambda: WanModel(config, rngs=nnx.Rngs(0))))
    spec = jax.ShapeDtypeStruct
    latents, text = spec((1, 21, 60, 104, 16), jnp.float32), spec((1, 512, 4096), jnp.bfloat16)
    run = functools.partial(denoise.sample, graph, RCM(4), (0, 4))
    key = jax.eval_shape(lambda: jax.random.key(0))
    arguments = state, latents, text, text, spec((), jnp.float32), key, None, None, {}
    all_steps = list(equations(jax.make_jaxpr(run)(*arguments).jaxpr))
    (steps,) = [e for e in all_steps if e.primitive.name == "scan" and e.params["length"] == 4]

    def products_over(found, width):
        return [e for e in found if e.primitive.name == "dot_general" and e.invars[0].aval.shape[-1] == width]

    step = list(equations(steps.params["jaxpr"].jaxpr))
    assert not {e.primitive.name for e in step} & {"cos", "sin"}
    assert len(products_over(step, config.ffn_dim)) == 1
    # q, k, v, o, the cross-attention's q and o, the ffn's first layer, and the head; of text only outside.
    assert len(products_over(step, config.dim)) == 8
    assert len(products_over(step, config.text_dim)) == len(products_over(step, config.freq_dim)) == 0
    assert len(products_over(all_steps, config.text_dim)) == len(products_over(all_steps, config.freq_dim)) == 1


@pytest.mark.parametrize("more", [{}, {"in_channels": 36, "clip_dim": 64}])
def test_layers_make_the_keys_of_a_large_text(monkeypatch, more):
    """In each step what `prepare` otherwise does once."""
    config = small(num_layers=2, **more)
    model, inputs = built(config), drawn(config, frames=2, height=4, width=4)
    once = nnx.jit(WanModel.__call__)(model, **inputs)
    monkeypatch.setattr(wan, "KEYS_BYTES", 0)
    assert isinstance(model.prepare(inputs["text"], (2, 2, 2), clip=inputs["clip"]).text, jax.Array)
    np.testing.assert_allclose(nnx.jit(lambda m, **i: m(**i))(model, **inputs), once, rtol=1e-5, atol=1e-6)


# Attention without [L, L].


@pytest.mark.parametrize("heads", [12, 40])
def test_no_step_holds_all_scores(heads):
    q = jax.ShapeDtypeStruct((1, TOKENS_480P, heads, 128), jnp.bfloat16)
    text = jax.ShapeDtypeStruct((1, 512, heads, 128), jnp.bfloat16)
    proj = jax.ShapeDtypeStruct((128, 128), jnp.bfloat16), jax.ShapeDtypeStruct((128,), jnp.bfloat16)
    assert largest_intermediate(attention.attention_reference, q, q, q) < 2**28
    assert largest_intermediate(attention.attention_reference, q, text, text) < 2**28
    for topk in (0.1, 1.0):
        sparse = functools.partial(sla.sparse_linear_attention, topk=topk)
        assert largest_intermediate(sparse, q, q, q, *proj) < 2**28
        assert largest_intermediate(derivative(sparse), q, q, q, *proj) < 2**28
    assert largest_intermediate(derivative(attention.attention_reference), q, q, q) < 2**28


def derivative(f):
    """Forward mode, with the arguments themselves as their tangents."""
    return lambda *arguments: jax.jvp(f, arguments, arguments)


def test_the_measure_sees_inside_loops():
    """It finds [L, L] where there is one."""

    def careless(q):
        return jax.lax.map(lambda row: jax.nn.softmax(row @ row.T, axis=-1) @ row, q)

    assert largest_intermediate(careless, jax.ShapeDtypeStruct((2, 1000, 8), jnp.float32)) == 1000 * 1000


@pytest.mark.parametrize("scores", [1, 3 * 7 * 40, 3 * 2 * 40 * 5 + 1, 2**26])
def test_blocks_of_queries_do_not_matter(monkeypatch, scores):
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (2, length, 3, 8)) for key, length in zip(keys, (23, 40, 40), strict=True))
    weights = jax.nn.softmax(jnp.einsum("blnh,bsnh->bnls", q, k) / np.sqrt(8.0).astype(np.float32), axis=-1)
    monkeypatch.setattr(attention, "SCORES_IN_MEMORY", scores)
    out = jax.jit(lambda *a: attention.attention_reference(*a))(q, k, v)  # traced anew, with this block
    np.testing.assert_allclose(out, jnp.einsum("bnls,bsnh->blnh", weights, v), atol=2e-6)


@pytest.mark.parametrize("scores", [1, 2**26])
def test_the_last_key_can_stand_for_many(monkeypatch, scores):
    q, k, v = (jax.random.normal(key, (2, 10, 3, 8)) for key in jax.random.split(jax.random.key(0), 3))
    monkeypatch.setattr(attention, "SCORES_IN_MEMORY", scores)
    many_k, many_v = (np.concatenate((x, np.repeat(x[:, -1:], 499, axis=1)), axis=1, dtype=np.float64) for x in (k, v))
    weights = np.exp(np.einsum("blnh,bsnh->bnls", q, many_k) / np.sqrt(8.0))
    expected = np.einsum("bnls,bsnh->blnh", weights / weights.sum(axis=-1, keepdims=True), many_v)
    few = attention.dot_product_attention(q, k, v, last=500)
    np.testing.assert_allclose(few, expected, atol=2e-6)
    with pytest.raises(UserError, match="takes keys one by one, not last=500"):
        attention.dot_product_attention(q, k, v, last=500, implementation="cudnn")


@pytest.mark.parametrize("length", [50, 64, 300])
def test_sla_with_all_blocks_is_dense_attention(length):
    """Of one block or several, the last one partial: with topk = 1, the projected linear branch comes on top."""
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v = (jax.random.normal(key, (2, length, 3, 16)) for key in keys[:3])
    weight, bias = jax.random.normal(keys[3], (16, 16)), jax.random.normal(keys[4], (16,))
    run = jax.jit(functools.partial(sla.sparse_linear_attention, topk=1.0))
    dense = np.asarray(attention.attention_reference(q, k, v))
    out = run(q, k, v, jnp.zeros_like(weight), jnp.zeros_like(bias))
    np.testing.assert_allclose(out, dense, atol=2e-5)
    phi_q, phi_k = (np.asarray(jax.nn.softmax(x, axis=-1), np.float64) for x in (q, k))
    similarity = np.einsum("blnh,bsnh->bnls", phi_q, phi_k)
    linear = np.einsum("bnls,bsnh->blnh", similarity / (1e-5 + similarity.sum(-1, keepdims=True)), v)
    projected = linear @ np.asarray(weight).T + np.asarray(bias)
    np.testing.assert_allclose(run(q, k, v, weight, bias), dense + projected, atol=5e-5)


def test_sla_of_one_block_of_keys_chooses_it():
    """Whatever the share."""
    q, k, v = (jax.random.normal(key, (1, 64, 2, 16)) for key in jax.random.split(jax.random.key(0), 3))
    few, many = (
        jax.jit(functools.partial(sla.sparse_linear_attention, topk=topk))(q, k, v, jnp.eye(16), jnp.ones(16))
        for topk in (0.01, 1.0)
    )
    np.testing.assert_array_equal(few, many)


# ModelConfigs of the network.


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 2, 3)])
def test_patches_there_and_back(patch):
    x = np.arange(2 * 4 * 6 * 6 * 5).reshape(2, 4, 6, 6, 5)
    grid = patch_grid(x, patch)
    tokens = np.asarray(patchify(jnp.asarray(x), patch))
    assert tokens.shape == (2, math.prod(grid), math.prod(patch) * 5)
    first = x[1, : patch[0], : patch[1], : patch[2]]
    np.testing.assert_array_equal(tokens[1, 0], np.moveaxis(first, -1, 0).ravel())  # channel slowest
    channel_fastest = np.moveaxis(tokens.reshape(*tokens.shape[:2], 5, -1), 2, 3).reshape(tokens.shape)
    np.testing.assert_array_equal(unpatchify(jnp.asarray(channel_fastest), grid, patch), x)


def test_timesteps_keep_their_precision():
    """Plain float32 is up to 6e-5 from float64. A bfloat16 network does not round them either."""
    times = np.concatenate((np.linspace(0, 1000, 1009, dtype=np.float32), np.float32([999.9, 1e-3, 500.0625])))
    half = 10000.0 ** (-np.arange(128) / 128)
    angles = times.astype(np.float64)[:, None] * half
    expected = np.concatenate((np.cos(angles), np.sin(angles)), axis=1)
    assert np.abs(time_sinusoid(jnp.asarray(times), 256) - expected).max() < 1.5e-6
    model = built(small(dtype=jnp.bfloat16))
    near, nearer = model.embed_time(jnp.asarray([875.0, 875.5], jnp.float32)).blocks
    assert near.dtype == jnp.float32
    assert not np.array_equal(near, nearer)


@pytest.fixture(scope="module")
def image_to_video():
    """A network with all kinds of inputs, and two samples of them."""
    config = small(in_channels=36, clip_dim=64, num_layers=1)
    return jax.jit(built(config).__call__), drawn(config, batch=2, frames=2, height=4, width=6)


def test_samples_do_not_mix(image_to_video):
    run, values = image_to_video
    both = run(**values)
    for i in (0, 1):
        alone = run(**jax.tree.map(lambda a, i=i: jnp.stack([a[i], a[i]]), values))
        np.testing.assert_allclose(both[i], alone[0], atol=2e-5)
    assert relative_error(both[0], both[1]) > 0.1


@pytest.mark.parametrize("name", ["timesteps", "text", "y", "clip"])
def test_every_argument_matters(image_to_video, name):
    run, values = image_to_video
    changed = values | {name: 0.5 * jnp.roll(values[name], 1, axis=-1)}
    assert relative_error(run(**changed), run(**values)) > 1e-4


def test_rows_of_text_that_are_left_out_change_nothing():
    module, config = built(small()), small()
    values = drawn(config, frames=2, height=4, width=6)
    graph, state = nnx.split(module)

    def total(state, text):
        return jnp.sum(nnx.merge(graph, state)(**values | {"text": text}) ** 2)

    text = values["text"].at[:, 5:].set(0)
    whole, expected = jax.value_and_grad(total)(state, text)
    for rows in (5, 31, 511):
        some, gradients = jax.value_and_grad(total)(state, text[:, :rows])
        assert relative_error(some, whole) < 1e-5
        worst = jax.tree.map(
            lambda a, b: relative_error(a, b) if jnp.any(b) else float(jnp.any(a)), gradients, expected
        )
        assert max(jax.tree.leaves(worst)) < 1e-3
    assert relative_error(total(state, text[:, :4]), whole) > 1e-4


@pytest.mark.parametrize(
    ("changes", "calls"),
    [({"clip_dim": 64, "in_channels": 36}, 3), ({"attention_type": "sla"}, 2), ({"attention_type": "sagesla"}, 2)],
)
def test_a_named_attention_is_taken_everywhere(monkeypatch, changes, calls):
    named = []

    def recorded(attend):
        return lambda *arrays, **settings: named.append(settings["implementation"]) or attend(*arrays, **settings)

    for name in ("dot_product_attention", "sparse_linear_attention", "sage_sparse_linear_attention"):
        monkeypatch.setattr(wan, name, recorded(getattr(wan, name)))
    config = small(attention_implementation="reference", **changes)
    run, state = network(config)
    jax.eval_shape(run, state, arguments(config, frames=1, height=4, width=4))
    assert len(named) >= calls
    assert set(named) == {"reference"}


# Settings and arguments that cannot be.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_type": "flash"}, "attention_type='flash' is unknown; choose original or sla or sagesla"),
        ({"num_heads": 3}, "dim=256 does not give num_heads=3 heads of an even width"),
        ({"dim": 6, "num_heads": 2}, "dim=6 does not give num_heads=2"),
        ({"sla_topk": 0.0}, r"sla_topk=0.0 must be in \(0, 1\]"),
        ({"sla_topk": 1.5}, r"sla_topk=1.5 must be in \(0, 1\]"),
        ({"sage_values": "int4"}, "sage_values='int4' is unknown; choose exact or float8 or float8_values"),
    ],
)
def test_settings(changes, message):
    with pytest.raises(UserError, match=message):
        small(**changes)


@pytest.mark.parametrize(
    ("changes", "given", "message"),
    [
        ({}, {"x": (1, 1, 4, 4, 36)}, "takes 16 latent channels .*, not 36"),
        ({}, {"y": (1, 1, 4, 4, 20)}, "takes 16 latent channels .*, not 36"),
        ({"in_channels": 36}, {}, "takes 36 latent channels .*, not 16"),
        ({"clip_dim": 64}, {}, "clip tokens were not given"),
        ({}, {"clip": (1, 257, 64)}, "clip tokens were given"),
        ({"clip_dim": 64, "clip_images": 2}, {"clip": (1, 257, 64)}, "257 clip tokens were given .* takes 514"),
        ({}, {"x": (1, 1, 5, 4, 16)}, r"\(1, 5, 4\) do not divide into patches"),
    ],
)
def test_arguments(changes, given, message):
    run, state = network(small(**changes))
    values = arguments(small(), frames=1, height=4, width=4)
    values |= {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in given.items()}
    with pytest.raises(UserError, match=message):
        jax.eval_shape(run, state, values)

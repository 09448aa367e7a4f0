"""The steps of the three recipes: they learn, and neither micro-batches nor remat change what they learn.

A tiny network (two layers of width 32, latents 2 x 8 x 8 x 4) learns which of four patterns belongs to which prompt,
and with which strength it comes; then a student with sparse attention and one of few steps learn from it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.closeness import relative_error
from turbojax.diffusion import RCM as Sampler
from turbojax.diffusion import Euler, guide
from turbojax.errors import UserError
from turbojax.train.recipes import RCM, SLA, FlowMatching, NetworkParams, Networks, network, sample_keys
from turbojax.train.schedule import Phases, StepSchedule, learning_rate
from turbojax.train.state import Trained, initial_state, parameters
from turbojax.train.step import Frozen, adamw, make_step, mean_gradients, muon, updated
from turbojax.train.times import LogNormal, UniformShift
from turbojax.train.toy import smooth_in_time, toy_config
from turbojax.weights.random import random_module
from turbojax.weights.skeleton import wan_skeleton

DENSE = toy_config(dim=32, ffn_dim=64, in_channels=4, out_channels=4, text_dim=32, dtype=jnp.float32)
SPARSE = dataclasses.replace(DENSE, attention_type="sla", sla_topk=0.25, sla_blocks=(8, 8))
SHAPE = (2, 8, 8, 4)
BATCH, STEPS, GUIDANCE = 16, 200, 4.0
RNG = np.random.default_rng(0)
TEXTS = RNG.standard_normal((5, 4, 32), np.float32)  # the last one is the negative prompt
PATTERNS = RNG.standard_normal((4, 1, 2, 2, 4), np.float32).repeat(2, 1).repeat(4, 2).repeat(4, 3)


def batch(number: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(number)
    which = rng.integers(len(PATTERNS), size=BATCH)
    strength = rng.uniform(0.5, 1.5, (BATCH, 1, 1, 1, 1)).astype(np.float32)
    return {"latents": jnp.asarray(strength * PATTERNS[which]), "text": jnp.asarray(TEXTS[which])}


def optimizer(rate: float, b1: float = 0.9):
    return adamw(learning_rate(rate, warm_up=20), betas=(b1, 0.99), weight_decay=0.01)


def random_params(config) -> dict[str, np.ndarray]:
    params = parameters(random_module(wan_skeleton(config)))
    return smooth_in_time({name: np.asarray(value) for name, value in params.items()})


def first_state(optimizers, params):
    return initial_state(params, **{name: own.transform for name, own in optimizers.items()})


def trained(step, optimizers, params, teacher):
    """The state after STEPS steps."""
    state, frozen = first_state(optimizers, params), Frozen(teacher, jnp.asarray(TEXTS[-1]))
    for i in range(STEPS):
        state, metrics = step(i, state, frozen, batch(i))
    assert int(state.step) == STEPS
    assert all(np.isfinite(value) for value in metrics.values())
    return state


def loss_of(recipe, params, teacher) -> float:
    """The loss on samples and noise that no training saw."""
    data = batch(10**6) | {"key": sample_keys(1, jnp.int32(0), BATCH)}
    run = jax.jit(lambda params: recipe.loss(params, data, StepSchedule()))
    return float(run(NetworkParams(params, {}, teacher, jnp.asarray(TEXTS[-1])))[0])


@pytest.fixture(scope="module")
def teacher():
    """Flow matching lowers its loss to less than a quarter."""
    recipe, start = FlowMatching(Networks.of(DENSE, DENSE), LogNormal(1.0)), random_params(DENSE)
    optimizers = {"student": optimizer(6e-3)}
    params = trained(make_step(recipe, optimizers), optimizers, start, {}).ema
    assert loss_of(recipe, params, {}) < loss_of(recipe, start, {}) / 4
    return params


def test_sla(teacher):
    """Fine-tuning lowers the distance to the dense network to less than half, with a projection that starts at zero."""
    networks = Networks.of(SPARSE, DENSE)
    recipe = SLA(networks, LogNormal(1.5))
    start = {name: jnp.zeros(spec.shape, spec.dtype) for name, spec in networks.student.specs.items()} | teacher
    optimizers = {"student": optimizer(3e-3)}
    params = trained(make_step(recipe, optimizers), optimizers, start, teacher).ema
    assert loss_of(recipe, params, teacher) < loss_of(recipe, start, teacher) / 2


@functools.cache
def rcm_step():
    """Networks, optimizers and the step of a distillation in which student and critic take turns."""
    phases = Phases(tangent_warmup=0, student_freq=2, loss_scale_dmd=3.0)
    networks = Networks.of(DENSE, DENSE)
    optimizers = {"student": optimizer(5e-4, b1=0.0), "critic": optimizer(2e-3, b1=0.0)}
    recipe = RCM(networks, LogNormal(0.7), guidance=GUIDANCE, phases=phases)
    return networks, optimizers, make_step(recipe, optimizers)


def test_rcm(teacher):
    """Distillation halves the distance of four-step samples to the guided teacher's from the same noise."""
    networks, optimizers, step = rcm_step()
    text, negative = jnp.asarray(TEXTS[:4].repeat(4, 0)), jnp.asarray(TEXTS[4:].repeat(16, 0))
    noise = jax.random.normal(jax.random.key(0), (16, *SHAPE), jnp.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def samples(sampler, params, guidance):
        net = network(networks.student, params)

        def velocity(x, timestep):
            t = jnp.full(len(x), timestep)
            return guide(net(x, t, text), net(x, t, negative), guidance)

        return sampler.sample(velocity, sampler.initial(noise))

    target = samples(Euler(40), teacher, GUIDANCE)

    def distance(params) -> float:
        return float(jnp.mean((samples(Sampler(4, ode=True), params, 1.0) - target) ** 2))

    params = trained(step, optimizers, teacher, teacher).ema
    assert distance(params) < distance(teacher) / 2


def test_discrete_time_consistency(teacher):
    """It takes no derivative of the network; where the student is the teacher, more Euler steps leave more to learn."""
    networks, data = Networks.of(DENSE, DENSE), batch(0) | {"key": sample_keys(1, jnp.int32(0), BATCH)}
    params = NetworkParams(teacher, {}, teacher, jnp.asarray(TEXTS[-1]))

    def consistency(steps: int) -> float:
        recipe = RCM(networks, LogNormal(0.7), discrete_steps=steps, guidance=1.0, phases=Phases(fake=False))
        run = jax.jit(lambda params: recipe.loss(params, data, StepSchedule())[1]["consistency"])
        return float(run(params))

    assert 0 < consistency(1) < consistency(12) / 2


def test_student_and_critic_take_turns(teacher):
    """Each changes in its own steps alone, with its own optimizer; the average follows the student."""
    _, optimizers, step = rcm_step()
    state, frozen = first_state(optimizers, teacher), Frozen(teacher, jnp.asarray(TEXTS[-1]))
    for i, (learner, metric) in enumerate((("student", "consistency"), ("critic", "fake_score"), ("student", "loss"))):
        before = jax.tree.map(np.array, state)  # the step gives the state's buffers back
        state, metrics = step(i, state, frozen, batch(i))
        same = jax.tree.map(np.array_equal, before, state)
        kept = {name for name in ("student", "critic", "ema") if jax.tree.all(getattr(same, name))}
        assert kept == ({"critic"} if learner == "student" else {"student", "ema"})
        assert {metric, f"{learner}_gradient_norm", f"{learner}_learning_rate"} <= metrics.keys()
        assert int(state.step) == i + 1


@pytest.mark.parametrize("learns", [0, 1])
@pytest.mark.parametrize("name", ["original", "sla"])
def test_state_keeps_its_dtypes(name, learns):
    """Networks in bfloat16, with remat and micro-batches; weights, moments and average stay float32."""
    student, teacher = (
        dataclasses.replace(config, dtype=jnp.bfloat16, remat=True)
        for config in (SPARSE if name == "sla" else DENSE, DENSE)
    )
    networks, optimizers = Networks.of(student, teacher), {key: optimizer(1e-3) for key in ("student", "critic")}
    phases = Phases(tangent_warmup=0, student_freq=2)
    recipe = RCM(networks, LogNormal(0.7), simulation_times=UniformShift(5.0), phases=phases)
    step = make_step(recipe, optimizers, accumulation=4)
    params = {key: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for key, spec in networks.student.specs.items()}
    state = jax.eval_shape(functools.partial(first_state, optimizers), params)
    frozen = Frozen(networks.teacher.specs, jax.ShapeDtypeStruct(TEXTS[0].shape, jnp.float32))
    after, metrics = jax.eval_shape(functools.partial(step, learns), state, frozen, batch(0))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(lambda a: (a.shape, a.dtype), state)
    assert {(value.shape, value.dtype) for value in metrics.values()} == {((), jnp.dtype(jnp.float32))}


def test_gradients_do_not_depend_on_how_they_are_computed():
    """Micro-batches and remat give the gradient of the whole batch, bfloat16 nearly so."""
    params = random_params(DENSE)
    data = batch(0) | {"key": sample_keys(0, jnp.int32(0), BATCH)}

    def gradient(accumulation: int = 1, **changes) -> np.ndarray:
        config = dataclasses.replace(DENSE, **changes)
        recipe = FlowMatching(Networks.of(config, config), LogNormal(0.0))

        def loss(params, batch):
            return recipe.loss(NetworkParams(params, {}, {}, jnp.asarray(TEXTS[-1])), batch, StepSchedule())

        grads, _ = jax.jit(functools.partial(mean_gradients, loss, accumulation=accumulation))(params, data)
        assert {grad.dtype for grad in grads.values()} == {jnp.dtype(jnp.float32)}
        return np.concatenate([np.ravel(grad) for grad in grads.values()])

    whole = gradient()
    assert relative_error(gradient(accumulation=4, remat=True), whole) < 1e-5
    assert 1e-4 < relative_error(gradient(dtype=jnp.bfloat16), whole) < 0.1


def test_a_batch_that_does_not_divide():
    data = {name: value[:6] for name, value in batch(0).items()}
    with pytest.raises(UserError, match="a batch of 6 does not divide into accumulation=4 micro-batches"):
        mean_gradients(lambda params, batch: (0.0, {}), {}, data, accumulation=4)


def test_gradients_that_are_not_finite_count_as_zero():
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    own = adamw(learning_rate(1.0, warm_up=0), betas=(0.0, 0.9), weight_decay=0.0, clip_norm=10.0)
    grads = {"a": jnp.asarray([1.0, jnp.nan, -1.0]), "b": jnp.asarray([jnp.inf, 0.5])}
    after, metrics = updated(Trained(params, own.transform.init(params)), grads, own)
    np.testing.assert_allclose(after.params["a"], [0.0, 1.0, 2.0], atol=1e-4)
    np.testing.assert_allclose(after.params["b"], [1.0, 0.0], atol=1e-4)
    assert not np.isfinite(metrics["gradient_norm"])
    assert float(metrics["learning_rate"]) == 1.0


def test_muon():
    """Matrices move by orthogonal ones, each layer's by its own; what is no matrix moves as AdamW moves it."""
    shapes = {
        "blocks.ffn.fc1.weight": (2, 24, 16),
        "decoder.middle.0.conv1.kernel": (3, 3, 3, 4, 8),
        "blocks.ffn.fc1.bias": (2, 24),
        "blocks.norm3.weight": (2, 16),
        "blocks.modulation": (2, 6, 16),
        "decoder.conv_in.kernel": (3, 3, 3, 4, 8),
        "head.proj.weight": (8, 16),
    }
    rng = np.random.default_rng(0)
    params, grads = (
        {name: jnp.asarray(rng.standard_normal(s), jnp.float32) for name, s in shapes.items()} for _ in "pg"
    )
    settings = {"betas": (0.9, 0.99), "weight_decay": 0.0}
    moved = {}
    for make in (muon, adamw):
        own = make(learning_rate(0.5, warm_up=0), **settings)
        after, metrics = updated(Trained(params, own.transform.init(params)), grads, own)
        moved[make] = {name: np.asarray(after.params[name] - params[name]) for name in shapes}
        assert float(metrics["learning_rate"]) == 0.5
    inside = ("blocks.ffn.fc1.weight", "decoder.middle.0.conv1.kernel")
    for name in inside:
        change = moved[muon][name]
        matrices = change if "weight" in name else change.reshape(1, -1, change.shape[-1])
        for matrix in matrices:
            values = np.linalg.svd(matrix, compute_uv=False) / (0.5 * 0.2 * max(matrix.shape) ** 0.5)
            assert 0.6 < values.min() < values.max() < 1.3, name  # five steps of the iteration come as close as this
    for name in set(shapes) - set(inside):
        direction = optax.tree_utils.tree_vdot(moved[muon][name], moved[adamw][name])
        assert direction > 0, name
        np.testing.assert_allclose(np.abs(moved[muon][name]), np.abs(moved[adamw][name]), rtol=0.5, err_msg=name)

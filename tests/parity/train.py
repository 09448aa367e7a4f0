"""Recomputes the fixtures of the training losses: train_sla, train_scm, train_dmd."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.golden_io import Incomplete, only
from tests.parity.wan import build, channels_first, channels_last, parts
from turbojax.diffusion import schedules
from turbojax.train import losses, times, trigflow
from turbojax.train.schedule import Phases
from turbojax.weights.rules import rename
from turbojax.weights.skeleton import dotted
from turbojax.weights.wan import OFFICIAL

Values = dict[str, Any]
Recomputed = dict[str, tuple[np.ndarray, float]]
TANGENTS: tuple[losses.Tangent, ...] = ("exact", "difference_in_time", "difference")  # by the reference's fd_type
LATENTS = 5  # axes of a latent video, and more with steps in front


@functools.partial(jax.jit, static_argnums=0)
def apply(graph: Any, state: Any, x: jax.Array, timesteps: jax.Array, text: jax.Array) -> jax.Array:
    """All that is compiled, to save time: the losses run around it, so that cases and networks share it."""
    return nnx.merge(graph, state)(x, timesteps, text)


def network(config: dict, t: dict[str, np.ndarray], who: str) -> tuple[Any, Callable[[Any], trigflow.Velocity]]:
    """A network's parameters, and its velocity as a function of parameters."""
    graph, state = nnx.split(build(config, t, prefix=f"w.{who}."))
    return state, lambda state: functools.partial(apply, graph, state)


def with_tolerances(config: dict, values: Values) -> Recomputed:
    """What is comparable, latents channels first as recorded, with the absolute tolerances that the fixture gives."""
    comparable = {name: values[name] for name in config["tolerance"] if name in values}
    return {
        name: (channels_first(x) if np.ndim(x) >= LATENTS else np.asarray(x), config["tolerance"][name])
        for name, x in comparable.items()
    }


def gradients(gradient: Any, t: dict[str, np.ndarray], prefix: str) -> Values:
    """The recorded gradients by their names in checkpoints, and the norm of all of them."""
    flat = {dotted(path): np.asarray(value[...]) for path, value in nnx.to_flat_state(gradient)}
    out = {"grad_norm": np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in flat.values()))[None]}
    for name in [key.removeprefix(prefix) for key in t if key.startswith(f"{prefix}grad.")]:
        hit = rename(name.removeprefix("grad."), OFFICIAL)
        assert hit is not None
        target, layer = hit[0]
        out[name] = flat[target] if layer is None else flat[target][layer]
    return out


def distribution(settings: dict) -> times.Times:
    kind = settings.get("kind", "LogNormal")
    if kind == "UniformShift":
        return times.UniformShift(settings["shift"])
    if kind != "LogNormal":
        raise Incomplete(f"its distribution of times, {kind!r}, is neither LogNormal nor UniformShift")
    return times.LogNormal(settings["p_mean"], settings["p_std"])


def guidance_of(case: dict, config: dict) -> float:
    """A case's own guidance, or that of the fixture."""
    own = [case[name] for name in ("guidance", "teacher_guidance") if name in case]
    return own[0] if own else config["teacher_guidance"]


def negative_text(t: dict[str, np.ndarray], guidance: float) -> jax.Array | None:
    """The negative prompt, which a teacher without guidance does not see."""
    return jnp.asarray(t["in.text_uncond"]) if guidance > 1 else None


def recompute_sla(config: dict, t: dict[str, np.ndarray]) -> Recomputed:
    check_constants(config)
    state, student = network(config, t, "student")
    teacher_state, teacher = network(config, t, "teacher")
    x0, eps, text = channels_last(t["in.x0"]), channels_last(t["in.eps"]), jnp.asarray(t["in.text"])
    s = distribution(config["p_t"]).rf(jnp.asarray(t["in.normal"][:, 0]))

    def loss(state):
        return losses.white_box(student(state), teacher(teacher_state), x0, eps, s, text)

    (value, aux), gradient = jax.value_and_grad(loss, has_aux=True)(state)
    values = aux | gradients(gradient, t, "out.") | {"loss": value[None], "loss_per_sample": aux["loss"]}
    values |= {"time": s[:, None], "timesteps": 1000 * s[:, None]}

    @jax.jit
    def block_maps(x):
        model = build(config, t, prefix="w.student.")
        inner = parts(model, {"x": x, "timesteps": 1000 * s, "text": text})
        return {name: value for name, value in inner.items() if name.endswith("sparse_map")}

    return with_tolerances(config, {f"out.{key}": x for key, x in values.items()} | block_maps(aux["xt"]))


def check_constants(config: dict) -> None:
    only(config, "t_scaling_factor", 1000.0)


def recompute_scm(config: dict, t: dict[str, np.ndarray]) -> Recomputed:
    check_constants(config)
    state, student = network(config, t, "student")
    teacher_state, teacher = network(config, t, "teacher")
    x0, eps = channels_last(t["in.x0"]), channels_last(t["in.eps"])
    text = jnp.asarray(t["in.text"])
    time = distribution(config["p_G"]).trig(jnp.asarray(t["in.normal_G"][:, 0]))

    def case_values(case: dict) -> tuple[Values, Any]:
        guidance = guidance_of(case, config)
        guided = trigflow.guided(teacher(teacher_state), negative_text(t, guidance), guidance)
        settings = {
            "warmup": Phases(tangent_warmup=case["tangent_warmup"]).warmup_ratio(case["iteration"]),
            "tangent": tangent_of(case["fd_type"]),
            "step": case["fd_size"] if case["fd_type"] else 0.0,
            "scale": config["loss_scale"],
        }

        def loss(state):
            frozen = student(jax.lax.stop_gradient(state))
            return losses.consistency(student(state), frozen, guided, x0, eps, time, text, **settings)

        (_, aux), gradient = jax.value_and_grad(loss, has_aux=True)(state)
        cos, sin = (f(trigflow.like(time, x0)) for f in (jnp.cos, jnp.sin))
        aux |= {"F_theta": aux["F"], "t_F_theta": aux["t_F"], "t_xt": cos * sin * aux["F_teacher"]}
        # What the reference logs under this name.
        aux["df_dt"] = -cos * (aux["F"] - aux["F_teacher"]) - sin * aux["xt"] - aux["t_F"]
        return aux, gradient

    out: Values = {}
    common = None  # what cases of exact tangents and the fixture's guidance share
    for name, case in config["cases"].items():
        values, gradient = case_values(case)
        out |= {f"out.{name}.{key}": x for key, x in (values | gradients(gradient, t, f"out.{name}.")).items()}
        if case["fd_type"] == 0 and guidance_of(case, config) == config["teacher_guidance"]:
            common = values
    if common is None:
        common, _ = case_values({"fd_type": 0, "iteration": 0, "tangent_warmup": 0})
    xt, ratio = common["xt"], jnp.cos(time) * jnp.sin(time)
    common |= {"time": time[:, None], "t_time": ratio[:, None], "time_rf": schedules.rf_from_trig(time)[:, None]}
    common["x0_theta"] = trigflow.denoise(student(state), xt, time, text)
    common["F_teacher_cond"] = trigflow.velocity(teacher(teacher_state), xt, time, text)
    if "in.text_uncond" in t:
        negative = jnp.asarray(t["in.text_uncond"])
        common["F_teacher_uncond"] = trigflow.velocity(teacher(teacher_state), xt, time, negative)
    inputs, tangents = jax.jvp(network_inputs, (xt, time), (common["t_xt"], ratio))
    common["t_net_in"], common["t_net_time"] = tangents[0], tangents[1][:, None]
    common["net_out"], common["t_net_out"] = jax.jvp(lambda *a: student(state)(*a, text), inputs, tangents)
    out |= {f"out.{key}": x for key, x in common.items()}
    return with_tolerances(config, out | wrapper_values(t["in.wrapper.t"]))


def tangent_of(fd_type: int) -> losses.Tangent:
    if fd_type not in range(len(TANGENTS)):
        raise Incomplete(f"fd_type={fd_type} is none of 0, 1, 2")
    return TANGENTS[fd_type]


def network_inputs(x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What the wrapper hands to the network."""
    c = trigflow.coefficients(t)
    return trigflow.like(c.c_in, x) * x, c.c_noise


def wrapper_values(t: np.ndarray) -> Values:
    t = jnp.asarray(t, jnp.float32)
    values, derivatives = jax.jvp(trigflow.coefficients, (t,), (jnp.ones_like(t),))
    out = {f"out.wrapper.{name}": x for name, x in values._asdict().items()}
    out |= {f"out.wrapper.d{name}": x for name, x in derivatives._asdict().items()}
    return out | {"out.wrapper.rf_time": schedules.rf_from_trig(t)}


def fixed_times(config: dict, batch: int) -> jax.Array:
    """The times of a simulation as in sampling; those in the middle may be the fixture's own."""
    fixed = times.fixed_simulation_times(batch)
    own = jnp.asarray(config.get("backward_timesteps", fixed[1:, 0]), jnp.float32)[:, None]
    return jnp.concatenate((fixed[:1], jnp.broadcast_to(own, (len(own), batch))))


def recompute_dmd(config: dict, t: dict[str, np.ndarray]) -> Recomputed:
    state, student = network(config, t, "student")
    teacher_state, teacher = network(config, t, "teacher")
    fake_state, fake = network(config, t, "fake")
    text = jnp.asarray(t["in.text"])
    longest = max((case.get("n", 1) for case in config["cases"].values()), default=1)

    def simulate(state, noise, steps, n):
        frozen = student(jax.lax.stop_gradient(state))
        return losses.simulate(student(state), frozen, noise, steps, text, num_steps=n)

    sample = jax.jit(simulate)

    def trajectory(noise, steps):
        """The noise, the state after each step noised again, at last the sample."""
        n = len(noise)
        padded, padded_steps = (jnp.resize(x, (longest, *x.shape[1:])) for x in (noise, steps))  # one compilation
        states = [sample(state, padded, padded_steps, k) for k in range(1, n + 1)]
        noised = [trigflow.diffuse(states[k - 1], noise[k], steps[k]) for k in range(1, n)]
        return jnp.stack([noise[0], *noised, states[-1]])

    def case_values(case: dict, draws: Values, x0=None, eps=None, noise=None) -> tuple[Values, Any]:
        def guided() -> trigflow.Velocity:
            guidance = guidance_of(case, config)
            return trigflow.guided(teacher(teacher_state), negative_text(t, guidance), guidance)

        if case["step"] == "dcm":
            grid = {"total": config["dcm_total_steps"], "shift": config["dcm_timestep_shift"]}
            steps = times.discrete_times(draws["u"], case["skip"], **grid)

            def discrete(state):
                frozen = student(jax.lax.stop_gradient(state))
                scale = config["loss_scale"]
                return losses.discrete_consistency(student(state), frozen, guided(), x0, eps, steps, text, scale=scale)

            (_, aux), gradient = jax.value_and_grad(discrete, has_aux=True)(state)
            renamed = {"x0_pred": aux["x0_student"], "F_teacher_last": aux["F_teacher"]}
            return aux | renamed | {"trig_t": steps[..., None]}, gradient

        p_D, n = distribution(case["p_D"]), case["n"]
        steps = fixed_times(config, noise.shape[1])[:n]
        if not case["fix"] and n > 1:
            steps = times.drawn_simulation_times(p_D.trig(draws["draw_t"]))
        if len(steps) != n or len(noise) != n:
            raise Incomplete(f"{len(steps)} times and {len(noise)} draws of noise are not its n={n} steps")
        values = {"x_traj": trajectory(noise, steps), "t_traj": jnp.pad(steps, ((0, 1), (0, 0)))[..., None]}
        if case["step"] == "bwd":
            return values, None
        time = p_D.trig(draws["draw_D"])

        def matching(state):
            return losses.distribution_matching(
                simulate(state, noise, steps, n), fake(fake_state), guided(), eps, time, text
            )

        def critic(fake_state):
            return losses.fake_score(values["x_traj"][-1], fake(fake_state), eps, time, text)

        if case["step"] not in ("dmd", "critic"):
            raise Incomplete(f"its step {case['step']!r} is none of bwd, dcm, dmd and critic")
        loss, learner = (matching, state) if case["step"] == "dmd" else (critic, fake_state)
        (_, aux), gradient = jax.value_and_grad(loss, has_aux=True)(learner)
        if case["step"] == "dmd":
            aux |= {"weight_factor": aux["weight"], "grad_signal": aux["grad"]}
        return values | aux | {"D_time": time[:, None], "D_xt": aux["xt"]}, gradient

    out: Values = {}
    for name, case in config["cases"].items():
        inputs = {key.removeprefix(f"in.{name}."): x for key, x in t.items() if key.startswith(f"in.{name}.")}
        latents = {key: channels_last(x) for key, x in inputs.items() if x.ndim >= LATENTS}
        draws = {key: jnp.asarray(x[..., 0]) for key, x in inputs.items() if x.ndim < LATENTS}
        values, gradient = case_values(case, draws, **latents)
        if gradient is not None:
            values |= gradients(gradient, t, f"out.{name}.")
        out |= {f"out.{name}.{key}": x for key, x in values.items()}
    return with_tolerances(config, out)

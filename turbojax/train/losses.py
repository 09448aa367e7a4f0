"""Losses of SLA fine-tuning and of rCM distillation, as pure functions over networks.

B batch; latents are `[B, T, H, W, C]`, times float32 `[B]`. A network is a `trigflow.Velocity`: rectified-flow (RF)
velocity of (x, timesteps, text). Whatever is random comes in as an argument.

    student   takes the gradient, as does the fake score in `fake_score`.
    frozen    the student with `lax.stop_gradient` on its parameters, which spares the gradient's work. For exact
              tangents its attention must have a JVP: `WanConfig(attention_implementation="reference")`.
    teacher   a constant, under guidance by `trigflow.guided`.

What comes from any but the first takes no gradient, whatever the networks themselves do.
Every loss returns `(value, aux)`, for `jax.value_and_grad(..., has_aux=True)`. value: float32 [], reduced as the
reference does: a mean for fine-tuning, a sum over elements and samples for distillation. aux["loss"]: the same for
each sample, `[B]`; the rest of aux is what it was made of. Under jit, what is not used costs nothing.

Source: rCM, arXiv 2510.08431; rcm/models/t2v_model_distill_rcm.py and t2v_model_sla.py of TurboDiffusion.
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.lax import stop_gradient

from turbojax.errors import UserError
from turbojax.train.trigflow import Velocity, denoise, diffuse, like, velocity

Loss = tuple[jax.Array, dict[str, jax.Array]]
Tangent = Literal["exact", "difference_in_time", "difference"]


def flow_matching(student: Velocity, x0: jax.Array, eps: jax.Array, s: jax.Array, text: Any) -> Loss:
    """Mean of (v_S - (eps - x0))^2 at x_s = (1 - s) x0 + s eps; s: RF times `[B]` (arXiv 2210.02747).

    aux: loss, xt, v_student.
    """
    xt = interpolate(x0, eps, s)
    v = student(xt, 1000 * s, text).astype(jnp.float32)
    loss = mean_square(v - (eps - x0))
    return loss.mean(), {"loss": loss, "xt": xt, "v_student": v}


def white_box(student: Velocity, teacher: Velocity, x0: jax.Array, eps: jax.Array, s: jax.Array, text: Any) -> Loss:
    """SLA fine-tuning: mean of (v_S - v_T)^2 at x_s = (1 - s) x0 + s eps; s: RF times `[B]`.

    The teacher has dense attention and the student SLA, in blocks of 64 queries by 64 keys as published.
    No guidance (TurboDiffusion, arXiv 2512.16093).

    aux: loss, xt, v_student, v_teacher.
    """
    xt = interpolate(x0, eps, s)
    v_teacher = stop_gradient(teacher(xt, 1000 * s, text).astype(jnp.float32))
    v = student(xt, 1000 * s, text).astype(jnp.float32)
    loss = mean_square(v - v_teacher)
    return loss.mean(), {"loss": loss, "xt": xt, "v_student": v, "v_teacher": v_teacher}


def consistency(
    student: Velocity,
    frozen: Velocity,
    teacher: Velocity,
    x0: jax.Array,
    eps: jax.Array,
    t: jax.Array,
    text: Any,
    *,
    warmup: float | jax.Array = 1.0,
    tangent: Tangent = "exact",
    step: float = 1e-4,
    scale: float = 100.0,
) -> Loss:
    """Continuous-time consistency (sCM) at x_t = cos(t) x0 + sin(t) eps; t: TrigFlow times `[B]` (rCM, eq. 4 and 5).

        t_F   = cos t sin t dF/dt along the teacher's trajectory, see `velocity_tangent`
        g_raw = -cos t sqrt(1 - r^2 sin^2 t) (F - F_T) - (r cos t sin t x_t + t_F),   r = warmup
        g     = g_raw / (|g_raw| + 0.1),   2-norm of a sample
        loss  = scale sum (F - sg(F) - g)^2

    so that the gradient in F is -2 scale g, while the loss itself is nearly constant. Of a sample whose g_raw is not
    finite, loss and gradient in F are zero.

    warmup: r in [0, 1], see `schedule.Phases.warmup_ratio`.
    tangent, step: how t_F comes about.
    aux: loss, finite (bool `[B]`), xt, F, F_teacher, t_F, g_raw, g_norm `[B]`, g.
    """
    xt = diffuse(x0, eps, t)
    F_teacher = stop_gradient(velocity(teacher, xt, t, text))
    t_F = stop_gradient(velocity_tangent(frozen, xt, t, text, F_teacher, tangent=tangent, step=step))
    F = velocity(student, xt, t, text)
    cos, sin = jnp.cos(like(t, xt)), jnp.sin(like(t, xt))
    root = jnp.sqrt(cos**2 + (1 - warmup**2) * sin**2)  # 1 - r^2 sin^2 t without cancellation near pi / 2
    g_raw = -cos * root * (stop_gradient(F) - F_teacher) - (warmup * cos * sin * xt + t_F)
    g_norm = jnp.sqrt(sum_square(g_raw))
    g = g_raw / like(g_norm + 0.1, xt)
    finite = jnp.isfinite(g_norm)
    loss = scale * sum_square(jnp.where(like(finite, xt), F - stop_gradient(F) - g, 0))
    aux = {"xt": xt, "F": F, "F_teacher": F_teacher, "t_F": t_F, "g_raw": g_raw, "g_norm": g_norm, "g": g}
    return loss.sum(), aux | {"loss": loss, "finite": finite}


def velocity_tangent(
    network: Velocity, x: jax.Array, t: jax.Array, text: Any, F_teacher: jax.Array, *, tangent: Tangent, step: float
) -> jax.Array:
    """cos t sin t dF/dt along dx/dt = F_teacher, like x (rCM, section 4.2).

    tangent: "exact" takes the JVP of the whole network along cos t sin t (F_teacher, 1); its attention must have a
    JVP. "difference_in_time" (the paper's semi-continuous time) takes the JVP in x alone and a backward difference of
    `step` in t; "difference" takes one difference for both, and so any attention:

        cos t sin t (cos h F(x, t) - F(cos h x - sin h F_teacher, t - h)) / sin h

    On the golden fixture's float32 network both are off by 50 % at step 1e-2, 7 % at 1e-3 and 0.7 % at 1e-4, from where
    rounding takes over. bfloat16 activations or timesteps lose the difference altogether.
    """
    ratio = jnp.cos(t) * jnp.sin(t)
    dx = like(ratio, x) * F_teacher

    def backward(F: jax.Array, x_before: jax.Array) -> jax.Array:
        F_before = velocity(network, x_before, t - step, text)
        # (cos h F - F_before) / sin h without the rounding of cos h
        return like(ratio, x) * ((F - F_before) / math.sin(step) - math.tan(step / 2) * F)

    if tangent == "exact":
        return jax.jvp(lambda x, t: velocity(network, x, t, text), (x, t), (dx, ratio))[1]
    if tangent == "difference_in_time":
        F, along_x = jax.jvp(lambda x: velocity(network, x, t, text), (x,), (dx,))
        return along_x + backward(F, x)
    if tangent == "difference":
        return backward(velocity(network, x, t, text), math.cos(step) * x - math.sin(step) * F_teacher)
    raise UserError(f"{tangent=} is unknown; choose exact, difference_in_time or difference")


def discrete_consistency(
    student: Velocity,
    frozen: Velocity,
    teacher: Velocity,
    x0: jax.Array,
    eps: jax.Array,
    times: jax.Array,
    text: Any,
    *,
    scale: float = 100.0,
) -> Loss:
    """Discrete-time consistency: x0 at t_0 against x0 at t_K, K Euler steps of the teacher later (rCM, eq. 1).

        x_{k+1} = x_k - (t_k - t_{k+1}) F_T(x_k, t_k)
        loss    = scale sum (x0_student(x_0, t_0) - sg(x0_student(x_K, t_K)))^2

    times: TrigFlow times `[K + 1, B]`, falling, see `times.discrete_times`. The steps are Euler's, not rotations.
    aux: loss, xt (x_0), xk (x_K), F_teacher (of the last step), x0_student, x0_target.
    """
    xt = diffuse(x0, eps, times[0])

    def euler(carry, row):
        x, _ = carry
        now, then = row
        F = velocity(teacher, x, now, text)
        return (x - like(now - then, x) * F, F), None

    (xk, F_teacher), _ = stop_gradient(lax.scan(euler, (xt, jnp.zeros_like(xt)), (times[:-1], times[1:])))
    target = stop_gradient(denoise(frozen, xk, times[-1], text))
    prediction = denoise(student, xt, times[0], text)
    loss = scale * sum_square(prediction - target)
    aux = {"xt": xt, "xk": xk, "F_teacher": F_teacher, "x0_student": prediction, "x0_target": target}
    return loss.sum(), aux | {"loss": loss}


def simulate(
    student: Velocity, frozen: Velocity, noise: jax.Array, times: jax.Array, text: Any, *, num_steps: int | jax.Array
) -> jax.Array:
    """Backward simulation: the student's own sample G from noise, float32 `[B, ...]` (rCM, section 4.1).

        x = noise_0;   for i = 1..n:   x = x0(x, t_i);   if i < n:   x = cos(t_{i+1}) x + sin(t_{i+1}) noise_i

    Only the last call is the student's and takes a gradient; the ones before are `frozen`'s. num_steps may be traced:
    one compilation then serves all, and noise and times may have more rows than it uses.

    noise: standard normal `[num_steps or more, B, ...]`.
    times: TrigFlow times `[num_steps or more, B]`, from pi/2 on, see `times.fixed_simulation_times`.
    """

    def step(i, x):
        return diffuse(denoise(frozen, x, times[i], text), noise[i + 1], times[i + 1])

    x = stop_gradient(lax.fori_loop(0, num_steps - 1, step, noise[0]))
    return denoise(student, x, times[num_steps - 1], text)


def distribution_matching(
    sample: jax.Array, fake: Velocity, teacher: Velocity, eps: jax.Array, t: jax.Array, text: Any
) -> Loss:
    """DMD loss of the student's sample G, which takes the gradient (rCM, eq. 6; DMD, arXiv 2311.18828).

        x_t  = cos(t) G + sin(t) eps
        grad = (x0_fake(x_t, t) - x0_T(x_t, t)) / max(1e-5, mean |G - x0_T|)        mean over a sample
        loss = sum (G - sg(G - grad))^2,   so that the gradient in G is 2 grad

    Of a sample whose grad is not finite, loss and gradient in G are zero.

    aux: loss, finite (bool `[B]`), xt, x0_fake, x0_teacher, weight `[B]`, grad.
    """
    xt = stop_gradient(diffuse(sample, eps, t))
    x0_fake = stop_gradient(denoise(fake, xt, t, text))
    x0_teacher = stop_gradient(denoise(teacher, xt, t, text))
    fixed = stop_gradient(sample)
    weight = jnp.maximum(1e-5, jnp.abs(fixed - x0_teacher).mean(axis=elements(sample)))
    grad = (x0_fake - x0_teacher) / like(weight, sample)
    finite = jnp.isfinite(grad).all(axis=elements(sample))
    loss = sum_square(jnp.where(like(finite, sample), sample - fixed + grad, 0))
    aux = {"xt": xt, "x0_fake": x0_fake, "x0_teacher": x0_teacher, "weight": weight, "grad": grad}
    return loss.sum(), aux | {"loss": loss, "finite": finite}


def fake_score(sample: jax.Array, fake: Velocity, eps: jax.Array, t: jax.Array, text: Any) -> Loss:
    """Loss of the fake score on the student's samples G, which take no gradient (critic step; rCM, section 5.1).

        x_t  = cos(t) G + sin(t) eps
        loss = sum (G - x0_fake(x_t, t))^2 / sin(t)^2 = sum (F_fake(x_t, t) - (cos(t) eps - sin(t) G))^2

    computed in the second form, which divides by no sine.

    aux: loss, xt, x0_fake.
    """
    sample = stop_gradient(sample)
    xt = diffuse(sample, eps, t)
    F = velocity(fake, xt, t, text)
    cos, sin = jnp.cos(like(t, xt)), jnp.sin(like(t, xt))
    loss = sum_square(F - (cos * eps - sin * sample))
    return loss.sum(), {"loss": loss, "xt": xt, "x0_fake": cos * xt - sin * F}


def interpolate(x0: jax.Array, eps: jax.Array, s: jax.Array) -> jax.Array:
    """Returns x_s = (1 - s) x0 + s eps; s `[B]`."""
    s = like(s, x0)
    return (1 - s) * x0 + s * eps


def elements(x: jax.Array) -> tuple[int, ...]:
    """Returns the axes of one sample of `[B, ...]`."""
    return tuple(range(1, x.ndim))


def sum_square(x: jax.Array) -> jax.Array:
    """Sums squares per sample, `[B, ...]` to `[B]`."""
    return jnp.sum(x**2, axis=elements(x))


def mean_square(x: jax.Array) -> jax.Array:
    """Averages squares per sample, `[B, ...]` to `[B]`."""
    return jnp.mean(x**2, axis=elements(x))

"""Recomputes the VAE fixture with our autoencoder, in float32."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from turbojax.models.vae import VAEConfig, WanVAE, decode, encode
from turbojax.weights.rules import TensorKey, assign
from turbojax.weights.vae import detect_vae_config, vae_rules

LATENTS, DECODED = 2e-5, (2e-5, 2.5e-5)  # the latter least, and of the largest value


def build(tensors: dict[str, np.ndarray], config: VAEConfig | None = None) -> WanVAE:
    """The autoencoder that a checkpoint in memory describes, with its weights."""
    config = config or detect_vae_config(tensors, dtype=jnp.float32)
    graph, state = nnx.split(nnx.eval_shape(lambda: WanVAE(config, rngs=nnx.Rngs(0))))
    flat = nnx.to_flat_state(state)
    names = [".".join(str(p) for p in path) for path, _ in flat]
    expected = {TensorKey(name, None): value for name, (_, value) in zip(names, flat, strict=True)}
    found = assign(tensors, vae_rules(tensors), expected, what="vae")
    filled = [
        (path, value.replace(jnp.asarray(found[TensorKey(name, None)], value.dtype)))
        for name, (path, value) in zip(names, flat, strict=True)
    ]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def weights_of(t: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name[2:]: value for name, value in t.items() if name.startswith("w.")}


def fixture_vae(t: dict[str, np.ndarray]) -> WanVAE:
    """The fixture's autoencoder in float32, with its mean and std."""
    statistics = {name: tuple(t[f"in.{name}"].tolist()) for name in ("mean", "std") if f"in.{name}" in t}
    weights = weights_of(t)
    return build(weights, detect_vae_config(weights, dtype=jnp.float32, **statistics))


def channels_last(video: np.ndarray) -> np.ndarray:
    """b c t h w to b t h w c."""
    return video.transpose(0, 2, 3, 4, 1)


def channels_first(video: jax.Array) -> np.ndarray:
    """b t h w c to b c t h w."""
    return np.asarray(video, np.float32).transpose(0, 4, 1, 2, 3)


def recompute(config: dict, t: dict[str, np.ndarray]) -> dict[str, tuple[np.ndarray, float]]:
    """Every `out.*` of the fixture: our value and the absolute tolerance."""
    wanted = {key for key in t if key.startswith("out.")}
    cases = sorted(config.get("cases") or {key.split(".")[1] for key in wanted})
    out: dict[str, tuple[np.ndarray, float]] = {}
    with (
        jax.default_matmul_precision("highest"),
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
    ):
        vae = fixture_vae(t)
        mean, std = (np.asarray(a, np.float32)[None, :, None, None, None] for a in (vae.config.mean, vae.config.std))
        for case in cases:
            if f"in.{case}.video" in t:
                z = channels_first(encode(vae, channels_last(t[f"in.{case}.video"])))
                out[f"out.{case}.latent"] = z, LATENTS
                out[f"out.{case}.latent_unscaled"] = z * std + mean, LATENTS
                latent = t.get(f"out.{case}.latent", z)  # decode what the reference decoded
            else:
                latent = t[f"in.{case}.latent"]
            frames = channels_first(decode(vae, channels_last(latent)))
            least, relative = DECODED
            out[f"out.{case}.decoded_unclamped"] = frames, max(least, relative * float(np.abs(frames).max()))
    return {key: value for key, value in out.items() if key in wanted}

"""From a prompt to a video: the pipeline and the functions it is made of.

    pipe = TurboVideoPipeline.from_pretrained("TurboWan2.1-T2V-1.3B-480P.pth")
    result = pipe("A cat surfing a wave at sunset", seed=1)
    pipe.save_video(result.videos[0], "cat.mp4")

B batch; video is `b t h w c`, latents `[B, 1 + (frames - 1) / 4, height / 8, width / 8, 16]`.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from tqdm import tqdm

from turbojax import video as video_files
from turbojax.diffusion import RCM, Euler, Sampler, UniPC, guide
from turbojax.errors import UserError
from turbojax.models import vae as vae_model
from turbojax.models.tokenizer import Tokenizer
from turbojax.models.umt5 import UMT5Config, UMT5Encoder, encode_text
from turbojax.models.vae import VAEConfig, WanVAE
from turbojax.models.wan import TimeEmbedding, WanConfig, WanModel, patch_grid
from turbojax.weights import files
from turbojax.weights.load import (
    Skeleton,
    load_umt5,
    load_vae,
    load_wan,
    open_wan,
    wan_skeleton,
    with_options,
)
from turbojax.weights.random import random_module, random_token_table

SamplerName = Literal["rcm", "euler", "unipc"]
SAMPLERS: tuple[str, ...] = ("rcm", "euler", "unipc")

# Networks that `random` builds, by the name a configuration gives.
MODELS: dict[str, Callable[..., WanConfig]] = {
    "wan2.1-t2v-1.3b": WanConfig.t2v_1_3b,
    "wan2.1-t2v-14b": WanConfig.t2v_14b,
    "wan2.1-i2v-14b": WanConfig.i2v_14b,
    "wan2.2-i2v-a14b": WanConfig.i2v_a14b,
}


class TextEncoder(NamedTuple):
    """Everything between a prompt and its embedding; the table `[vocab, D]` stays on the host."""

    tokenizer: Tokenizer
    encoder: UMT5Encoder
    table: np.ndarray


@dataclasses.dataclass(frozen=True)
class VideoOutput:
    """videos: uint8 `[B, T, H, W, 3]`; latents: float32, what was decoded; timings: seconds by stage."""

    videos: np.ndarray
    latents: jax.Array
    timings: dict[str, float]


class Stopwatch:
    """Wall-clock seconds by stage; compilation (lowering and XLA) is counted apart, as "compile"."""

    COMPILING = (
        "/jax/core/compile/jaxpr_to_mlir_module_duration",
        "/jax/core/compile/backend_compile_duration",
    )

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._compile = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event in self.COMPILING:
            self._compile += duration_secs

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start, compiled = time.perf_counter(), self._compile
        yield
        compiling = self._compile - compiled
        elapsed = time.perf_counter() - start - compiling
        self.seconds[name] = self.seconds.get(name, 0.0) + elapsed
        self.seconds["compile"] = self.seconds.get("compile", 0.0) + compiling
        logging.info("%s: %.2f s%s", name, elapsed, f", compilation {compiling:.2f} s" if compiling > 0.01 else "")

    def take(self) -> dict[str, float]:
        """The seconds so far; starts again from zero."""
        seconds, self.seconds = self.seconds, {}
        return seconds


def encode_prompt(text: TextEncoder, prompts: Sequence[str]) -> jax.Array:
    """Prompts to text embeddings `[B, 512, D]`, zero rows past each prompt's end."""
    ids, mask = text.tokenizer(list(prompts))
    return encode_text(text.encoder, text.table, ids, mask)


def latent_shape(config: VAEConfig, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
    """Latents `[t, h, w, c]` of a video; raises UserError for sizes that no latents have."""
    step = 2 * config.spatial_factor  # patches of the transformer are 2 x 2 latents
    for name, size in (("height", height), ("width", width)):
        if size < step or size % step:
            low = max(step, size // step * step)
            raise UserError(f"{name}={size} must be a multiple of {step}; nearest: {low}, {low + step}")
    if num_frames < 1 or (num_frames - 1) % config.temporal_factor:
        low = max(0, (num_frames - 1) // config.temporal_factor) * config.temporal_factor + 1
        raise UserError(
            f"{num_frames=} must be 1 more than a multiple of {config.temporal_factor}; "
            f"nearest: {low}, {low + config.temporal_factor}"
        )
    t = 1 + (num_frames - 1) // config.temporal_factor
    return t, height // config.spatial_factor, width // config.spatial_factor, config.z_dim


def make_sampler(name: str, *, num_steps: int, sigma_max: float, ode: bool = False, shift: float = 5.0) -> Sampler:
    """rCM for distilled models, Euler or UniPC for others (which start at their own noise level, 5000)."""
    if name == "rcm":
        return RCM(num_steps, sigma_max, ode)
    if name == "euler":
        return Euler(num_steps, shift)
    if name == "unipc":
        return UniPC(num_steps, shift)
    raise UserError(f"sampler={name!r} is unknown; choose {', '.join(SAMPLERS)}")


def sample(
    graph: Any,
    sampler: Sampler,
    state: Any,
    latents: jax.Array,
    text: jax.Array,
    negative: jax.Array | None,
    guidance_scale: jax.Array,
    key: jax.Array,
    noise: jax.Array | None,
) -> jax.Array:
    """Initial latents `[B, t, h, w, c]` and text `[B, 512, D]` to clean latents; one scan over the steps.

    graph, state: the split transformer. negative: embedding of the negative prompt, None without guidance.
    """
    batch = latents.shape[0]
    net: WanModel = nnx.merge(graph, state)
    context = net.prepare(
        text if negative is None else jnp.concatenate((text, negative)), patch_grid(latents, net.config.patch)
    )

    def velocity(x: jax.Array, time: TimeEmbedding) -> jax.Array:
        if negative is not None:
            x = jnp.concatenate((x, x))
        net: WanModel = nnx.merge(graph, state)  # a module belongs to the trace that it was made in
        v = net.velocity(x, TimeEmbedding(*(jnp.broadcast_to(a[None], (len(x), *a.shape)) for a in time)), context)
        return v if negative is None else guide(v[:batch], v[batch:], guidance_scale)

    return sampler.sample(velocity, latents, key=key, noise=noise, embed=net.embed_time)


def decode(vae: WanVAE, latents: jax.Array, *, chunk: int = vae_model.CHUNK) -> np.ndarray:
    """Latents `[B, t, h, w, c]` to uint8 videos `[B, T, H, W, 3]`, a video and a chunk of latent frames at a time."""
    videos = []
    for latent in latents:
        chunks = vae_model.decode_chunks(vae, latent[None], chunk=chunk, as_uint8=True)
        frames = []
        for part in tqdm(chunks, desc="Decoding", unit="chunk", disable=None, leave=False):
            part.copy_to_host_async()  # travels while the next chunk is computed
            frames.append(part)
        videos.append(np.concatenate([np.asarray(part)[0] for part in frames]))
    return np.stack(videos)


def bytes_by_dtype(arrays: Any) -> dict[str, int]:
    totals: dict[str, int] = {}
    for array in jax.tree.leaves(arrays):
        name = jnp.dtype(array.dtype).name
        totals[name] = totals.get(name, 0) + array.size * array.dtype.itemsize
    return totals


class TurboVideoPipeline:
    """Text encoder, transformer and VAE, loaded once and used for many videos."""

    def __init__(self, transformer: WanModel, vae: WanVAE, text: TextEncoder, *, load_seconds: float = 0.0):
        if transformer.config.text_dim != text.encoder.config.dim:
            raise UserError(
                f"the text encoder gives {text.encoder.config.dim} features and the transformer takes "
                f"{transformer.config.text_dim}; give the text encoder that belongs to it"
            )
        self.transformer, self.vae, self.text = transformer, vae, text
        self.load_seconds = load_seconds
        self._clock = Stopwatch()
        self._compiled: dict[Any, Callable] = {}

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | Path,
        *,
        vae: str | Path | None = None,
        text_encoder: str | Path | None = None,
        tokenizer: str | Path | None = None,
        quant_linear: bool | None = None,
        quant_scheme: str | None = None,
        attention_type: str | None = None,
        sla_topk: float | None = None,
        sage_values: str | None = None,
        dtype: Any = jnp.bfloat16,
    ) -> "TurboVideoPipeline":
        """Loads published or converted checkpoints; None follows what the checkpoint says.

        path_or_repo: a transformer file, a folder or a Hugging Face repository. What it does not hold (TurboDiffusion's
          repositories have the transformer alone) comes from vae, text_encoder and tokenizer, or else from
          Wan-AI/Wan2.1-T2V-1.3B.
        quant_linear: True for int8 linear layers in the blocks, quantizing while loading where the file is not.
        quant_scheme: a name of `turbojax.kernels.int8.QUANT_SCHEMES`, "block128" unless the checkpoint has another.
        attention_type: "original", "sla" or "sagesla". sla_topk: share of key blocks that the latter two attend to.
        sage_values: how SageSLA multiplies with v, see `turbojax.kernels.sage`.

        Raises UserError or CheckpointError with one sentence for what cannot be found or does not fit.
        """
        start = time.perf_counter()
        given = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer}
        own = files.open_repository(path_or_repo)
        transformer_path = Path(path_or_repo).expanduser()
        if not transformer_path.is_file():
            found = files.find(own, "transformer", quantized=quant_linear)
            if found is None:
                raise UserError(f"{own.name} holds no transformer checkpoint; give the file's path")
            transformer_path = found
        open_wan(transformer_path)  # reads names only: a bad file shows before anything is downloaded
        where = files.find_components(own, given)
        transformer = load_wan(
            transformer_path,
            quant_linear=quant_linear,
            quant_scheme=quant_scheme,
            attention_type=attention_type,
            sla_topk=sla_topk,
            sage_values=sage_values,
            dtype=dtype,
        )
        text = TextEncoder(Tokenizer.from_path(where["tokenizer"]), *load_umt5(where["text_encoder"], dtype=dtype))
        pipe = cls(transformer, load_vae(where["vae"], dtype=dtype), text)
        return pipe._loaded(transformer_path.name, start)

    @classmethod
    def random(
        cls,
        model: str,
        tokenizer: Tokenizer,
        *,
        quant_linear: bool | None = None,
        quant_scheme: str | None = None,
        attention_type: str | None = None,
        sla_topk: float | None = None,
        sage_values: str | None = None,
        dtype: Any = jnp.bfloat16,
        seed: int = 0,
    ) -> "TurboVideoPipeline":
        """The full-size network with generated weights, for benchmarks: it makes noise, not videos."""
        if model not in MODELS:
            raise UserError(f"{model=} is unknown; choose one of {', '.join(MODELS)}")
        start = time.perf_counter()
        logging.warning("Weights are random: %s at full size, for measuring. The video will be noise.", model)
        config = with_options(
            MODELS[model](),
            quant_linear=quant_linear,
            quant_scheme=quant_scheme,
            attention_type=attention_type,
            sla_topk=sla_topk,
            sage_values=sage_values,
            dtype=dtype,
        )
        t5, vae = UMT5Config.xxl(dtype=dtype), VAEConfig.wan2_1(dtype=dtype)
        build_t5 = Skeleton.of(lambda: UMT5Encoder(t5, rngs=nnx.Rngs(0)))
        build_vae = Skeleton.of(lambda: WanVAE(vae, rngs=nnx.Rngs(0)))
        text = TextEncoder(
            tokenizer,
            random_module(build_t5, seed=seed, what="random umT5"),
            random_token_table(tokenizer.vocab_size, t5.dim, dtype, seed=seed),
        )
        pipe = cls(
            random_module(wan_skeleton(config), seed=seed, what=f"random {model}"),
            random_module(build_vae, seed=seed, what="random VAE"),
            text,
        )
        return pipe._loaded(f"random {model}", start)

    def _loaded(self, what: str, start: float) -> "TurboVideoPipeline":
        jax.block_until_ready((nnx.state(self.transformer), nnx.state(self.text.encoder), nnx.state(self.vae)))
        self.load_seconds = time.perf_counter() - start
        c = self.transformer.config
        logging.info(
            "Loaded %s in %.1f s: %d layers of width %d, %s linear layers, %s attention",
            what,
            self.load_seconds,
            c.num_layers,
            c.dim,
            f"int8 ({c.quant.scheme})" if c.quant else jnp.dtype(c.dtype).name,
            c.attention_type + ("" if c.attention_type == "original" else f" (topk {c.sla_topk})"),
        )
        return self

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | None = None,
        num_frames: int = 81,
        height: int = 480,
        width: int = 832,
        num_inference_steps: int = 4,
        guidance_scale: float = 1.0,
        sampler: SamplerName = "rcm",
        sigma_max: float = 80.0,
        ode: bool = False,
        shift: float = 5.0,
        sla_topk: float | None = None,
        seed: int = 0,
        num_samples: int = 1,
        latents: jax.Array | None = None,
        noise: jax.Array | None = None,
    ) -> VideoOutput:
        """Makes num_samples videos of each prompt.

        num_frames: 4 n + 1; height, width: pixels, multiples of 16.
        num_inference_steps: 1 to 4 for "rcm", about 50 for "euler" and "unipc".
        guidance_scale: other than 1 runs the network for the negative prompt too (undistilled models).
        sigma_max: first noise level of rCM; ode: deterministic steps. shift: of Euler's and UniPC's times.
        sla_topk: another share of key blocks for this call; compiles once for each value.
        latents: standard normal `[B, t, h, w, c]` in place of the seed's; noise: `[steps, B, t, h, w, c]` likewise for
          the noise that rCM's SDE adds. B counts the samples of the first prompt, then those of the second.
        The same seed gives the same videos.

        Raises UserError for impossible sizes and settings, and where the network returns NaN.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or num_samples < 1:
            raise UserError(f"{len(prompts)} prompts and {num_samples=} ask for no video; give at least one of each")
        if not 0 <= seed < 2**32:
            raise UserError(f"{seed=} must be in 0..{2**32 - 1}")
        if self.transformer.config.in_channels != self.vae.config.z_dim:
            raise UserError("this transformer makes videos from images; give a text-to-video checkpoint")
        steps = make_sampler(sampler, num_steps=num_inference_steps, sigma_max=sigma_max, ode=ode, shift=shift)
        guided = guidance_scale != 1.0
        if negative_prompt and not guided:
            logging.warning("negative_prompt has no effect with guidance_scale=1")
        shape = (len(prompts) * num_samples, *latent_shape(self.vae.config, num_frames, height, width))
        for name, value, expected in (
            ("latents", latents, shape),
            ("noise", noise, (num_inference_steps, *shape)),
        ):
            if value is not None and value.shape != expected:
                raise UserError(f"{name} has the shape {value.shape} and must have {expected}")

        self._clock.take()  # what a call that failed has left
        with self._clock.stage("text"):
            text = jnp.repeat(encode_prompt(self.text, prompts), num_samples, axis=0)
            negative = None
            if guided:
                negative = jnp.broadcast_to(encode_prompt(self.text, [negative_prompt or ""]), text.shape)
            jax.block_until_ready((text, negative))
        with self._clock.stage("diffusion"):
            first_key, step_key = jax.random.split(jax.random.key(seed))
            if latents is None:
                latents = jax.random.normal(first_key, shape, jnp.float32)
            arguments = (
                steps.initial(jnp.asarray(latents)),
                text,
                negative,
                jnp.asarray(guidance_scale, jnp.float32),
                step_key,
                None if noise is None else jnp.asarray(noise),
            )
            clean = jax.block_until_ready(self._sample(steps, self.with_topk(sla_topk), arguments))
        if not bool(jnp.isfinite(clean).all()):
            raise UserError("the network returned NaN or infinity; check the checkpoint, or try dtype float32")
        with self._clock.stage("vae"):
            videos = decode(self.vae, clean)
        return VideoOutput(videos, clean, self._clock.take())

    def with_topk(self, sla_topk: float | None) -> WanModel:
        """The transformer with another sla_topk; the weights are shared."""
        config = self.transformer.config
        if sla_topk is None or sla_topk == config.sla_topk:
            return self.transformer
        if config.attention_type == "original":
            raise UserError(f"{sla_topk=} has no effect on attention_type='original'; load with attention_type='sla'")
        graph = wan_skeleton(dataclasses.replace(config, sla_topk=sla_topk)).graph
        return nnx.merge(graph, nnx.state(self.transformer))

    def _sample(self, sampler: Sampler, transformer: WanModel, arguments: tuple) -> jax.Array:
        """Compiled once for each sampler, configuration and shape."""
        graph, state = nnx.split(transformer)
        shapes = jax.tree.map(lambda a: (a.shape, a.dtype), arguments)
        name = (sampler, transformer.config, jax.tree.structure(shapes), tuple(jax.tree.leaves(shapes)))
        if name not in self._compiled:
            logging.info("Compiling the sampler: %s", sampler)
            function = jax.jit(sample, static_argnums=(0, 1))
            self._compiled[name] = function.lower(graph, sampler, state, *arguments).compile()
        return self._compiled[name](state, *arguments)

    def memory_report(self) -> dict[str, dict[str, int]]:
        """Bytes by component and dtype, measured from the arrays; "host" is the text encoder's token table."""
        modules = {"transformer": self.transformer, "vae": self.vae, "text_encoder": self.text.encoder}
        report = {name: bytes_by_dtype(nnx.state(module)) for name, module in modules.items()}
        return report | {"host": bytes_by_dtype(self.text.table)}

    def save_video(self, video: np.ndarray, path: str | Path, fps: int = 16) -> list[Path]:
        """Writes one video, uint8 `[T, H, W, 3]`, as .mp4, .gif or numbered .png; see `turbojax.video.save_video`."""
        return video_files.save_video(video, path, fps)

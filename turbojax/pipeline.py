"""From a prompt, or an image and a prompt, to a video: the pipeline and the functions it is made of.

    pipe = TurboVideoPipeline.from_pretrained("TurboWan2.1-T2V-1.3B-480P.pth")
    result = pipe("A cat surfing a wave at sunset", seed=1)
    pipe.save_video(result.videos[0], "cat.mp4")

B batch; video is `b t h w c`, latents `[B, 1 + (frames - 1) / 4, height / 8, width / 8, 16]`.
"""

import dataclasses
import functools
import inspect
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from tqdm import tqdm

from turbojax import guard
from turbojax.ahead import Programs
from turbojax.cache import use_compilation_cache
from turbojax.condition import compile_still, image_inputs, image_shapes, read_images, video_shape
from turbojax.diffusion import Sampler
from turbojax.errors import UserError
from turbojax.experts import BOUNDARY, NAMES, Experts
from turbojax.image import ImageSource
from turbojax.kernels.dispatch import compute_capability, slow_gpu
from turbojax.memory import Plan, asked, device_limit, loading_advice, out_of_memory, parse, plan, way_out
from turbojax.models import vae as vae_model
from turbojax.models.clip import CLIPConfig, CLIPVision, clip_dtype
from turbojax.models.streaming import Placed, Streamed, placed
from turbojax.models.tiling import compile_tiles, decode_tiled
from turbojax.models.tokenizer import Tokenizer
from turbojax.models.umt5 import TEXT_LEN, UMT5Config
from turbojax.models.vae import VAEConfig, WanVAE
from turbojax.models.wan import WanConfig, WanModel
from turbojax.sampling import (
    SamplerName,
    check_seed,
    denoise,
    first_noise_level,
    first_state,
    latent_shape,
    make_sampler,
    sampler_arguments,
    sampler_program,
    streamed,
    with_topk,
)
from turbojax.stopwatch import Progress, Stopwatch, untold
from turbojax.temporaries import Parts, Residency, Work
from turbojax.text import TextEncoder
from turbojax.video import check_fps, check_path, files_of, numbered, open_video, save_video
from turbojax.weights import files
from turbojax.weights.load import load_wan, open_wan, with_options
from turbojax.weights.lora import Expert, LoRA
from turbojax.weights.plain import load_plain, open_clip, open_vae
from turbojax.weights.random import random_module, random_token_table
from turbojax.weights.skeleton import clip_skeleton, umt5_skeleton, vae_skeleton, wan_skeleton

TilingName = Literal["auto", "on", "off"]
VAE_TILING: tuple[str, ...] = ("auto", "on", "off")

# Networks that `random` builds, by the name a configuration gives.
MODELS: dict[str, Callable[..., WanConfig]] = {
    "wan2.1-t2v-1.3b": WanConfig.t2v_1_3b,
    "wan2.1-t2v-14b": WanConfig.t2v_14b,
    "wan2.1-i2v-14b": WanConfig.i2v_14b,
    "wan2.2-i2v-a14b": WanConfig.i2v_a14b,
}
TWO_EXPERTS = ("wan2.2-i2v-a14b",)


def known_network(model: str | None) -> WanConfig:
    """The network of a name in MODELS; raises UserError for another."""
    if model not in MODELS:
        raise UserError(f"{model=} is unknown; choose one of {', '.join(MODELS)}")
    return MODELS[model]()


@dataclasses.dataclass(frozen=True)
class VideoOutput:
    """videos: uint8 `[B, T, H, W, 3]`; latents: float32, what was decoded; timings: seconds by stage; files written."""

    videos: np.ndarray
    latents: jax.Array
    timings: dict[str, float]
    files: list[Path] = dataclasses.field(default_factory=list)


def decode(vae: WanVAE, latents: np.ndarray, *, tiled: bool = False) -> Iterator[np.ndarray]:
    """One video's latents `[t, h, w, c]` to uint8 frames `[n, H, W, 3]` on the host, a chunk at a time.

    tiled: in tiles, see `turbojax.models.tiling`; then all frames come at once.
    """
    if tiled:
        yield decode_tiled(vae, latents[None], as_uint8=True)[0]
        return
    chunks = vae_model.decode_chunks(vae, latents[None], as_uint8=True)
    for part in tqdm(chunks, desc="Decoding", unit="chunk", disable=None, leave=False):
        yield np.asarray(part)[0]  # travels while the next chunk is computed


def memory_stats() -> dict[str, int]:
    """Of the first device, in bytes; empty where it does not count them."""
    return jax.devices()[0].memory_stats() or {}


def check_number(prompts: Sequence[str], num_samples: int) -> None:
    if not prompts or num_samples < 1:
        raise UserError(f"{len(prompts)} prompts and {num_samples=} ask for no video; give at least one of each")


def check_tiling(vae_tiling: str) -> None:
    if vae_tiling not in VAE_TILING:
        raise UserError(f"{vae_tiling=} is unknown; choose {', '.join(VAE_TILING)}")


def needs_tiling(vae: WanVAE, height: int, width: int, tiling: str, *, limit: int | None = None) -> bool:
    """Whether decoding latents of this size goes in tiles; "auto" compares with the memory that is free.

    limit: bytes to keep to where the device has more.
    """
    if tiling != "auto":
        return tiling == "on"
    memory = memory_stats()
    if "bytes_limit" not in memory:
        return False
    free = min(memory["bytes_limit"], limit or memory["bytes_limit"]) - memory["bytes_in_use"]
    needed = vae_model.decoding_bytes(vae, height, width)
    if needed > free:
        logging.info("Decoding in tiles: whole frames take %.1f GB, and %.1f GB are free", needed / 1e9, free / 1e9)
    return needed > free


class Call(NamedTuple):
    """A call of the pipeline in shapes; arguments: what `sample` takes besides the network."""

    sampler: Sampler
    arguments: tuple
    sla_topk: float | None
    vae_tiling: str

    @classmethod
    def of(cls, parts: Parts, settings: Mapping[str, Any]) -> "Call":
        """settings: of `TurboVideoPipeline.__call__`, whose defaults stand for the others."""
        call = inspect.signature(TurboVideoPipeline.__call__).bind(None, **{"prompt": "", **settings})
        call.apply_defaults()
        c, network = call.arguments, parts.transformer
        prompts = [c["prompt"]] if isinstance(c["prompt"], str) else c["prompt"]
        batch = len(prompts) * c["num_samples"]
        images = [] if c["image"] is None else read_images(network, c["image"], c["last_image"], c["background"])
        width, height = video_shape(c["width"], c["height"], images, adaptive=c["adaptive_size"])
        shape = (batch, *latent_shape(parts.vae, c["num_frames"], height, width))
        sampler = make_sampler(
            c["sampler"],
            num_steps=c["num_inference_steps"],
            sigma_max=first_noise_level(network, c["sigma_max"]),
            **{name: c[name] for name in ("ode", "shift")},
        )
        embedding = jax.ShapeDtypeStruct((batch, TEXT_LEN, parts.text.dim), parts.text.dtype)
        guided = c["guidance_scale"] != 1.0
        options = {name: c[name] for name in ("guidance_scale", "seed", "latents", "noise")}

        def arguments(embedding: jax.Array, images: dict[str, jax.Array]) -> tuple:
            negative = embedding if guided else None
            return sampler_arguments(sampler, shape, embedding, negative=negative, images=images, **options)

        check_tiling(c["vae_tiling"])
        inputs = image_shapes(network, parts.vae, (1, *shape[1:]))
        return cls(sampler, jax.eval_shape(arguments, embedding, inputs), c["sla_topk"], c["vae_tiling"])

    @property
    def work(self) -> Work:
        latents, _, negative, *_ = self.arguments
        return Work(latents.shape[1:], latents.shape[0], negative is not None, self.vae_tiling)


def compile_ahead(
    programs: Programs,
    experts: Experts,
    transformer: WanModel,
    vae: WanVAE,
    text: TextEncoder,
    call: Call,
    residency: Residency,
) -> None:
    """Starts to compile what a call will run, but for a streamed transformer. transformer and vae may be abstract."""
    if not residency.transformer_streamed:
        network = with_topk(transformer, call.sla_topk)
        for _, steps in experts.parts(call.sampler):
            programs.start(*sampler_program(call.sampler, steps, network, call.arguments))
    programs.start("noise", lambda: first_state(call.sampler, call.arguments[0].shape, 0))
    programs.start("text", text.compile)
    if call.arguments[-1]:
        programs.start("image", lambda: compile_still(vae, *call.work.pixels(vae.config)))
    compile_vae = compile_tiles if residency.vae_tiled else vae_model.compile_decoding
    programs.start("vae", lambda: compile_vae(vae, (1, *call.work.latents), as_uint8=True))


def plan_call(
    parts: Parts,
    call: Call,
    memory: str | float = "auto",
    *,
    residency: Residency | None = None,
    exact: bool | None = None,
) -> Plan:
    """What a call needs of the device, see `turbojax.memory.plan`.

    residency: where weights are already, None to choose. exact: compile the programs, which takes the GPU's compiler
    half a minute; None where the estimate is near the limit; without a GPU, it is an estimate either way.
    """

    def compile_sampler() -> Any:
        transformer = wan_skeleton(parts.transformer).abstract()
        steps = 0, call.sampler.num_steps
        return sampler_program(call.sampler, steps, with_topk(transformer, call.sla_topk), call.arguments)[1]()

    options: dict[str, Any] = dict(memory=memory, limit=device_limit(), residency=residency)
    found = plan(parts, call.work, **options)
    if jax.default_backend() != "gpu" or exact is False or (exact is None and found.clear):
        return found
    return plan(parts, call.work, compile_sampler=compile_sampler, **options)


def settle(parts: Parts, call: Call, memory: str | float) -> Residency:
    """Where weights go for this call; raises UserError where nothing fits."""
    mode, limit = parse(memory, device_limit())
    if mode != "auto" or limit is None:
        return dataclasses.replace(asked(mode), vae_tiled=call.vae_tiling == "on")
    found = plan_call(parts, call, memory)
    if not found.fits:
        raise UserError(found.reasons[-1])
    if found.residency != Residency():
        logging.info(" ".join(found.reasons))
    return found.residency


def explaining_memory(call: Callable) -> Callable:
    """A call of a pipeline that says what to change where the device's memory is not enough."""

    @functools.wraps(call)
    def explained(pipe: "TurboVideoPipeline", *arguments: Any, **settings: Any) -> Any:
        def advice() -> str:
            bound = inspect.signature(call).bind(pipe, *arguments, **settings).arguments
            del bound["self"]
            return way_out(pipe.plan(**bound, exact=False), pipe.parts)

        with out_of_memory(advice):
            return call(pipe, *arguments, **settings)

    return explained


def published_parts(config: WanConfig, *, two: bool) -> Parts:
    """A transformer, or two, with the published networks around it in its dtype."""
    clip = CLIPConfig.vit_h_14(dtype=clip_dtype(config.dtype)) if config.clip_dim else None
    vae, text = VAEConfig.wan2_1(dtype=config.dtype), UMT5Config.xxl(dtype=config.dtype)
    return Parts(config, vae, text, clip, 2 if two else 1)


def arrange(parts: Parts, residency: Residency, memory: str | float, *, boundary: float = BOUNDARY) -> Experts:
    """Where the plan wants one or two transformers, which are still to be added."""
    in_turn = residency.in_turn and not residency.transformer_streamed
    names = NAMES if parts.transformers > 1 else NAMES[:1]
    return Experts(names=names, boundary=boundary, in_turn=in_turn, limit=parse(memory, device_limit())[1])


def bytes_by_dtype(arrays: Any) -> dict[str, int]:
    totals: dict[str, int] = {}
    for array in jax.tree.leaves(arrays):
        name = jnp.dtype(array.dtype).name
        totals[name] = totals.get(name, 0) + array.size * array.dtype.itemsize
    return totals


class TurboVideoPipeline:
    """Text encoder, transformer (one, or two experts), VAE and image encoder, loaded once and used for many videos."""

    def __init__(
        self,
        transformer: WanModel | Streamed | Experts,
        vae: WanVAE,
        text: TextEncoder,
        *,
        clip: CLIPVision | None = None,
        programs: Programs | None = None,
    ):
        self.experts = transformer if isinstance(transformer, Experts) else Experts.of(transformer)
        self.vae, self.text, self.clip = vae, text, clip
        c = self.config
        if c.text_dim != text.config.dim:
            raise UserError(
                f"the text encoder gives {text.config.dim} features and the transformer takes "
                f"{c.text_dim}; give the text encoder that belongs to it"
            )
        if c.clip_dim != (clip.config.dim if clip else None):
            raise UserError(f"the transformer takes image tokens of width {c.clip_dim}; give its image encoder")
        self.load_seconds = 0.0
        self.memory: str | float = "auto"
        self._clock = Stopwatch()
        self._programs = programs or Programs()

    @property
    def config(self) -> WanConfig:
        """The transformer's; experts have the same."""
        return self.experts.config

    @property
    def transformer(self) -> WanModel | Streamed:
        """The transformer, or the expert for high noise; brought to the device if it was not there."""
        return self.experts.bring("high")

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | Path,
        *,
        vae: str | Path | None = None,
        text_encoder: str | Path | None = None,
        tokenizer: str | Path | None = None,
        image_encoder: str | Path | None = None,
        loras: Sequence[LoRA] = (),
        boundary: float = BOUNDARY,
        quant_linear: bool | None = None,
        quant_scheme: str | None = None,
        attention_type: str | None = None,
        sla_topk: float | None = None,
        sage_values: str | None = None,
        dtype: Any = jnp.bfloat16,
        cache_prompts: bool = True,
        memory: str | float = "auto",
        prepare: Mapping[str, Any] | None = None,
    ) -> "TurboVideoPipeline":
        """Loads published or converted checkpoints; None follows what the checkpoint says.

        path_or_repo: a transformer file, a folder or a Hugging Face repository; of two experts, either one's file finds
          the other. What it does not hold (TurboDiffusion's repositories have the transformer alone) comes from vae,
          text_encoder and tokenizer, or else from Wan-AI/Wan2.1-T2V-1.3B; image_encoder (CLIP, for Wan 2.1 image to
          video) from Wan-AI/Wan2.1-I2V-14B-480P.
        loras: merged while loading, before quantization; see `turbojax.weights.lora`.
        boundary: the rectified-flow time at which experts change, from high noise to low.
        quant_linear: True for int8 linear layers in the blocks, quantizing while loading where the file is not.
        quant_scheme: a name of `turbojax.kernels.int8.QUANT_SCHEMES`, "block128" unless the checkpoint has another.
        attention_type: "original", "sla" or "sagesla". sla_topk: share of key blocks that the latter two attend to.
        sage_values: how SageSLA multiplies with v, see `turbojax.kernels.sage`.
        cache_prompts: keep text embeddings in the user's cache folder. The text encoder is checked here and loaded at
          the first prompt that is not there.
        memory: "auto" keeps on the device what fits beside a call with the settings of `prepare`, or the default ones;
          "resident" everything; "stream" leaves transformers and text encoder in host memory and copies them a layer
          ahead; a number is the limit in GB to plan for, as "auto", which may also keep one of two experts in host
          memory at a time, see `turbojax.experts`. Without a GPU "auto" is "resident".
        prepare: settings of the first call, such as `dict(height=720, width=1280)`; what it runs is compiled while the
          weights load.

        Raises UserError or CheckpointError with one sentence for what cannot be found or does not fit.
        """
        start = time.perf_counter()
        given = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer}
        high, low = files.find_networks(path_or_repo, quantized=quant_linear)
        options: dict[str, Any] = dict(
            quant_linear=quant_linear,
            quant_scheme=quant_scheme,
            attention_type=attention_type,
            sla_topk=sla_topk,
            sage_values=sage_values,
            dtype=dtype,
        )
        # Reads names only: a bad file shows before anything is downloaded.
        config = with_options(open_wan(high).config, **options)
        if low is None and (single := [lora for lora in loras if lora.expert]):
            raise UserError(f"{single[0].path} is for an expert, and {high.name} is the only network; give it for all")
        given |= {"image_encoder": image_encoder} if config.clip_dim else {}
        where = files.find_components(files.open_repository(path_or_repo), given)
        use_compilation_cache()
        text = TextEncoder.from_files(where["text_encoder"], where["tokenizer"], dtype=dtype, cache=cache_prompts)
        vae_file, programs = open_vae(where["vae"], dtype=dtype), Programs()
        clip_file = open_clip(where["image_encoder"], dtype=clip_dtype(dtype)) if config.clip_dim else None
        abstract_vae = vae_file.skeleton.abstract()
        parts = Parts(
            config,
            abstract_vae.config,
            text.config,
            clip_file.skeleton.abstract().config if clip_file else None,
            1 if low is None else 2,
        )
        call = Call.of(parts, prepare or {})
        residency = settle(parts, call, memory)
        text.streamed, streamed = residency.text_streamed, residency.transformer_streamed
        experts = arrange(parts, residency, memory, boundary=boundary)
        if prepare is not None:
            compile_ahead(programs, experts, wan_skeleton(config).abstract(), abstract_vae, text, call, residency)
        with programs.needed(), out_of_memory(lambda: loading_advice(parts)):
            if low is not None:
                experts.add("low", load_wan(low, loras=loras, expert="low", streamed=streamed, **options))
            expert: Expert | None = "high" if low else None
            experts.add("high", load_wan(high, loras=loras, expert=expert, streamed=streamed, **options))
            clip = load_plain(clip_file, what=where["image_encoder"].name) if clip_file else None
            network = load_plain(vae_file, what=where["vae"].name)
            pipe = cls(experts, network, text, clip=clip, programs=programs)
        return pipe._loaded(high.name if low is None else f"{high.name} and {low.name}", start, memory)

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
        memory: str | float = "auto",
        prepare: Mapping[str, Any] | None = None,
    ) -> "TurboVideoPipeline":
        """The full-size network with generated weights, for benchmarks: it makes noise, not videos.

        Options as `from_pretrained` takes them.
        """
        start = time.perf_counter()
        config = with_options(
            known_network(model),
            quant_linear=quant_linear,
            quant_scheme=quant_scheme,
            attention_type=attention_type,
            sla_topk=sla_topk,
            sage_values=sage_values,
            dtype=dtype,
        )
        logging.warning("Weights are random: %s at full size, for measuring. The video will be noise.", model)
        use_compilation_cache()
        parts = published_parts(config, two=model in TWO_EXPERTS)
        network, vae, encoder = wan_skeleton(config), vae_skeleton(parts.vae), umt5_skeleton(parts.text)
        call, programs = Call.of(parts, prepare or {}), Programs()
        residency = settle(parts, call, memory)
        streamed, experts = residency.transformer_streamed, arrange(parts, residency, memory)
        table = random_token_table(tokenizer.vocab_size, parts.text.dim, dtype, seed=seed)
        generate = functools.partial(random_module, seed=seed)
        load = functools.partial(generate, encoder, what="random umT5")
        text = TextEncoder(tokenizer, encoder.abstract(), table, load, streamed=residency.text_streamed)
        if prepare is not None:
            compile_ahead(programs, experts, network.abstract(), vae.abstract(), text, call, residency)
        with programs.needed(), out_of_memory(lambda: loading_advice(parts)):
            for i, name in enumerate(reversed(experts.names)):
                experts.add(name, random_module(network, seed=seed + i, what=f"random {model}", streamed=streamed))
            clip = generate(clip_skeleton(parts.clip), what="random CLIP") if parts.clip else None
            pipe = cls(experts, generate(vae, what="random VAE"), text, clip=clip, programs=programs)
            jax.block_until_ready(placed(text.encoder))
        return pipe._loaded(f"random {model}", start, memory)

    def _loaded(self, what: str, start: float, memory: str | float) -> "TurboVideoPipeline":
        self.memory = memory
        jax.block_until_ready((self.experts.placed(), placed(self.vae)))
        self.load_seconds = time.perf_counter() - start
        if slow := slow_gpu(compute_capability()):
            logging.warning(slow)
        c = self.config
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

    @explaining_memory
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        image: ImageSource | None = None,
        last_image: ImageSource | None = None,
        background: str = "white",
        adaptive_size: bool = True,
        negative_prompt: str | None = None,
        num_frames: int = 81,
        height: int = 480,
        width: int = 832,
        num_inference_steps: int = 4,
        guidance_scale: float = 1.0,
        sampler: SamplerName = "rcm",
        sigma_max: float | None = None,
        ode: bool = False,
        shift: float = 5.0,
        sla_topk: float | None = None,
        seed: int = 0,
        num_samples: int = 1,
        latents: jax.Array | None = None,
        noise: jax.Array | None = None,
        output: str | Path | None = None,
        fps: int = 16,
        vae_tiling: TilingName = "auto",
        progress: Progress = untold,
    ) -> VideoOutput:
        """Makes num_samples videos of each prompt.

        image: the first frame (a path, an array or a PIL image) for networks that make videos from images; last_image:
          the last frame, for those that take one. background shows through where they are transparent.
        adaptive_size: with an image, the video has its shape and the area of height x width; False squeezes the image.
        num_frames: 4 n + 1; height, width: pixels, multiples of 16.
        num_inference_steps: 1 to 4 for "rcm", about 50 for "euler" and "unipc".
        guidance_scale: other than 1 runs the network for the negative prompt too (undistilled models).
        sigma_max: first noise level of rCM, None for 80, with an image 200; ode: deterministic steps.
        shift: of Euler's and UniPC's times.
        sla_topk: another share of key blocks for this call; compiles once for each value.
        latents: standard normal `[B, t, h, w, c]` in place of the seed's; noise: `[steps, B, t, h, w, c]` likewise for
          the noise that rCM's SDE adds. B counts the samples of the first prompt, then those of the second.
        output: a file to write while decoding, with fps frames a second, as `save_video` does; several videos are
          numbered, clip_0000.mp4, clip_0001.mp4, ...
        vae_tiling: decode in tiles that pass into each other, with less memory and more time: "on", "off", or "auto"
          where whole frames would not fit.
        progress: called with a stage's name and the share of it that is done, as stages begin, after decoded chunks and
          before the steps of a streamed transformer. What it raises ends the call; no file is left then.
        The same seed gives the same videos.

        Raises UserError for impossible sizes and settings, for files that cannot be written, and where the network
        returns NaN.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        check_number(prompts, num_samples)
        check_seed(seed)
        check_tiling(vae_tiling)
        pictures = read_images(self.config, image, last_image, background)
        width, height = video_shape(width, height, pictures, adaptive=adaptive_size)
        sigma_max = first_noise_level(self.config, sigma_max)
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

        outputs = [] if output is None else [numbered(check_path(output), i, shape[0]) for i in range(shape[0])]
        check_fps(fps)

        self._clock.take()  # what a call that failed has left
        self._clock.progress = progress
        with self._clock.stage("compile"):
            self._programs.wait("text")
        with self._clock.stage("text"):
            text = jax.device_put(np.repeat(self.text(prompts), num_samples, axis=0))
            negative = None
            if guided:
                negative = jax.device_put(np.repeat(self.text([negative_prompt or ""]), shape[0], axis=0))
        images: dict[str, jax.Array] = {}
        if pictures:
            with self._clock.stage("compile"):
                self._programs.wait("image")
            with self._clock.stage("image"):
                sizes = dict(num_frames=num_frames, width=width, height=height)
                images = jax.block_until_ready(image_inputs(self.vae, self.clip, pictures, **sizes))
        with self._clock.stage("compile"):
            self._programs.wait("noise")
            arguments = sampler_arguments(
                steps,
                shape,
                text,
                negative=negative,
                guidance_scale=guidance_scale,
                seed=seed,
                latents=latents,
                noise=noise,
                images=images,
            )
        clean = self._sample(steps, sla_topk, arguments)
        host = np.asarray(clean)
        if not np.isfinite(host).all():
            raise UserError("the network returned NaN or infinity; check the checkpoint, or try dtype float32")
        with self._clock.stage("compile"):
            self._programs.wait("vae")
        tiled = needs_tiling(self.vae, *shape[2:4], vae_tiling, limit=parse(self.memory, None)[1])
        videos = self._decode(host, outputs, fps, tiled=tiled)
        for line in guard.warnings(videos):
            logging.warning("%s", line)
        written = [file for path in outputs for file in files_of(path, num_frames)]
        return VideoOutput(videos, clean, self._clock.take(), written)

    def _sample(self, sampler: Sampler, sla_topk: float | None, arguments: tuple) -> jax.Array:
        """The steps by the networks that make them; compiled once for each part, configuration and shape."""
        parts = self.experts.parts(sampler)
        programs: list[Any] = [None] * len(parts)
        if not self.experts.streamed:
            network = with_topk(wan_skeleton(self.config).abstract(), sla_topk)
            with self._clock.stage("compile"):
                programs = [self._programs.get(*sampler_program(sampler, p, network, arguments)) for _, p in parts]
        latents, *rest = arguments
        for i, ((name, steps), program) in enumerate(zip(parts, programs, strict=True)):
            with self._clock.stage("experts") if self.experts.in_turn else nullcontext():
                transformer = with_topk(self.experts.bring(name), sla_topk)
                if self.experts.in_turn and i + 1 < len(parts):
                    self.experts.prefetch(parts[i + 1][0], self.experts.room_beside(program))
            with self._clock.stage("diffusion"):
                if isinstance(transformer, Streamed):
                    shares = iter(np.arange(*steps) / sampler.num_steps)
                    begin = functools.partial(streamed, transformer, functools.partial(self._step, shares))
                    latents = denoise(begin, sampler, steps, latents, *rest, scan=False)
                else:
                    latents = program(nnx.state(transformer), latents, *rest)
                latents.block_until_ready()
        return latents

    def _step(self, shares: Iterator[float]) -> None:
        """Tells the progress before a step."""
        self._clock.progress("diffusion", float(next(shares)))

    def _decode(self, latents: np.ndarray, outputs: Sequence[Path], fps: int, *, tiled: bool) -> np.ndarray:
        """Latents `[B, t, h, w, c]` to uint8 videos `[B, T, H, W, 3]`, written to the outputs as their frames come."""
        c = self.vae.config
        _, t, h, w, _ = latents.shape
        shape = (1 + (t - 1) * c.temporal_factor, h * c.spatial_factor, w * c.spatial_factor, 3)
        videos = np.empty((len(latents), *shape), np.uint8)
        done = 0
        for latent, video, output in itertools.zip_longest(latents, videos, outputs):
            writing = open_video(output, shape, fps) if output else nullcontext(None)
            with self._clock.stage("file"), writing as append, self._clock.stage("vae"):
                start = 0
                for frames in decode(self.vae, latent, tiled=tiled):
                    video[start : start + len(frames)] = frames
                    start += len(frames)
                    done += len(frames)
                    if append:
                        append(frames)
                    self._clock.progress("vae", done / (len(videos) * shape[0]))
        return videos

    @property
    def parts(self) -> Parts:
        """The configurations of the networks."""
        clip = self.clip.config if self.clip else None
        return Parts(self.config, self.vae.config, self.text.config, clip, len(self.experts.names))

    def plan(self, *, memory: str | float | None = None, exact: bool = True, **settings: Any) -> Plan:
        """What a call with these settings will need of the device, stage by stage; print it.

        memory: as `from_pretrained` takes it, for what that would choose; None for the weights where they are.
        exact: on a GPU, compile the call's programs (half a minute) instead of estimating.
        Raises UserError for impossible sizes and settings.
        """
        residency = None
        if memory is None:
            memory = self.memory
            residency = Residency(
                text_streamed=self.text.streamed,
                in_turn=self.experts.in_turn,
                transformer_streamed=self.experts.streamed,
            )
        return plan_call(self.parts, Call.of(self.parts, settings), memory, residency=residency, exact=exact)

    def memory_report(self) -> dict[str, dict[str, int]]:
        """Bytes by component and dtype, measured from the arrays; "host" has the token table and what is not on it."""
        encoder = self.text.encoder if self.text.loaded else None
        modules = {"vae": self.vae, "text_encoder": encoder, "image_encoder": self.clip}
        where = {"transformer": self.experts.placed()}
        where |= {name: placed(module) if module else Placed((), ()) for name, module in modules.items()}
        report = {name: bytes_by_dtype(arrays.device) for name, arrays in where.items()}
        return report | {"host": bytes_by_dtype((self.text.table, *(arrays.host for arrays in where.values())))}

    def save_video(self, video: np.ndarray, path: str | Path, fps: int = 16) -> list[Path]:
        """Writes one video, uint8 `[T, H, W, 3]`, as .mp4, .gif or numbered .png; see `turbojax.video.save_video`."""
        return save_video(video, path, fps)

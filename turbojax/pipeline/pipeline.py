"""From a prompt, or an image and a prompt, to a video: the pipeline and the functions it is made of.

    pipe = TurboVideoPipeline.from_pretrained("TurboWan2.1-T2V-1.3B-480P.pth")
    result = pipe("A cat surfing a wave at sunset", seed=1)
    pipe.save_video(result.videos[0], "cat.mp4")

B batch; video is `b t h w c`, latents `[B, 1 + (frames - 1) / 4, height / 8, width / 8, 16]`.
"""

import dataclasses
import functools
import itertools
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx

from turbojax.config import fields_of
from turbojax.diffusion import Sampler
from turbojax.errors import UserError
from turbojax.kernels.dispatch import compute_capability, slow_gpu
from turbojax.media import video_checks
from turbojax.media.image import ImageSource
from turbojax.media.video import files_of, open_video, save_video
from turbojax.memory.estimates import Residency
from turbojax.memory.experts import BOUNDARY, Experts
from turbojax.memory.planner import Plan, out_of_memory, parse, suggestion
from turbojax.models.clip import CLIPVision
from turbojax.models.image_condition import image_inputs
from turbojax.models.offload import ArraysByMemory, Streamed, arrays_by_memory, to_device
from turbojax.models.published import ModelConfigs
from turbojax.models.sizes import size_of
from turbojax.models.tokenizer import Tokenizer
from turbojax.models.vae import WanVAE
from turbojax.models.wan import WanConfig, WanModel
from turbojax.pipeline.compile import CompiledPrograms
from turbojax.pipeline.decode import decode, needs_tiling
from turbojax.pipeline.denoise import denoise, sampler_arguments, sampler_program, streamed, with_topk
from turbojax.pipeline.loading import load, open_published, open_random
from turbojax.pipeline.options import LoadOptions
from turbojax.pipeline.plan import plan_call
from turbojax.pipeline.request import Request, SamplerName, TilingName
from turbojax.pipeline.text import TextEncoder
from turbojax.pipeline.timing import Progress, Stopwatch, no_progress
from turbojax.weights.lora import LoRA
from turbojax.weights.skeleton import wan_skeleton


@dataclasses.dataclass(frozen=True)
class VideoOutput:
    """Result of a call. videos: uint8 `[B, T, H, W, 3]`; latents: float32, what was decoded; timings: seconds by stage.

    files: those written. warnings: lines on what may not be as it was meant, which the log has, too.
    """

    videos: np.ndarray
    latents: jax.Array
    timings: dict[str, float]
    files: list[Path] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)


def warn(lines: Iterable[str]) -> list[str]:
    """Logs warnings, and returns them."""
    warnings = list(lines)
    for line in warnings:
        logging.warning("%s", line)
    return warnings


def bytes_by_dtype(arrays: Any) -> dict[str, int]:
    totals = Counter[str]()
    for array in jax.tree.leaves(arrays):
        totals[jnp.dtype(array.dtype).name] += size_of(array)
    return dict(totals)


class TurboVideoPipeline:
    """Text encoder, transformer (one, or two experts), VAE and image encoder, loaded once and used for many videos."""

    def __init__(
        self,
        transformer: WanModel | Streamed | Experts,
        vae: WanVAE,
        text: TextEncoder,
        *,
        clip: CLIPVision | None = None,
        programs: CompiledPrograms | None = None,
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
        self._programs = programs or CompiledPrograms()

    @property
    def config(self) -> WanConfig:
        """Configuration of the transformer; experts have the same."""
        return self.experts.config

    @property
    def transformer(self) -> WanModel | Streamed:
        """Returns the transformer, or the expert for high noise; brought to the device if it was not there."""
        return self.experts.activate("high")

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
        prepare: Request | Mapping[str, Any] | None = None,
    ) -> "TurboVideoPipeline":
        """Loads published or converted checkpoints; None follows what the checkpoint says.

        path_or_repo: a transformer file, a folder or a Hugging Face repository; of two experts, either one's file finds
          the other. The other options, but for prepare, are those of `LoadOptions`, described there.
        prepare: the first call, a request or some of its fields, such as `dict(height=720, width=1280)`; memory "auto"
          is planned for it, and what it runs is compiled while the weights load.

        Raises UserError or CheckpointError with one sentence for what cannot be found or does not fit.
        """
        given = fields_of(LoadOptions, locals()) | {"weights": path_or_repo, "loras": tuple(loras)}
        return cls.load(LoadOptions(**given), prepare=prepare)

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
        prepare: Request | Mapping[str, Any] | None = None,
    ) -> "TurboVideoPipeline":
        """Generates the weights of a network at full size, for benchmarks: it makes noise, not videos.

        model: a name of `turbojax.models.published.MODELS`. Other options as `from_pretrained` takes them.
        """
        given = fields_of(LoadOptions, locals()) | {"weights": "random", "tokenizer": None}
        return cls.load(LoadOptions(**given), prepare=prepare, tokenizer=tokenizer, seed=seed)

    @classmethod
    def load(
        cls,
        options: LoadOptions,
        *,
        prepare: Request | Mapping[str, Any] | None = None,
        tokenizer: Tokenizer | None = None,
        seed: int = 0,
    ) -> "TurboVideoPipeline":
        """Loads what the options name; prepare and errors as `from_pretrained`; tokenizer, seed: of random weights."""
        start = time.perf_counter()
        request = prepare if isinstance(prepare, Request) else Request(**(prepare or {}))
        if options.weights != "random":
            source = open_published(options)
        elif tokenizer is None:
            raise UserError("random weights need a tokenizer; give one")
        else:
            source = open_random(options, tokenizer, seed=seed)
        programs = CompiledPrograms()
        with programs.needed():
            experts, vae, clip = load(source, options, request, programs, ahead=prepare is not None)
            pipe = cls(experts, vae, source.text, clip=clip, programs=programs)
        pipe.memory = options.memory
        jax.block_until_ready((pipe.experts.arrays_by_memory(), arrays_by_memory(pipe.vae)))
        pipe.load_seconds = time.perf_counter() - start
        if slow := slow_gpu(compute_capability()):
            logging.warning(slow)
        c = pipe.config
        logging.info(
            "Loaded %s in %.1f s: %d layers of width %d, %s linear layers, %s attention",
            source.name,
            pipe.load_seconds,
            c.num_layers,
            c.dim,
            f"int8 ({c.quant.scheme})" if c.quant else jnp.dtype(c.dtype).name,
            c.attention_type + ("" if c.attention_type == "original" else f" (topk {c.sla_topk})"),
        )
        return pipe

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
        sampler: SamplerName | Sampler = "rcm",
        sigma_max: float | None = None,
        ode: bool = False,
        shift: float = 5.0,
        sla_topk: float | None = None,
        seed: int = 0,
        num_samples: int = 1,
        sample_index: int = 0,
        latents: jax.Array | np.ndarray | None = None,
        noise: jax.Array | np.ndarray | None = None,
        output: str | Path | None = None,
        fps: int = 16,
        vae_tiling: TilingName = "auto",
        progress: Progress = no_progress,
    ) -> VideoOutput:
        """Makes num_samples videos of each prompt; all but progress are the fields of a `Request`, described there.

        progress and errors: see `generate`.
        """
        return self.generate(Request(**fields_of(Request, locals())), progress=progress)

    def generate(self, request: Request, *, progress: Progress = no_progress) -> VideoOutput:
        """Makes the videos of a request.

        progress: called with a stage's name and the fraction of it that is done, as stages begin, after decoded chunks
          and before the steps of a streamed transformer. What it raises ends the call; no file is left then.

        Raises UserError for what the networks cannot make, where memory is short (the sentence says what to change),
        and where the network returns NaN.
        """
        with out_of_memory(lambda: suggestion(self.plan(request, exact=False), self.configs)):
            request.check(self.configs)
            warnings = warn(request.remarks())
            prompts = [*request.prompts, request.negative_prompt or ""] if request.guided else request.prompts
            warnings += self.text.cut(prompts)  # logged when they are read
            self._clock.take()  # what a call that failed has left
            self._clock.progress = progress
            text, negative = self._embed_prompts(request)
            images = self._encode_images(request)
            with self._clock.stage("compile"):
                self._programs.wait("noise")
                arguments = sampler_arguments(request, self.configs, text, negative=negative, images=images)
            clean = self._sample(request, arguments)
            latents = np.asarray(clean)
            if not np.isfinite(latents).all():
                raise UserError("the network returned NaN or infinity; check the checkpoint, or try dtype float32")
            videos = self._decode(request, latents)
            warnings += warn(video_checks.warnings(videos))
            written = [file for path in request.outputs for file in files_of(path, request.num_frames)]
            return VideoOutput(videos, clean, self._clock.take(), written, warnings)

    def _embed_prompts(self, request: Request) -> tuple[jax.Array, jax.Array | None]:
        """Returns embeddings `[B, 512, D]` of the prompts and, with guidance, of the negative prompt."""
        with self._clock.stage("compile"):
            self._programs.wait("text")
        with self._clock.stage("text"):
            text = jax.device_put(np.repeat(self.text(request.prompts), request.num_samples, axis=0))
            if not request.guided:
                return text, None
            return text, jax.device_put(np.repeat(self.text([request.negative_prompt or ""]), request.batch, axis=0))

    def _encode_images(self, request: Request) -> dict[str, jax.Array]:
        """Encodes the images for the transformer, by networks that are on the device meanwhile."""
        if not request.pictures:
            return {}
        with self._clock.stage("compile"):
            self._programs.wait("image")
        with self._clock.stage("image"):
            width, height = request.size
            vae, clip = to_device(self.vae), to_device(self.clip) if self.clip else None
            sizes = dict(num_frames=request.num_frames, width=width, height=height)
            return jax.block_until_ready(image_inputs(vae, clip, request.pictures, **sizes))

    def _sample(self, request: Request, arguments: tuple) -> jax.Array:
        """Takes the steps by the networks that make them; compiled once for each part, configuration and shape."""
        sampler, sla_topk = request.sampler_for(self.config), request.sla_topk
        ranges = self.experts.step_ranges(sampler)
        programs: list[Any] = [None] * len(ranges)
        if not self.experts.streamed:
            network = with_topk(self.experts.with_offloading(wan_skeleton(self.config).abstract()), sla_topk)
            with self._clock.stage("compile"):
                programs = [self._programs.get(*sampler_program(sampler, p, network, arguments)) for _, p in ranges]
        latents, *rest = arguments
        for i, ((name, steps), program) in enumerate(zip(ranges, programs, strict=True)):
            with self._clock.stage("experts") if self.experts.swap_experts else nullcontext():
                transformer = with_topk(self.experts.activate(name), sla_topk)
                if self.experts.swap_experts and i + 1 < len(ranges):
                    self.experts.prefetch(ranges[i + 1][0], self.experts.free_beside(program))
            with self._clock.stage("diffusion"):
                if isinstance(transformer, Streamed):
                    shares = iter(np.arange(*steps) / sampler.num_steps)
                    make_velocity = functools.partial(streamed, transformer, functools.partial(self._step, shares))
                    latents = denoise(make_velocity, sampler, steps, latents, *rest, scan=False)
                else:
                    latents = program(nnx.state(transformer), latents, *rest)
                latents.block_until_ready()
        return latents

    def _step(self, shares: Iterator[float]) -> None:
        """Reports the progress before a step."""
        self._clock.progress("diffusion", float(next(shares)))

    def _decode(self, request: Request, latents: np.ndarray) -> np.ndarray:
        """Decodes latents `[B, t, h, w, c]` to uint8 `[B, T, H, W, 3]`, written to the outputs as their frames come."""
        with self._clock.stage("compile"):
            self._programs.wait("vae")
        self.experts.release()
        with self._clock.stage("vae"):
            vae = to_device(self.vae)
        _, _, h, w, _ = latents.shape
        tiled = needs_tiling(vae, h, w, request.vae_tiling, limit=parse(self.memory, None)[1])
        width, height = request.size
        shape = (request.num_frames, height, width, 3)
        videos = np.empty((len(latents), *shape), np.uint8)
        done = 0
        for latent, video, output in itertools.zip_longest(latents, videos, request.outputs):
            writing = open_video(output, shape, request.fps) if output else nullcontext(None)
            with self._clock.stage("file"), writing as append, self._clock.stage("vae"):
                start = 0
                for frames in decode(vae, latent, tiled=tiled):
                    video[start : start + len(frames)] = frames
                    start += len(frames)
                    done += len(frames)
                    if append:
                        append(frames)
                    self._clock.progress("vae", done / (len(videos) * shape[0]))
        return videos

    @property
    def configs(self) -> ModelConfigs:
        """Configurations of the networks."""
        clip = self.clip.config if self.clip else None
        return ModelConfigs(self.config, self.vae.config, self.text.config, clip, len(self.experts.names))

    def plan(
        self, request: Request | None = None, *, memory: str | float | None = None, exact: bool = True, **settings: Any
    ) -> Plan:
        """Plans what a call will need of the device, stage by stage; print it.

        settings: the request's fields, in its place. memory: as `from_pretrained` takes it, for what that would choose;
        None for the weights where they are. exact: on a GPU, compile the call's programs (half a minute) instead of
        estimating. Raises UserError for impossible sizes and settings.
        """
        request = request or Request(**settings)
        residency = None
        if memory is None:
            memory = self.memory
            residency = Residency(
                idle_offloaded=bool(arrays_by_memory(self.vae).host),
                text_streamed=self.text.streamed,
                swap_experts=self.experts.swap_experts,
                transformer_streamed=self.experts.streamed,
            )
        return plan_call(self.configs, request, memory, residency=residency, exact=exact)

    def memory_report(self) -> dict[str, dict[str, int]]:
        """Measures bytes by component and dtype; "host" has the token table and what is not on the device."""
        encoder = self.text.encoder if self.text.loaded else None
        modules = {"vae": self.vae, "text_encoder": encoder, "image_encoder": self.clip}
        where = {"transformer": self.experts.arrays_by_memory()}
        none = ArraysByMemory([], [])
        where |= {name: arrays_by_memory(part) if part else none for name, part in modules.items()}
        report = {name: bytes_by_dtype(arrays.device) for name, arrays in where.items()}
        return report | {"host": bytes_by_dtype((self.text.table, *(arrays.host for arrays in where.values())))}

    def save_video(self, video: np.ndarray, path: str | Path, fps: int = 16) -> list[Path]:
        """Writes one video, uint8 `[T, H, W, 3]`, as .mp4, .gif or numbered .png; see `media.video.save_video`."""
        return save_video(video, path, fps)

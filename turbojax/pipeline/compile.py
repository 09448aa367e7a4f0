"""A call of the pipeline in shapes: what it compiles, and where weights go for it."""

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
from absl import logging

from turbojax.diffusion import Sampler
from turbojax.errors import UserError
from turbojax.memory.estimates import Residency, Workload
from turbojax.memory.experts import BOUNDARY, NAMES, Experts
from turbojax.memory.planner import Plan, device_limit, parse, plan
from turbojax.models import vae as vae_model
from turbojax.models.image_condition import compile_still, image_shapes, read_images, video_shape
from turbojax.models.offload import offload_embeddings
from turbojax.models.published import ModelConfigs
from turbojax.models.tiling import compile_tiles
from turbojax.models.umt5 import TEXT_LEN
from turbojax.models.vae import WanVAE
from turbojax.models.wan import WanModel
from turbojax.pipeline.decode import check_tiling
from turbojax.pipeline.denoise import (
    beyond_training,
    first_noise_level,
    first_state,
    latent_shape,
    make_sampler,
    sampler_arguments,
    sampler_program,
    with_topk,
)
from turbojax.pipeline.text import TextEncoder
from turbojax.weights.skeleton import wan_skeleton


class Programs:
    """Compiled programs by name; each is built once, here or ahead of time in a thread."""

    def __init__(self):
        self._futures: dict[Hashable, Future] = {}
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="compile")

    def __len__(self) -> int:
        return len(self._futures)

    def start(self, name: Hashable, build: Callable[[], Any]) -> None:
        """Builds a program in the background; what building raises is raised by `get`."""
        self._futures[name] = self._pool.submit(build)

    def get(self, name: Hashable, build: Callable[[], Any]) -> Any:
        """The program, once it is there; built now if it was not started."""
        if name not in self._futures:
            future: Future = Future()
            future.set_result(build())
            self._futures[name] = future
        return self._futures[name].result()

    def wait(self, name: Hashable) -> None:
        """Waits for a program that was started; of use for what ends up in a cache of JAX's."""
        if name in self._futures:
            self._futures[name].result()

    @contextmanager
    def needed(self) -> Iterator[None]:
        """If the block raises, programs that still wait for a thread are not begun: nobody will call them."""
        try:
            yield
        except BaseException:
            self._pool.shutdown(wait=False, cancel_futures=True)
            raise


class Call(NamedTuple):
    """A call of the pipeline in shapes; arguments: what `sample` takes besides the network."""

    sampler: Sampler
    arguments: tuple
    sla_topk: float | None
    vae_tiling: str

    @classmethod
    def of(cls, configs: ModelConfigs, settings: Mapping[str, Any]) -> "Call":
        """settings: all that `TurboVideoPipeline.__call__` takes; see `turbojax.pipeline.pipeline.abstract_call`."""
        c, network = settings, configs.transformer
        prompts = [c["prompt"]] if isinstance(c["prompt"], str) else c["prompt"]
        batch = len(prompts) * c["num_samples"]
        images = [] if c["image"] is None else read_images(network, c["image"], c["last_image"], c["background"])
        width, height = video_shape(c["width"], c["height"], images, adaptive=c["adaptive_size"])
        shape = (batch, *latent_shape(configs.vae, c["num_frames"], height, width))
        sampler = make_sampler(
            c["sampler"],
            num_steps=c["num_inference_steps"],
            sigma_max=first_noise_level(network, c["sigma_max"]),
            **{name: c[name] for name in ("ode", "shift")},
        )
        embedding = jax.ShapeDtypeStruct((batch, TEXT_LEN, configs.text.dim), configs.text.dtype)
        guided = c["guidance_scale"] != 1.0
        options = {name: c[name] for name in ("guidance_scale", "seed", "sample_index", "latents", "noise")}

        def arguments(embedding: jax.Array, images: dict[str, jax.Array]) -> tuple:
            negative = embedding if guided else None
            return sampler_arguments(sampler, shape, embedding, negative=negative, images=images, **options)

        check_tiling(c["vae_tiling"])
        inputs = image_shapes(network, configs.vae, (1, *shape[1:]))
        return cls(sampler, jax.eval_shape(arguments, embedding, inputs), c["sla_topk"], c["vae_tiling"])

    @property
    def workload(self) -> Workload:
        latents, _, negative, *_ = self.arguments
        return Workload(latents.shape[1:], latents.shape[0], negative is not None, self.vae_tiling)


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
        network = with_topk(experts.with_offloading(transformer), call.sla_topk)
        for _, steps in experts.step_ranges(call.sampler):
            programs.start(*sampler_program(call.sampler, steps, network, call.arguments))
    programs.start("noise", lambda: first_state(call.sampler, call.arguments[0].shape, 0))
    programs.start("text", text.compile)
    if call.arguments[-1]:
        programs.start("image", lambda: compile_still(vae, *call.workload.pixels(vae.config)))
    compile_vae = compile_tiles if residency.vae_tiled else vae_model.compile_decoding
    programs.start("vae", lambda: compile_vae(vae, (1, *call.workload.latents), as_uint8=True))


def plan_call(
    configs: ModelConfigs,
    call: Call,
    memory: str | float = "auto",
    *,
    residency: Residency | None = None,
    exact: bool | None = None,
) -> Plan:
    """What a call needs of the device, see `turbojax.memory.planner.plan`.

    residency: where weights are already, None to choose. exact: compile the programs, which takes the GPU's compiler
    half a minute; None where the estimate is near the limit; without a GPU, it is an estimate either way.
    """

    def compile_sampler(embeddings_offloaded: bool) -> Any:
        transformer = wan_skeleton(configs.transformer).abstract()
        if embeddings_offloaded:
            transformer = offload_embeddings(transformer)
        steps = 0, call.sampler.num_steps
        return sampler_program(call.sampler, steps, with_topk(transformer, call.sla_topk), call.arguments)[1]()

    options: dict[str, Any] = dict(memory=memory, limit=device_limit(), residency=residency)
    found = plan(configs, call.workload, **options)
    if jax.default_backend() == "gpu" and exact is not False and not (exact is None and found.estimate_suffices):
        found = plan(configs, call.workload, compile_sampler=compile_sampler, **options)
    note = beyond_training(1 + (call.workload.latents[0] - 1) * configs.vae.temporal_factor)
    return dataclasses.replace(found, notes=(note,)) if note else found


def settle(configs: ModelConfigs, call: Call, memory: str | float) -> Residency:
    """Where weights go for this call; raises UserError where nothing fits."""
    mode, limit = parse(memory, device_limit())
    if mode != "auto" or limit is None:
        return dataclasses.replace(Residency.from_mode(mode), vae_tiled=call.vae_tiling == "on")
    found = plan_call(configs, call, memory)
    if not found.fits:
        raise UserError(found.reasons[-1])
    if found.residency != Residency():
        logging.info(" ".join(found.reasons))
    return found.residency


def arrange(configs: ModelConfigs, residency: Residency, memory: str | float, *, boundary: float = BOUNDARY) -> Experts:
    """Where the plan wants one or two transformers, which are still to be added."""
    return Experts(
        names=NAMES if configs.transformers > 1 else NAMES[:1],
        boundary=boundary,
        swap_experts=residency.swap_experts and not residency.transformer_streamed,
        embeddings_offloaded=residency.embeddings_offloaded,
        limit=parse(memory, device_limit())[1],
    )

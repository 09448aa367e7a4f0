"""The compiled programs of a pipeline, and those of a call ahead of time."""

from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from turbojax.memory.estimates import Residency
from turbojax.memory.experts import Experts
from turbojax.models import vae as vae_model
from turbojax.models.image_condition import compile_still, takes_images
from turbojax.models.published import ModelConfigs
from turbojax.models.tiling import compile_tiles
from turbojax.pipeline.denoise import abstract_arguments, first_state, sampler_program, with_topk
from turbojax.pipeline.request import Request
from turbojax.pipeline.text import TextEncoder
from turbojax.weights.skeleton import vae_skeleton, wan_skeleton


class CompiledPrograms:
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
        """Returns the program, once it is there; built now if it was not started."""
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
        """Cancels the programs that still wait for a thread if the block raises: nobody will call them."""
        try:
            yield
        except BaseException:
            self._pool.shutdown(wait=False, cancel_futures=True)
            raise


def compile_ahead(
    programs: CompiledPrograms,
    experts: Experts,
    text: TextEncoder,
    request: Request,
    configs: ModelConfigs,
    residency: Residency,
) -> None:
    """Starts to compile what a call will run, but for a streamed transformer."""
    vae = vae_skeleton(configs.vae).abstract()
    sampler, workload = request.sampler_for(configs.transformer), request.workload(configs)
    if not residency.transformer_streamed:
        arguments = abstract_arguments(request, configs)
        network = with_topk(experts.with_offloading(wan_skeleton(configs.transformer).abstract()), request.sla_topk)
        for _, steps in experts.step_ranges(sampler):
            programs.start(*sampler_program(sampler, steps, network, arguments))
    programs.start("noise", lambda: first_state(sampler, request.shape(configs.vae), 0))
    programs.start("text", text.compile)
    if takes_images(configs.transformer):
        programs.start("image", lambda: compile_still(vae, *workload.pixels(configs.vae)))
    compile_vae = compile_tiles if residency.vae_tiled else vae_model.compile_decoding
    programs.start("vae", lambda: compile_vae(vae, (1, *workload.latents), as_uint8=True))

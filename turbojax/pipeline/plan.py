"""The memory plan of a call, also before anything is loaded: of checkpoints, names and shapes are read."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from absl import logging

from turbojax.errors import UserError
from turbojax.files import user_path
from turbojax.memory.estimates import Residency
from turbojax.memory.planner import Plan, device_limit, parse, plan
from turbojax.models.offload import offload_embeddings
from turbojax.models.published import MODELS, TWO_EXPERTS, ModelConfigs, known_network, published_configs
from turbojax.models.wan import WanConfig
from turbojax.pipeline.denoise import abstract_arguments, sampler_program, with_topk
from turbojax.pipeline.options import LoadOptions
from turbojax.pipeline.request import Request, beyond_training
from turbojax.weights import files
from turbojax.weights.encoders import open_umt5, open_vae
from turbojax.weights.load import open_wan
from turbojax.weights.skeleton import wan_skeleton


def plan_call(
    configs: ModelConfigs,
    request: Request,
    memory: str | float = "auto",
    *,
    residency: Residency | None = None,
    exact: bool | None = None,
) -> Plan:
    """Plans what a call needs of the device, see `turbojax.memory.planner.plan`.

    residency: where weights are already, None to choose. exact: compile the programs, which takes the GPU's compiler
    half a minute; None where the estimate is near the limit; without a GPU, it is an estimate either way.
    """

    def compile_sampler(embeddings_offloaded: bool) -> Any:
        transformer = wan_skeleton(configs.transformer).abstract()
        if embeddings_offloaded:
            transformer = offload_embeddings(transformer)
        sampler, arguments = request.sampler_for(configs.transformer), abstract_arguments(request, configs)
        transformer = with_topk(transformer, request.sla_topk)
        return sampler_program(sampler, (0, sampler.num_steps), transformer, arguments)[1]()

    workload = request.workload(configs)
    options: dict[str, Any] = dict(memory=memory, limit=device_limit(), residency=residency)
    found = plan(configs, workload, **options)
    if jax.default_backend() == "gpu" and exact is not False and not (exact is None and found.estimate_suffices):
        found = plan(configs, workload, compile_sampler=compile_sampler, **options)
    note = beyond_training(request.num_frames)
    return dataclasses.replace(found, notes=(note,)) if note else found


def choose_placement(configs: ModelConfigs, request: Request, memory: str | float) -> Residency:
    """Chooses where weights go for this call; raises UserError where nothing fits."""
    mode, limit = parse(memory, device_limit())
    if mode != "auto" or limit is None:
        return dataclasses.replace(Residency.from_mode(mode), vae_tiled=request.vae_tiling == "on")
    found = plan_call(configs, request, memory)
    if not found.fits:
        raise UserError(found.reasons[-1])
    if found.residency != Residency():
        logging.info(" ".join(found.reasons))
    return found.residency


def plan_unloaded(options: LoadOptions, request: Request, *, exact: bool | None = True) -> Plan:
    """Plans a call without loading anything; exact as `plan_call` takes it."""
    return plan_call(find_configs(options), request, options.memory, exact=exact)


def find_configs(options: LoadOptions) -> ModelConfigs:
    """Returns the configurations of the networks.

    A repository whose name has a known network in it is not downloaded: it is taken for that network, with SLA if it is
    TurboDiffusion's.
    """
    path = user_path(options.weights)
    folder = files.open_repository(path) if path.exists() else None
    if options.weights == "random":
        stored, two = known_network(options.model), options.model in TWO_EXPERTS
    elif folder is None and (known := published(str(options.weights))):
        stored, two = known
    else:
        high, low = files.find_networks(options.weights, quantized=options.quant_linear)
        stored, two = open_wan(high).config, low is not None
    configs = published_configs(options.apply(stored), two=two)
    if vae := component("vae", options.vae, folder):
        configs = configs._replace(vae=open_vae(vae, dtype=options.dtype).skeleton.abstract().config)
    if text := component("text_encoder", options.text_encoder, folder):
        configs = configs._replace(text=open_umt5(text, dtype=options.dtype).skeleton.abstract().config)
    return configs


def component(name: str, given: str | Path | None, folder: files.Repository | None) -> Path | None:
    """Finds a local file of a component, or None: then it is the published one."""
    if given:
        return files.component_path(given, name)
    return files.find(folder, name) if folder else None


def published(repository: str) -> tuple[WanConfig, bool] | None:
    """Returns the network in a repository's name, as in TurboDiffusion/TurboWan2.1-T2V-14B-720P, and if it is two."""
    for name, config in MODELS.items():
        if name in repository.lower():
            attention_type = "sla" if "turbo" in repository.lower() else "original"
            return config(attention_type=attention_type), name in TWO_EXPERTS
    return None

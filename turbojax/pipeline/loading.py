"""From checkpoints, or from generated weights, to what a pipeline is made of."""

import functools
from typing import NamedTuple

import jax
from absl import logging

from turbojax.errors import UserError
from turbojax.memory.experts import Experts
from turbojax.memory.planner import loading_suggestion, out_of_memory
from turbojax.models.clip import CLIPVision, clip_dtype
from turbojax.models.offload import arrays_by_memory, to_device, to_host
from turbojax.models.published import TWO_EXPERTS, ModelConfigs, known_network, published_configs
from turbojax.models.tokenizer import Tokenizer
from turbojax.models.vae import WanVAE
from turbojax.models.wan import WanConfig
from turbojax.pipeline.compile import CompiledPrograms, compile_ahead
from turbojax.pipeline.options import LoadOptions
from turbojax.pipeline.plan import choose_placement, make_experts
from turbojax.pipeline.program_cache import use_compilation_cache
from turbojax.pipeline.request import Request
from turbojax.pipeline.text import TextEncoder
from turbojax.weights import files
from turbojax.weights.encoders import load_encoder, open_clip, open_vae
from turbojax.weights.io import read_tensors
from turbojax.weights.load import load_wan, open_wan
from turbojax.weights.lora import Expert
from turbojax.weights.random import random_module, random_token_table
from turbojax.weights.skeleton import clip_skeleton, umt5_skeleton, vae_skeleton, wan_skeleton


class Loaded(NamedTuple):
    """Networks of a pipeline. name: of what was loaded; the others as `TurboVideoPipeline` takes them."""

    name: str
    experts: Experts
    vae: WanVAE
    text: TextEncoder
    clip: CLIPVision | None
    programs: CompiledPrograms


def load_published(options: LoadOptions, request: Request, *, ahead: bool) -> Loaded:
    """Loads checkpoints.

    request: the first call. ahead: compile what it runs while the weights load.
    """
    high, low = files.find_networks(options.weights, quantized=options.quant_linear)
    # Names only: a bad file shows before anything is downloaded.
    config = options.apply(open_wan(high).config)
    warn_of_no_effect(config, options)
    dtype, loras = config.dtype, options.loras
    if low is None and (single := [lora for lora in loras if lora.expert]):
        raise UserError(f"{single[0].path} is for an expert, and {high.name} is the only network; give it for all")
    for lora in loras:
        read_tensors(lora.path)
    wanted = {"vae": options.vae, "text_encoder": options.text_encoder, "tokenizer": options.tokenizer}
    wanted |= {"image_encoder": options.image_encoder} if config.clip_dim else {}
    where = files.find_components(files.open_repository(options.weights), wanted)
    use_compilation_cache()
    text = TextEncoder.from_files(where["text_encoder"], where["tokenizer"], dtype=dtype, cache=options.cache_prompts)
    vae_file, programs = open_vae(where["vae"], dtype=dtype), CompiledPrograms()
    clip_file = open_clip(where["image_encoder"], dtype=clip_dtype(dtype)) if config.clip_dim else None
    abstract_vae = vae_file.skeleton.abstract()
    configs = ModelConfigs(
        config,
        abstract_vae.config,
        text.config,
        clip_file.skeleton.abstract().config if clip_file else None,
        1 if low is None else 2,
    )
    residency = choose_placement(configs, request, options.memory)
    text.streamed, streamed = residency.text_streamed, residency.transformer_streamed
    place = to_host if residency.idle_offloaded else to_device
    experts = make_experts(configs, residency, options.memory, boundary=options.boundary)
    if ahead:
        compile_ahead(programs, experts, text, request, configs, residency)
    with programs.needed(), out_of_memory(lambda: loading_suggestion(configs)):
        if low is not None:
            experts.add("low", load_wan(low, options, loras=loras, expert="low", streamed=streamed))
        expert: Expert | None = "high" if low else None
        experts.add("high", load_wan(high, options, loras=loras, expert=expert, streamed=streamed))
        clip = place(load_encoder(clip_file)) if clip_file else None
        network = place(load_encoder(vae_file))
    name = high.name if low is None else f"{high.name} and {low.name}"
    return Loaded(name, experts, network, text, clip, programs)


def load_random(options: LoadOptions, tokenizer: Tokenizer, request: Request, *, ahead: bool, seed: int = 0) -> Loaded:
    """Generates the weights of a network at full size; request and ahead as `load_published` takes them."""
    model = options.model
    config = options.apply(known_network(model))
    warn_of_no_effect(config, options)
    logging.warning("Weights are random: %s at full size, for measuring. The video will be noise.", model)
    use_compilation_cache()
    configs = published_configs(config, two=model in TWO_EXPERTS)
    transformer, vae, encoder = wan_skeleton(config), vae_skeleton(configs.vae), umt5_skeleton(configs.text)
    programs = CompiledPrograms()
    residency = choose_placement(configs, request, options.memory)
    streamed, experts = residency.transformer_streamed, make_experts(configs, residency, options.memory)
    place = to_host if residency.idle_offloaded else to_device
    table = random_token_table(tokenizer.vocab_size, configs.text.dim, config.dtype, seed=seed)
    generate = functools.partial(random_module, seed=seed)
    load = functools.partial(generate, encoder, what="random umT5")
    text = TextEncoder(tokenizer, encoder.abstract(), table, load, streamed=residency.text_streamed)
    if ahead:
        compile_ahead(programs, experts, text, request, configs, residency)
    with programs.needed(), out_of_memory(lambda: loading_suggestion(configs)):
        for i, name in enumerate(reversed(experts.names)):
            experts.add(name, random_module(transformer, seed=seed + i, what=f"random {model}", streamed=streamed))
        clip = place(generate(clip_skeleton(configs.clip), what="random CLIP")) if configs.clip else None
        network = place(generate(vae, what="random VAE"))
        jax.block_until_ready(arrays_by_memory(text.encoder))
    return Loaded(f"random {model}", experts, network, text, clip, programs)


def warn_of_no_effect(config: WanConfig, options: LoadOptions) -> None:
    """Warns of options that the network's attention does not have."""
    line = "%s=%s has no effect with attention_type=%s, only with %s"
    if options.sla_topk is not None and config.attention_type not in ("sla", "sagesla"):
        logging.warning(line, "sla_topk", options.sla_topk, config.attention_type, "sla or sagesla")
    if options.sage_values is not None and config.attention_type != "sagesla":
        logging.warning(line, "sage_values", options.sage_values, config.attention_type, "sagesla")

"""From checkpoints, or from generated weights, to what a pipeline is made of."""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
from absl import logging

from turbojax.errors import UserError
from turbojax.memory.experts import NAMES, Experts
from turbojax.memory.planner import device_limit, loading_suggestion, out_of_memory, parse
from turbojax.models.clip import CLIPVision, clip_dtype
from turbojax.models.offload import Streamed, arrays_by_memory, to_device, to_host
from turbojax.models.published import TWO_EXPERTS, ModelConfigs, known_network, published_configs
from turbojax.models.tokenizer import Tokenizer
from turbojax.models.vae import WanVAE
from turbojax.models.wan import WanConfig, WanModel
from turbojax.pipeline.compile import CompiledPrograms, compile_ahead
from turbojax.pipeline.options import LoadOptions
from turbojax.pipeline.plan import choose_placement
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


class Source(NamedTuple):
    """Place that the networks of a pipeline are loaded from; experts are loaded in the order of the names."""

    name: str
    configs: ModelConfigs
    text: TextEncoder
    experts: Mapping[Expert, Callable[..., WanModel | Streamed]]
    vae: Callable[[], WanVAE]
    clip: Callable[[], CLIPVision] | None


def open_published(options: LoadOptions) -> Source:
    """Finds and checks the files of checkpoints; a bad one shows before anything is downloaded."""
    high, low = files.find_networks(options.weights, quantized=options.quant_linear)
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
    vae = open_vae(where["vae"], dtype=dtype)
    clip = open_clip(where["image_encoder"], dtype=clip_dtype(dtype)) if config.clip_dim else None
    vae_config, clip_config = vae.skeleton.abstract().config, clip.skeleton.abstract().config if clip else None
    configs = ModelConfigs(config, vae_config, text.config, clip_config, 1 if low is None else 2)
    name = high.name if low is None else f"{high.name} and {low.name}"
    load = functools.partial(load_wan, options=options, loras=loras)
    experts: dict[Expert, Callable] = {"high": functools.partial(load, high, expert="high" if low else None)}
    if low is not None:
        experts = {"low": functools.partial(load, low, expert="low"), **experts}
    load_clip = functools.partial(load_encoder, clip) if clip else None
    return Source(name, configs, text, experts, functools.partial(load_encoder, vae), load_clip)


def open_random(options: LoadOptions, tokenizer: Tokenizer, *, seed: int = 0) -> Source:
    """Takes generated weights of a network at full size."""
    model = options.model
    config = options.apply(known_network(model))
    warn_of_no_effect(config, options)
    logging.warning("Weights are random: %s at full size, for measuring. The video will be noise.", model)
    use_compilation_cache()
    configs = published_configs(config, two=model in TWO_EXPERTS)
    encoder = umt5_skeleton(configs.text)
    table = random_token_table(tokenizer.vocab_size, configs.text.dim, config.dtype, seed=seed)
    make = functools.partial(random_module, seed=seed)
    text = TextEncoder(tokenizer, encoder.abstract(), table, functools.partial(make, encoder, what="random umT5"))
    make_wan = functools.partial(random_module, wan_skeleton(config), what=f"random {model}")
    names = reversed(NAMES[: configs.transformers])
    experts = {name: functools.partial(make_wan, seed=seed + i) for i, name in enumerate(names)}
    vae = functools.partial(make, vae_skeleton(configs.vae), what="random VAE")
    clip = functools.partial(make, clip_skeleton(configs.clip), what="random CLIP") if configs.clip else None
    return Source(f"random {model}", configs, text, experts, vae, clip)


def load(
    source: Source, options: LoadOptions, request: Request, programs: CompiledPrograms, *, ahead: bool
) -> tuple[Experts, WanVAE, CLIPVision | None]:
    """Loads the networks to where they are kept.

    request: the first call. ahead: compile what it runs while the weights load.
    """
    configs, text = source.configs, source.text
    residency = choose_placement(configs, request, options.memory)
    text.streamed = residency.text_streamed
    place = to_host if residency.idle_offloaded else to_device
    experts = Experts(
        names=NAMES[: configs.transformers],
        boundary=options.boundary,
        swap_experts=residency.swap_experts and not residency.transformer_streamed,
        embeddings_offloaded=residency.embeddings_offloaded,
        limit=parse(options.memory, device_limit())[1],
    )
    if ahead:
        compile_ahead(programs, experts, text, request, configs, residency)
    with out_of_memory(lambda: loading_suggestion(configs)):
        for name, load_expert in source.experts.items():
            experts.add(name, load_expert(streamed=residency.transformer_streamed))
        clip = place(source.clip()) if source.clip else None
        vae = place(source.vae())
        if options.weights == "random":
            jax.block_until_ready(arrays_by_memory(text.encoder))
    return experts, vae, clip


def warn_of_no_effect(config: WanConfig, options: LoadOptions) -> None:
    """Warns of options that the network's attention does not have."""
    line = "%s=%s has no effect with attention_type=%s, only with %s"
    if options.sla_topk is not None and config.attention_type not in ("sla", "sagesla"):
        logging.warning(line, "sla_topk", options.sla_topk, config.attention_type, "sla or sagesla")
    if options.sage_values is not None and config.attention_type != "sagesla":
        logging.warning(line, "sage_values", options.sage_values, config.attention_type, "sagesla")

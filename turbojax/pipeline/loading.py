"""From checkpoints, or from generated weights, to what a pipeline is made of."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
from turbojax.pipeline.plan import choose_placement, make_experts
from turbojax.pipeline.program_cache import use_compilation_cache
from turbojax.pipeline.request import Request
from turbojax.pipeline.text import TextEncoder
from turbojax.weights import files
from turbojax.weights.encoders import load_encoder, open_clip, open_vae
from turbojax.weights.io import read_tensors
from turbojax.weights.load import load_wan, open_wan, with_options
from turbojax.weights.lora import Expert, LoRA
from turbojax.weights.random import random_module, random_token_table
from turbojax.weights.skeleton import clip_skeleton, umt5_skeleton, vae_skeleton, wan_skeleton


class Loaded(NamedTuple):
    """name: of what was loaded; the others as `TurboVideoPipeline` takes them."""

    name: str
    experts: Experts
    vae: WanVAE
    text: TextEncoder
    clip: CLIPVision | None
    programs: CompiledPrograms


def load_published(
    path_or_repo: str | Path,
    given: Mapping[str, str | Path | None],
    request: Request,
    *,
    ahead: bool,
    memory: str | float,
    loras: Sequence[LoRA],
    boundary: float,
    cache_prompts: bool,
    **options: Any,
) -> Loaded:
    """See `TurboVideoPipeline.from_pretrained`; given: paths of the networks around the transformer.

    request: the first call. ahead: compile what it runs while the weights load.
    options: as `turbojax.weights.load.load_wan` takes them.
    """
    high, low = files.find_networks(path_or_repo, quantized=options["quant_linear"])
    # Names only: a bad file shows before anything is downloaded.
    config = with_options(open_wan(high).config, **options)
    tell_no_effect(config, options)
    dtype = config.dtype
    if low is None and (single := [lora for lora in loras if lora.expert]):
        raise UserError(f"{single[0].path} is for an expert, and {high.name} is the only network; give it for all")
    for lora in loras:
        read_tensors(lora.path)
    wanted = {name: path for name, path in given.items() if name != "image_encoder" or config.clip_dim}
    where = files.find_components(files.open_repository(path_or_repo), wanted)
    use_compilation_cache()
    text = TextEncoder.from_files(where["text_encoder"], where["tokenizer"], dtype=dtype, cache=cache_prompts)
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
    residency = choose_placement(configs, request, memory)
    text.streamed, streamed = residency.text_streamed, residency.transformer_streamed
    place = to_host if residency.idle_offloaded else to_device
    experts = make_experts(configs, residency, memory, boundary=boundary)
    if ahead:
        compile_ahead(programs, experts, text, request, configs, residency)
    with programs.needed(), out_of_memory(lambda: loading_suggestion(configs)):
        if low is not None:
            experts.add("low", load_wan(low, loras=loras, expert="low", streamed=streamed, **options))
        expert: Expert | None = "high" if low else None
        experts.add("high", load_wan(high, loras=loras, expert=expert, streamed=streamed, **options))
        clip = place(load_encoder(clip_file)) if clip_file else None
        network = place(load_encoder(vae_file))
    name = high.name if low is None else f"{high.name} and {low.name}"
    return Loaded(name, experts, network, text, clip, programs)


def load_random(
    model: str,
    tokenizer: Tokenizer,
    request: Request,
    *,
    ahead: bool,
    memory: str | float,
    seed: int,
    **options: Any,
) -> Loaded:
    """See `TurboVideoPipeline.random`; request, ahead, options: as `load_published` takes them."""
    config = with_options(known_network(model), **options)
    tell_no_effect(config, options)
    logging.warning("Weights are random: %s at full size, for measuring. The video will be noise.", model)
    use_compilation_cache()
    configs = published_configs(config, two=model in TWO_EXPERTS)
    transformer, vae, encoder = wan_skeleton(config), vae_skeleton(configs.vae), umt5_skeleton(configs.text)
    programs = CompiledPrograms()
    residency = choose_placement(configs, request, memory)
    streamed, experts = residency.transformer_streamed, make_experts(configs, residency, memory)
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


def tell_no_effect(config: WanConfig, options: Mapping[str, Any]) -> None:
    """Warns of options that the network's attention does not have."""
    for name, attentions in (("sla_topk", ("sla", "sagesla")), ("sage_values", ("sagesla",))):
        if options.get(name) is not None and config.attention_type not in attentions:
            effect = (name, options[name], config.attention_type, " or ".join(attentions))
            logging.warning("%s=%s has no effect with attention_type=%s, only with %s", *effect)

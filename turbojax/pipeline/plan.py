"""The memory plan of a call before anything is loaded: of checkpoints, names and shapes are read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from turbojax.files import user_path
from turbojax.memory.planner import Plan
from turbojax.models.published import MODELS, TWO_EXPERTS, ModelConfigs, known_network, published_configs
from turbojax.models.wan import WanConfig
from turbojax.pipeline.compile import plan_call
from turbojax.pipeline.pipeline import abstract_call
from turbojax.weights import files
from turbojax.weights.encoders import open_umt5, open_vae
from turbojax.weights.load import open_wan, with_options


def plan_unloaded(
    path_or_repo: str | Path,
    settings: Mapping[str, Any],
    *,
    memory: str | float = "auto",
    exact: bool | None = True,
    **options: Any,
) -> Plan:
    """What a call with these settings would need; options as `find_configs` takes them, exact as `plan_call`."""
    configs = find_configs(path_or_repo, **options)
    return plan_call(configs, abstract_call(configs, settings), memory, exact=exact)


def find_configs(
    path_or_repo: str | Path,
    *,
    model: str | None = None,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
    dtype: Any = jnp.bfloat16,
    **options: Any,
) -> ModelConfigs:
    """The configurations of the networks; options as `TurboVideoPipeline.from_pretrained` takes them.

    path_or_repo: a file, a folder, a repository, or "random" with `model` the network's name. A repository whose name
    has a known network in it is not downloaded: it is taken for that network, with SLA if it is TurboDiffusion's.
    """
    path = user_path(path_or_repo)
    folder = files.open_repository(path) if path.exists() else None
    if path_or_repo == "random":
        stored, two = known_network(model), model in TWO_EXPERTS
    elif folder is None and (known := published(str(path_or_repo))):
        stored, two = known
    else:
        high, low = files.find_networks(path_or_repo, quantized=options.get("quant_linear"))
        stored, two = open_wan(high).config, low is not None
    where = {"vae": vae, "text_encoder": text_encoder}
    found = {name: component(name, given, folder) for name, given in where.items()}
    configs = published_configs(with_options(stored, dtype=dtype, **options), two=two)
    if found["vae"]:
        configs = configs._replace(vae=open_vae(found["vae"], dtype=dtype).skeleton.abstract().config)
    if found["text_encoder"]:
        configs = configs._replace(text=open_umt5(found["text_encoder"], dtype=dtype).skeleton.abstract().config)
    return configs


def component(name: str, given: str | Path | None, folder: files.Repository | None) -> Path | None:
    """A local file of a component, or None: then it is the published one."""
    if given:
        return files.component_path(given, name)
    return files.find(folder, name) if folder else None


def published(repository: str) -> tuple[WanConfig, bool] | None:
    """The network that a repository's name tells, such as TurboDiffusion/TurboWan2.1-T2V-14B-720P, and if it is two."""
    for name, config in MODELS.items():
        if name in repository.lower():
            attention_type = "sla" if "turbo" in repository.lower() else "original"
            return config(attention_type=attention_type), name in TWO_EXPERTS
    return None

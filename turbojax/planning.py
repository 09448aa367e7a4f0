"""The memory plan of a call before anything is loaded: of checkpoints, names and shapes are read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from turbojax.errors import UserError
from turbojax.memory import Plan
from turbojax.models.umt5 import UMT5Config
from turbojax.models.vae import VAEConfig
from turbojax.models.wan import WanConfig
from turbojax.pipeline import MODELS, Call, find_transformer, plan_call
from turbojax.temporaries import Parts
from turbojax.weights import files
from turbojax.weights.load import open_umt5, open_vae, open_wan, with_options


def plan_unloaded(
    path_or_repo: str | Path,
    settings: Mapping[str, Any],
    *,
    model: str | None = None,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
    memory: str | float = "auto",
    dtype: Any = jnp.bfloat16,
    **options: Any,
) -> Plan:
    """What a call with these settings would need; options as `TurboVideoPipeline.from_pretrained` takes them.

    path_or_repo: a file, a folder, a repository, or "random" with `model` the network's name. A repository whose name
    has a known network in it is not downloaded: it is taken for that network, with SLA if it is TurboDiffusion's.
    """
    path = Path(path_or_repo).expanduser()
    folder = files.open_repository(path) if path.exists() else None
    if path_or_repo == "random":
        if model not in MODELS:
            raise UserError(f"{model=} is unknown; choose one of {', '.join(MODELS)}")
        stored = MODELS[model]()
    elif folder is None and (named := published(str(path_or_repo))):
        stored = named
    else:
        repository = folder or files.open_repository(path_or_repo)
        stored = open_wan(find_transformer(repository, path_or_repo, quantized=options.get("quant_linear"))).config
    where = {"vae": vae, "text_encoder": text_encoder}
    found = {name: component(name, given, folder) for name, given in where.items()}
    parts = Parts(
        with_options(stored, dtype=dtype, **options),
        open_vae(found["vae"], dtype=dtype).skeleton.abstract().config
        if found["vae"]
        else VAEConfig.wan2_1(dtype=dtype),
        open_umt5(found["text_encoder"], dtype=dtype).skeleton.abstract().config
        if found["text_encoder"]
        else UMT5Config.xxl(dtype=dtype),
    )
    return plan_call(parts, Call.of(parts, settings), memory, exact=True)


def component(name: str, given: str | Path | None, folder: files.Repository | None) -> Path | None:
    """A local file of a component, or None: then it is the published one."""
    if given:
        return files.component_path(given, name)
    return files.find(folder, name) if folder else None


def published(repository: str) -> WanConfig | None:
    """The network that a repository's name tells, such as TurboDiffusion/TurboWan2.1-T2V-14B-720P."""
    for name, config in MODELS.items():
        if name in repository.lower():
            return config(attention_type="sla" if "turbo" in repository.lower() else "original")
    return None

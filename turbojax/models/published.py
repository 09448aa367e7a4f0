"""The published networks by name, and the configurations of all networks of a pipeline."""

from collections.abc import Callable
from typing import NamedTuple

from turbojax.errors import UserError
from turbojax.models.clip import CLIPConfig, clip_dtype
from turbojax.models.umt5 import UMT5Config
from turbojax.models.vae import VAEConfig
from turbojax.models.wan import WanConfig

# Networks that `random` builds, by the name a configuration gives.
MODELS: dict[str, Callable[..., WanConfig]] = {
    "wan2.1-t2v-1.3b": WanConfig.t2v_1_3b,
    "wan2.1-t2v-14b": WanConfig.t2v_14b,
    "wan2.1-i2v-14b": WanConfig.i2v_14b,
    "wan2.2-i2v-a14b": WanConfig.i2v_a14b,
}
TWO_EXPERTS = ("wan2.2-i2v-a14b",)


class ModelConfigs(NamedTuple):
    """The configurations of the networks, and how many transformers there are: 2 of Wan 2.2's experts."""

    transformer: WanConfig
    vae: VAEConfig
    text: UMT5Config
    clip: CLIPConfig | None = None
    transformers: int = 1


def known_network(model: str | None) -> WanConfig:
    """Returns the network of a name in MODELS; raises UserError for another."""
    if model not in MODELS:
        raise UserError(f"{model=} is unknown; choose one of {', '.join(MODELS)}")
    return MODELS[model]()


def published_configs(config: WanConfig, *, two: bool) -> ModelConfigs:
    """Returns a transformer, or two, with the published networks around it in its dtype."""
    clip = CLIPConfig.vit_h_14(dtype=clip_dtype(config.dtype)) if config.clip_dim else None
    vae, text = VAEConfig.wan2_1(dtype=config.dtype), UMT5Config.xxl(dtype=config.dtype)
    return ModelConfigs(config, vae, text, clip, 2 if two else 1)

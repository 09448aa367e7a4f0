"""Names that settings of training may have besides files: networks by `model`, drawn videos by `data`."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

import numpy as np

from turbojax.errors import UserError
from turbojax.models.published import MODELS
from turbojax.models.vae import VAEConfig
from turbojax.models.wan import WanConfig
from turbojax.train.toy import toy_config


class Data(Protocol):
    """Batches of this process, without end, from any position on."""

    def __next__(self) -> dict[str, np.ndarray]: ...

    def get_state(self) -> dict[str, int]: ...

    def set_state(self, state: Mapping[str, int]) -> None: ...


class DrawnVideos(Protocol):
    """Videos uint8 `[T, H, W, 3]` that are drawn as training goes, each by its number; it trains an autoencoder."""

    def batches(
        self, *, batch_size: int, share: tuple[int, int], crops: tuple, workers: int, **settings: int
    ) -> AbstractContextManager[Data]:
        """Opens the batches of one of several processes; settings: seed, num_frames, height and width."""

    def videos(self, numbers: Iterable[int], **settings: int) -> list[np.ndarray]:
        """Draws the videos of these numbers."""


@dataclasses.dataclass(frozen=True)
class Registry:
    """Tables of what settings can name."""

    transformers: Mapping[str, Callable[[], WanConfig]]
    autoencoders: Mapping[str, Callable[[], VAEConfig]]
    drawn: Mapping[str, DrawnVideos] = dataclasses.field(default_factory=dict)


PUBLISHED = Registry({**MODELS, "toy": toy_config}, {"wan2.1-vae": VAEConfig.wan2_1})
T = TypeVar("T")


def named(model: str, models: Mapping[str, Callable[[], T]]) -> T:
    """Makes the configuration of this name; raises UserError if there is none."""
    if model not in models:
        raise UserError(f"{model=} is unknown; choose one of {', '.join(models)}")
    return models[model]()

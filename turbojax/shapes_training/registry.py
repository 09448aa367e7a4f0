"""Training with all that settings can name: published networks, and those and the videos of the world of shapes."""

import contextlib
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from turbojax.config import changed
from turbojax.shapes import MODEL
from turbojax.shapes.examples import Batches, examples
from turbojax.shapes.networks import AUTOENCODERS, WANS
from turbojax.train import loop
from turbojax.train.registry import PUBLISHED, Data, Registry


class ShapesVideos:
    """Examples of the world of shapes as `turbojax.train.registry.DrawnVideos`."""

    def batches(self, **settings: Any) -> AbstractContextManager[Data]:
        """Opens batches, whose workers end with them; settings: as `Batches` takes them."""
        return contextlib.closing(Batches(**settings))

    def videos(self, numbers: Iterable[int], **settings: int) -> list[np.ndarray]:
        """Draws the videos of these numbers in this process."""
        return [one.video for one in examples(numbers, workers=0, **settings)]


REGISTRY = Registry(
    {**PUBLISHED.transformers, **WANS}, {**PUBLISHED.autoencoders, **AUTOENCODERS}, {"shapes": ShapesVideos()}
)


def train(config: ConfigDict) -> Path:
    """Runs `turbojax.train.loop.train`; "demo" as vae, text_encoder or tokenizer names those of the shipped model."""
    names = [name for name in ("vae", "text_encoder", "tokenizer") if config.get(name) == "demo"]
    return loop.train(changed(config, **dict.fromkeys(names, str(MODEL))), REGISTRY)

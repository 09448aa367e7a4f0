"""The whole path on any machine, without a download: a tiny model with random weights.

    python scripts/generate.py --config=configs/demo.py

The weights are random, so the video is coloured noise whatever the prompt says. The first run writes the checkpoint
files in the published layouts to the user's cache folder. About 20 seconds on 2 CPU cores, mostly compilation.
"""

from turbojax.config import base_config


def get_config():
    return base_config(
        weights="demo",
        prompt="A red bird in the blue sky",
        output="outputs/demo.mp4",
        height=96,
        width=160,
        num_frames=33,
        dtype="float32",
    )

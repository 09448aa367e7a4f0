"""The small model that comes with the package, on any machine, without a download: see what its prompts can ask for in
turbojax/shapes/model/README.md.

    python scripts/generate.py --config=configs/demo.py
    python scripts/generate.py --config=configs/demo.py --config.prompt="a blue square growing on a white background"

Four steps of a network with SLA and int8 linear layers; 6 seconds on 2 CPU cores that do nothing else, mostly
compilation (benchmarks/cpu/demo.json).
"""

from turbojax.config import base_config


def get_config():
    return base_config(
        weights="demo",
        prompt="a red star moving up right on a checkered background",
        output="outputs/demo.mp4",
        height=128,
        width=128,
        num_frames=33,
        dtype="float32",
    )

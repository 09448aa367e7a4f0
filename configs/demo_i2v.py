"""Image to video on any machine, without a download: two tiny experts with random weights.

    python scripts/generate.py --config=configs/demo_i2v.py

The weights are random, so after the first frame the video is coloured noise whatever the image and the prompt say. The
first run writes the checkpoint files in the published layouts, and a picture, to the user's cache folder.
--config.image=FILE takes another picture. About 30 seconds on 2 CPU cores, mostly compilation.
"""

from turbojax.config import base_config


def get_config():
    config = base_config(weights="demo-i2v", image="demo", sigma_max=200.0, dtype="float32")
    config.update(height=96, width=160, num_frames=33)
    config.update(prompt="The sun goes down over the sea", output="outputs/demo_i2v.mp4")
    return config

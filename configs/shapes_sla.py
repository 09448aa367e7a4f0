"""Step 6 of the small model: its teacher learns to do with a quarter of its attention.

    python scripts/train.py --config=configs/shapes_sla.py

128 x 128 pixels are 64 tokens a latent frame, so a block of 64 keys is one frame, and a quarter is two of nine.
"""

from turbojax.shapes_training.settings import TEACHER, shapes_config


def get_config(size: str = "full"):
    return shapes_config("sla", size, weights=TEACHER, num_steps=1000, learning_rate=3e-4, learning_rate_end=0.1)

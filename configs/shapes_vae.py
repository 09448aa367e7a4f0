"""Step 2 of the small model: an autoencoder with the latents of Wan 2.1's, on drawn videos of the world of shapes.

    python scripts/train.py --config=configs/shapes_vae.py
    python scripts/train.py --config=configs/shapes_vae.py:tiny

scripts/train_shapes.py runs this and all that follows. The second form shows on a CPU in a minute that the way works.
"""

from turbojax.shapes.settings import shapes_config


def get_config(size: str = "full"):
    return shapes_config(
        "vae",
        size,
        weights="random",
        data="shapes",
        num_steps=4000,
        batch_size=8,
        learning_rate=1e-3,
        learning_rate_end=0.05,
        beta2=0.99,
        workers=12,
    )

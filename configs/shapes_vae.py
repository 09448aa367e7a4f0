"""Step 2 of the small model: an autoencoder with the latents of Wan 2.1's, on drawn videos of the world of shapes.

    python scripts/train.py --config=configs/shapes_vae.py
    python scripts/train.py --config=configs/shapes_vae.py:tiny

scripts/train_shapes.py runs this and all that follows. The second form shows on a CPU in a minute that the way works.
"""

from turbojax.shapes_training.settings import shapes_config

# Of about the same number of pixels: from many frames of little to one frame of all.
CROPS = ((5, 48), (9, 40), (5, 48), (17, 32), (5, 48), (1, 128))


def get_config(size: str = "full"):
    return shapes_config(
        "vae",
        size,
        weights="random",
        data="shapes",
        num_steps=6000,
        batch_size=4,
        crops=CROPS,
        dtype="float32",
        optimizer="muon",
        learning_rate=2e-3,
        learning_rate_end=0.03,
        beta2=0.99,
        kl_scale=1e-3,
        clip_norm=0.0,
        log_every=100,
        workers=1,
    )

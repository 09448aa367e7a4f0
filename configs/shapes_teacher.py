"""Step 4 of the small model: a dense network of 9 M parameters learns drawn videos by flow matching.

    python scripts/train.py --config=configs/shapes_teacher.py

Needs the data, outputs/shapes/data, that scripts/train_shapes.py --stages=text,vae,data makes.
"""

from turbojax.shapes.settings import shapes_config


def get_config(size: str = "full"):
    return shapes_config(
        "teacher",
        size,
        weights="random",
        num_steps=24_000,
        batch_size=128,
        optimizer="muon",
        learning_rate=5e-3,
        learning_rate_end=0.05,
        warmup_steps=300,
        beta2=0.99,
        time_mean=0.4,
        time_std=1.3,
    )

"""Step 7 of the small model: distillation of its teacher to 1 to 4 steps.

    python scripts/train.py --config=configs/shapes_rcm.py

The published recipe with what a small network bears: higher learning rates, and half of the steps the student's.
"""

from turbojax.shapes_training.settings import TEACHER, shapes_config


def get_config(size: str = "full"):
    return shapes_config(
        "rcm",
        size,
        weights=TEACHER,
        num_steps=10_000,
        batch_size=32,
        learning_rate=1e-4,
        critic_learning_rate=2e-4,
        beta1=0.0,
        beta2=0.99,
        time_mean=0.7,
        tangent_warmup=400,
        student_every=2,
    )

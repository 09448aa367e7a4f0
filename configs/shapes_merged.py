"""Step 8 of the small model: the distilled network with SLA's difference put on it learns what the dense one does.

    python scripts/train.py --config=configs/shapes_merged.py

Distillation moves a small network so far that the difference, which was learnt on the teacher, no longer fits: bright
frames flash up. Noise levels are those from which few steps start. Needs outputs/shapes/merged/start.safetensors, which
scripts/train_shapes.py --stages=merged makes first.
"""

from turbojax.shapes_training.settings import FOLDER, MERGED, RCM, shapes_config


def get_config(size: str = "full"):
    return shapes_config(
        "sla",
        size,
        workdir=str(FOLDER / "merged"),
        weights=MERGED,
        teacher=RCM,
        num_steps=1000,
        learning_rate=3e-4,
        learning_rate_end=0.1,
        sla_topk=0.5,
        time_mean=2.0,
        time_std=2.0,
    )

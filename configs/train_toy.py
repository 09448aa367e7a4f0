"""Training on any machine, without a download: a tiny network learns generated latents on a CPU in about a minute.

    python scripts/train.py --config=configs/train_toy.py
    python scripts/train.py --config=configs/train_toy.py:sla
    python scripts/train.py --config=configs/train_toy.py:rcm

The first trains a teacher, which the other two start from and learn from. Results are in outputs/train_toy/.
"""

from turbojax.train.config import train_config

TEACHER = "outputs/train_toy/teacher/transformer.safetensors"


def get_config(recipe: str = "teacher"):
    config = train_config(
        recipe=recipe,
        workdir=f"outputs/train_toy/{recipe}",
        data="toy",
        weights="random" if recipe == "teacher" else TEACHER,
        model="toy",
        num_steps=200,
        batch_size=16,
        dtype="float32",
        remat=False,
        learning_rate=2e-3,
        warmup_steps=20,
        checkpoint_every=100,
        sla_topk=0.25,
        sla_blocks=(8, 8),
    )
    return config

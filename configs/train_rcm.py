"""rCM distillation as published: Wan 2.1 text to video learns to make a video in 1 to 4 steps without guidance.

    python scripts/train.py --config=configs/train_rcm.py --config.data=DATA --config.workdir=outputs/rcm
    python scripts/train.py --config=configs/train_rcm.py:14b --config.data=DATA --config.fsdp=8

DATA is a folder of shards, see docs/training-data.md; its negative prompt is what the teacher's guidance needs. The
network is downloaded on first use; --config.weights= takes another one, from which teacher, student and fake score
start. The consistency loss is near 100 by construction: look at the videos in the workdir, and at
distribution_matching and fake_score. The state of 1.3B with the fake score's takes 40 GB, divided by --config.fsdp=N.
"""

from turbojax import UserError
from turbojax.train.config import FEW_STEPS, train_config


def get_config(size: str = "1.3b"):
    config = train_config(
        recipe="rcm",
        workdir="outputs/train_rcm",
        weights="Wan-AI/Wan2.1-T2V-1.3B",
        learning_rate=2e-6,
        critic_learning_rate=4e-7,
        beta1=0.0,
        time_mean=0.7,
        sample_every=500,
        **FEW_STEPS,
    )
    if size == "14b":
        config.weights = "Wan-AI/Wan2.1-T2V-14B"
        config.learning_rate, config.critic_learning_rate = 1e-6, 1e-7
        config.time_mean = 1.5
        config.tangent_warmup, config.student_every = 0, 10
    elif size != "1.3b":
        raise UserError(f"configs/train_rcm.py:{size} is unknown; choose 1.3b or 14b")
    return config

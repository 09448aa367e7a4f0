"""SLA fine-tuning as published: Wan 2.1 text to video, 1.3B, learns to do with a tenth of its attention.

    python scripts/train.py --config=configs/train_sla.py --config.data=DATA --config.workdir=outputs/sla

DATA is a folder of shards, see docs/training-data.md. The network is downloaded on first use; --config.weights= takes
another one, which is the teacher, too, unless --config.teacher= names one. Learning rate 1e-5, noise levels
LogNormal(1.5, 1.6), blocks of 64 by 64. The loss is the mean squared distance to the dense network's velocities. What
the network has learned can be put on a distilled one by scripts/merge.py.
"""

from turbojax.train.config import train_config


def get_config():
    return train_config(recipe="sla", workdir="outputs/train_sla", weights="Wan-AI/Wan2.1-T2V-1.3B", sample_every=500)

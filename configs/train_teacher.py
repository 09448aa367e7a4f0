"""Flow matching on your own videos: fine-tunes Wan 2.1 text to video, 1.3B.

    python scripts/train.py --config=configs/train_teacher.py --config.data=DATA --config.workdir=outputs/teacher

DATA is a folder of shards, see docs/training-data.md. The network and, for the sample videos, the VAE are downloaded on
first use; --config.weights= and --config.vae= take others. The settings are those published for SLA fine-tuning, with
noise levels around the middle. The state takes 23 GB (float32 weights, two moments and the average), divided by
--config.fsdp=N devices.
"""

from turbojax.config import load_config


def get_config():
    noise_levels = dict(time_mean=0.0, time_std=1.0)
    return load_config("train_sla", recipe="teacher", workdir="outputs/train_teacher", **noise_levels)

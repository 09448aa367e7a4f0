"""Trains: a teacher by flow matching, SLA fine-tuning, or rCM distillation to 1 to 4 steps.

    python scripts/train.py --config=configs/train_toy.py
    python scripts/train.py --config=configs/train_sla.py --config.data=DATA --config.weights=Wan-AI/Wan2.1-T2V-1.3B

Started again with the same settings it goes on from its newest checkpoint. Every setting can be changed as
--config.NAME=VALUE:
"""

from absl import flags

from turbojax.app import cli
from turbojax.sharding import initialize_distributed

try:
    from turbojax.shapes_training.registry import train
    from turbojax.train.config import TRAIN_SETTINGS
except ModuleNotFoundError as missing:
    cli.fail(ModuleNotFoundError(f"training needs {missing.name}; pip install 'turbojax[train]'"))

FLAGS = flags.FlagValues()
CONFIG = cli.define_config(FLAGS, "configs/train_*.py")
OPTIONS = {
    "settings": TRAIN_SETTINGS,
    "less_memory": "remat=True, a higher accumulation, or fsdp or sequence to share it among devices",
}


def main() -> None:
    config = cli.read_config(CONFIG, example="configs/train_toy.py", settings=TRAIN_SETTINGS)
    initialize_distributed()
    train(config)

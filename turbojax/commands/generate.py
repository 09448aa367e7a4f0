"""Makes a video from a prompt, or from an image and a prompt.

    python scripts/generate.py --config=configs/demo.py
    python scripts/generate.py --config=configs/wan1_3b.py --config.prompt="A cat surfing a wave" --config.seed=1
    python scripts/generate.py --config=configs/wan22_i2v_quant.py --config.image=cat.jpg --config.prompt="It jumps"

--plan prints what a call would need of the card, stage by stage, and what would be kept on it; nothing is loaded.
Every setting of a configuration can be changed as --config.NAME=VALUE:
"""

from absl import flags
from ml_collections import config_flags

from turbojax import cli
from turbojax.config import describe_settings
from turbojax.generate import generate, plan

FLAGS = flags.FlagValues()
CONFIG = config_flags.DEFINE_config_file(
    "config", None, "file of settings, see configs/", lock_config=True, flag_values=FLAGS
)
PLAN = flags.DEFINE_bool("plan", False, "print what memory the call needs, and stop", flag_values=FLAGS)


def main() -> None:
    config = cli.read_config(CONFIG, example="configs/demo.py")
    if PLAN.value:
        print(plan(config))
    else:
        generate(config)


def run() -> None:
    cli.run(main, flag_values=FLAGS, help_text=(__doc__ or "") + "\n" + describe_settings())

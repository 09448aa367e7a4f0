"""Makes a video from a prompt, or from an image and a prompt.

    python scripts/generate.py --config=configs/demo.py
    python scripts/generate.py --config=configs/wan1_3b.py --config.prompt="A cat surfing a wave" --config.seed=1
    python scripts/generate.py --config=configs/wan22_i2v_quant.py --config.image=cat.jpg --config.prompt="It jumps"
    python scripts/generate.py --config=configs/wan1_3b.py --interactive
    python scripts/generate.py --config=configs/wan1_3b.py --prompts_file=prompts.txt --config.output=outputs/batch.mp4

--interactive reads prompts one after another, and short commands that change settings: /help lists them.
--prompts_file has a prompt a line; their videos are numbered, and run again, those that are finished are left out.
Videos that are there stay: those of another seed, of other settings or of new lines take free numbers.
--plan prints what a call would need of the GPU, stage by stage, and what would stay on it; nothing is loaded.
Every setting of a configuration can be changed as --config.NAME=VALUE:
"""

from absl import flags

from turbojax.app import cli
from turbojax.app.generate import generate, plan
from turbojax.app.session import batch, interactive
from turbojax.errors import UserError

FLAGS = flags.FlagValues()
CONFIG = cli.define_config(FLAGS)
PLAN = flags.DEFINE_bool("plan", False, "print what memory the call needs, and stop", flag_values=FLAGS)
INTERACTIVE = flags.DEFINE_bool("interactive", False, "read prompts and commands", flag_values=FLAGS)
PROMPTS_FILE = flags.DEFINE_string("prompts_file", None, "file with a prompt a line", flag_values=FLAGS)


def main() -> None:
    config = cli.read_config(CONFIG, example="configs/demo.py")
    if sum(map(bool, (PLAN.value, INTERACTIVE.value, PROMPTS_FILE.value))) > 1:
        raise UserError("--plan, --interactive and --prompts_file exclude each other; give one")
    if PLAN.value:
        print(plan(config))
    elif INTERACTIVE.value:
        interactive(config)
    elif PROMPTS_FILE.value:
        batch(config, PROMPTS_FILE.value)
    else:
        generate(config)

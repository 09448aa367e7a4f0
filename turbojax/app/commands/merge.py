"""Merges transformers: base + weight (diff_target - diff_base), a tensor at a time.

    python scripts/merge.py --base=rcm.pth --diff_base=wan/ --diff_target=sla.safetensors --output=turbo.safetensors

Base is the distilled model, diff_base the pretrained one, diff_target the pretrained one tuned with SLA. Each is a
file, an index of shards or a folder, in official, TurboDiffusion or diffusers names, or an Orbax folder of
scripts/convert.py; int8 checkpoints cannot be merged. Further flags: --weight=1.0,
--dtype=bfloat16 (or float16, float32; base's if not given), --quantize=block128 (or channel: int8 linear layers),
--format=safetensors (or pth, orbax), --names=turbodiffusion (or official, diffusers: without SLA and int8),
--overwrite.
"""

from absl import flags

from turbojax.app import checkpoint_flags
from turbojax.errors import UserError
from turbojax.weights.merge import merge

FLAGS = flags.FlagValues()
flags.DEFINE_string("base", None, "checkpoint that the difference is added to", flag_values=FLAGS)
flags.DEFINE_string("diff_base", None, "checkpoint that is subtracted", flag_values=FLAGS)
flags.DEFINE_string("diff_target", None, "checkpoint that is added", flag_values=FLAGS)
WEIGHT = flags.DEFINE_float("weight", 1.0, "how much of the difference is added", flag_values=FLAGS)
checkpoint_flags.define(FLAGS, dtype=None, dtype_help="of all other tensors; base's if not given")


def main() -> None:
    paths = FLAGS.base, FLAGS.diff_base, FLAGS.diff_target, FLAGS.output
    if not all(paths):
        raise UserError("give --base=, --diff_base=, --diff_target= and --output=, see --help")
    checkpoint_flags.log_written(FLAGS, merge(*paths, weight=WEIGHT.value, **checkpoint_flags.written(FLAGS)))

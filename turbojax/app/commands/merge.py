"""Merges transformers: base + weight (diff_target - diff_base), a tensor at a time.

    python scripts/merge.py --base=rcm.pth --diff_base=wan/ --diff_target=sla.safetensors --output=turbo.safetensors

Base is the distilled model, diff_base the pretrained one, diff_target the pretrained one tuned with SLA. Each is a
file, an index of shards or a folder, in official, TurboDiffusion or diffusers names, or an Orbax folder of
scripts/convert.py; int8 checkpoints cannot be merged. Further flags: --weight=1.0,
--dtype=bfloat16 (or float16, float32; base's if not given), --quantize=block128 (or channel: int8 linear layers),
--format=safetensors (or pth, orbax), --names=turbodiffusion (or official, diffusers: without SLA and int8),
--overwrite.
"""

import jax.numpy as jnp
from absl import flags, logging

from turbojax.app import cli
from turbojax.errors import UserError
from turbojax.weights.merge import merge

FLAGS = flags.FlagValues()
BASE = flags.DEFINE_string("base", None, "checkpoint that the difference is added to", flag_values=FLAGS)
DIFF_BASE = flags.DEFINE_string("diff_base", None, "checkpoint that is subtracted", flag_values=FLAGS)
DIFF_TARGET = flags.DEFINE_string("diff_target", None, "checkpoint that is added", flag_values=FLAGS)
WEIGHT = flags.DEFINE_float("weight", 1.0, "how much of the difference is added", flag_values=FLAGS)
OUTPUT = flags.DEFINE_string("output", None, "file or folder to write", flag_values=FLAGS)
QUANTIZE = flags.DEFINE_enum(
    "quantize", "none", ["none", "block128", "channel"], "int8 linear layers in the blocks", flag_values=FLAGS
)
DTYPE = flags.DEFINE_enum(
    "dtype", None, ["bfloat16", "float16", "float32"], "of all other tensors; base's if not given", flag_values=FLAGS
)
FORMAT = flags.DEFINE_enum("format", "safetensors", ["safetensors", "pth", "orbax"], "what to write", flag_values=FLAGS)
NAMES = flags.DEFINE_enum(
    "names", "turbodiffusion", ["turbodiffusion", "official", "diffusers"], "whose names", flag_values=FLAGS
)
OVERWRITE = flags.DEFINE_bool("overwrite", False, "replace an output that exists", flag_values=FLAGS)


def main() -> None:
    if not (BASE.value and DIFF_BASE.value and DIFF_TARGET.value and OUTPUT.value):
        raise UserError("give --base=, --diff_base=, --diff_target= and --output=, see --help")
    summary = merge(
        BASE.value,
        DIFF_BASE.value,
        DIFF_TARGET.value,
        OUTPUT.value,
        weight=WEIGHT.value,
        quantize=None if QUANTIZE.value == "none" else QUANTIZE.value,
        dtype=jnp.dtype(DTYPE.value) if DTYPE.value else None,
        format=FORMAT.value,
        names=NAMES.value,
        overwrite=OVERWRITE.value,
    )
    logging.info("Wrote %s: %d tensors, %.2f GB", OUTPUT.value, summary.tensors, summary.bytes / 1e9)


def run() -> None:
    cli.run(main, flag_values=FLAGS, help_text=__doc__ or "")

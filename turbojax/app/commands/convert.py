"""Converts a published checkpoint: checks it, casts or quantizes it, and writes it in any of the layouts.

    python scripts/convert.py --input=TurboWan2.1-T2V-1.3B-480P.pth --output=models/transformer.safetensors
    python scripts/convert.py --input=wan14b/ --output=models/transformer.safetensors --quantize=block128
    python scripts/convert.py --input=Wan2.1_VAE.pth --output=models/vae.safetensors

--input is a file, an index of shards or a folder: transformer (official, TurboDiffusion or diffusers names, or Orbax),
VAE or text encoder. --output is a .safetensors file, or a .pth file with --format=pth, or a folder with --format=orbax.
Further flags: --dtype=bfloat16 (or float16, float32), --quantize=block128 (or channel: int8 linear layers),
--names=turbodiffusion (or official, diffusers: without SLA and int8), --overwrite; --sla_topk and --sigma_max of a
transformer, which it runs with from then on where nothing else is asked for. A .pth file has no place for these two:
a warning tells what the input says of them. Files named transformer.safetensors, vae.safetensors and
text_encoder.safetensors in one folder, with the tokenizer's folder, load as --config.weights=FOLDER.
"""

from absl import flags

from turbojax.app import checkpoint_flags
from turbojax.errors import UserError
from turbojax.weights.convert import convert

FLAGS = flags.FlagValues()
INPUT = flags.DEFINE_string("input", None, "checkpoint to read", flag_values=FLAGS)
checkpoint_flags.define(FLAGS, dtype="bfloat16", dtype_help="of all other tensors")
TOPK = flags.DEFINE_float("sla_topk", None, "fraction of key blocks to run it with", flag_values=FLAGS)
SIGMA_MAX = flags.DEFINE_float("sigma_max", None, "first noise level of rcm to run it with", flag_values=FLAGS)


def main() -> None:
    if not INPUT.value or not FLAGS.output:
        raise UserError("give --input=CHECKPOINT and --output=FILE, see --help")
    changes = {"sla_topk": TOPK.value, "sigma_max": SIGMA_MAX.value} | checkpoint_flags.written(FLAGS)
    checkpoint_flags.log_written(FLAGS, convert(INPUT.value, FLAGS.output, **changes))

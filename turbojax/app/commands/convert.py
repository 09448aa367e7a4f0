"""Converts a published checkpoint: checks it, casts or quantizes it, and writes it in any of the layouts.

    python scripts/convert.py --input=TurboWan2.1-T2V-1.3B-480P.pth --output=models/transformer.safetensors
    python scripts/convert.py --input=wan14b/ --output=models/transformer.safetensors --quantize=block128
    python scripts/convert.py --input=Wan2.1_VAE.pth --output=models/vae.safetensors

--input is a file, an index of shards or a folder: transformer (official, TurboDiffusion or diffusers names, or Orbax),
VAE or text encoder. --output is a .safetensors file, or a .pth file with --format=pth, or a folder with --format=orbax.
Further flags: --dtype=bfloat16 (or float16, float32), --quantize=block128 (or channel: int8 linear layers),
--names=turbodiffusion (or official, diffusers: without SLA and int8), --overwrite; --sla_topk and --sigma_max of a
transformer, which it runs with from then on where nothing else is asked for. A .pth file has no place for these two:
what the input says of them is told in a warning. Files named transformer.safetensors, vae.safetensors and
text_encoder.safetensors in one folder, with the tokenizer's folder, load as --config.weights=FOLDER.
"""

import jax.numpy as jnp
from absl import flags, logging

from turbojax.app import cli
from turbojax.errors import UserError
from turbojax.weights.convert import convert

FLAGS = flags.FlagValues()
INPUT = flags.DEFINE_string("input", None, "checkpoint to read", flag_values=FLAGS)
OUTPUT = flags.DEFINE_string("output", None, "file or folder to write", flag_values=FLAGS)
QUANTIZE = flags.DEFINE_enum(
    "quantize", "none", ["none", "block128", "channel"], "int8 linear layers in the blocks", flag_values=FLAGS
)
DTYPE = flags.DEFINE_enum(
    "dtype", "bfloat16", ["bfloat16", "float16", "float32"], "of all other tensors", flag_values=FLAGS
)
FORMAT = flags.DEFINE_enum("format", "safetensors", ["safetensors", "pth", "orbax"], "what to write", flag_values=FLAGS)
NAMES = flags.DEFINE_enum(
    "names", "turbodiffusion", ["turbodiffusion", "official", "diffusers"], "whose names", flag_values=FLAGS
)
TOPK = flags.DEFINE_float("sla_topk", None, "share of key blocks to run it with", flag_values=FLAGS)
SIGMA_MAX = flags.DEFINE_float("sigma_max", None, "first noise level of rcm to run it with", flag_values=FLAGS)
OVERWRITE = flags.DEFINE_bool("overwrite", False, "replace an output that exists", flag_values=FLAGS)


def main() -> None:
    if not INPUT.value or not OUTPUT.value:
        raise UserError("give --input=CHECKPOINT and --output=FILE, see --help")
    summary = convert(
        INPUT.value,
        OUTPUT.value,
        quantize=None if QUANTIZE.value == "none" else QUANTIZE.value,
        dtype=jnp.dtype(DTYPE.value),
        format=FORMAT.value,
        names=NAMES.value,
        overwrite=OVERWRITE.value,
        sla_topk=TOPK.value,
        sigma_max=SIGMA_MAX.value,
    )
    logging.info(
        "Wrote %s: %s, %d tensors, %.2f GB", OUTPUT.value, summary.component, summary.tensors, summary.bytes / 1e9
    )


def run() -> None:
    cli.run(main, flag_values=FLAGS, help_text=__doc__ or "")

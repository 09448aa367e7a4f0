"""Compares settings: a video for each combination of some values, with tables, a plot and a page of frames.

    python scripts/ablate.py --config=configs/demo.py --grid sigma_max=80,200 num_inference_steps=1,2,4
    python scripts/ablate.py --config=configs/wan1_3b.py --grid sla_topk=0.05,0.1,0.2 sigma_max=80,200 \
        --reference sla_topk=1 --out=outputs/topk

--grid takes any settings of scripts/generate.py with values between commas, or between | where a value has a comma.
All else is as --config= says. What varies between calls uses one pipeline; another network (attention_type,
quant_linear, weights and so on) is loaded as often as its values change.

--reference names settings of the videos that the others are compared with; if not given, the first value of each axis.
--out=outputs/ablation is the folder of the results: index.html, plot.png, results.csv and results.jsonl. Run again
after a stop, finished videos are not made again. --repeats=2 calls measure the second, a warm one; 1 saves its time.
--num_frames=4 are shown of each video, and compared. Needs matplotlib: pip install 'turbojax[ablate]'.

Settings:
"""

from pathlib import Path

from absl import flags

from turbojax.app import cli
from turbojax.app.ablation import ablate, parse_settings
from turbojax.app.ablation_report import require_matplotlib
from turbojax.errors import UserError

FLAGS = flags.FlagValues()
CONFIG = cli.define_config(FLAGS)
GRID = flags.DEFINE_multi_string("grid", [], "NAME=VALUE,VALUE,...", flag_values=FLAGS)
REFERENCE = flags.DEFINE_multi_string("reference", [], "NAME=VALUE", flag_values=FLAGS)
OUT = flags.DEFINE_string("out", "outputs/ablation", "folder of the results", flag_values=FLAGS)
REPEATS = flags.DEFINE_integer("repeats", 2, "calls for each video; the last one counts", flag_values=FLAGS)
FRAMES = flags.DEFINE_integer("num_frames", 4, "shown of each video", flag_values=FLAGS)
OPTIONS = {"lists": ("grid", "reference")}


def main() -> None:
    config = cli.read_config(CONFIG, example="configs/demo.py")
    if not GRID.value:
        raise UserError("no grid; give for instance --grid sla_topk=0.05,0.1,0.2 sigma_max=80,200")
    require_matplotlib()
    reference = {}
    for name, values in parse_settings(REFERENCE.value).items():
        if len(values) > 1:
            raise UserError(f"the reference has {len(values)} values of {name}; give one")
        reference[name] = values[0]
    grid, calls = parse_settings(GRID.value), {"repeats": REPEATS.value, "num_frames": FRAMES.value}
    ablate(config, grid, Path(OUT.value), reference=reference or None, **calls)

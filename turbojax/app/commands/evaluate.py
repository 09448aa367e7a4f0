"""Evaluates the small model of the world of shapes on prompts that it was never trained on.

    python scripts/evaluate.py --prompts=20
    python scripts/evaluate.py --folder=outputs/shapes --output=benchmarks/cpu/shapes.json
    python scripts/evaluate.py --teacher=benchmarks/shapes_teacher.safetensors --variants="teacher, 50 steps"

Without a folder it is the model that comes with the package, else that of a folder which scripts/train_shapes.py has
filled, with all networks that led there. A program and a small classifier tell whether a video shows the shapes,
colours, motions and background of its prompt; the output has the classifier's own accuracy. Sparse and int8 variants
are compared with the dense network from the same noise (PSNR, SSIM). --variants are names, separated by semicolons,
quick (what is shipped, in 4 steps) or all, which a folder is needed for; --list prints them. Further flags: --seed,
--batch (videos at once), --guidance and --shift (of the teacher), --num_frames, --height, --width, --dtype=bfloat16 (or
float32), --sheets=FOLDER for a picture with frames of the first 20 videos of each variant. The same seed gives the same
prompts and the same noise.
"""

from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from turbojax.errors import UserError
from turbojax.files import check_file, check_folder, user_path, write_json
from turbojax.pipeline.request import check_seed
from turbojax.shapes import MODEL
from turbojax.shapes.judge import train_judge
from turbojax.shapes_training import evaluate

FLAGS = flags.FlagValues()
FOLDER = flags.DEFINE_string("folder", None, "of scripts/train_shapes.py; the package if not given", flag_values=FLAGS)
TEACHER = flags.DEFINE_string("teacher", None, "file of the teacher; the folder's if not given", flag_values=FLAGS)
OUTPUT = flags.DEFINE_string("output", "outputs/shapes/evaluation.json", "file to write", flag_values=FLAGS)
PROMPTS = flags.DEFINE_integer("prompts", 200, "how many", flag_values=FLAGS)
NAMES = flags.DEFINE_string(
    "variants", None, "names separated by semicolons, quick, or all; all of a folder if not given", flag_values=FLAGS
)
LIST = flags.DEFINE_bool("list", False, "print the variants, and stop", flag_values=FLAGS)
SEED = flags.DEFINE_integer("seed", 0, "of prompts and noise", flag_values=FLAGS)
BATCH = flags.DEFINE_integer("batch", 20, "videos at once", flag_values=FLAGS)
GUIDANCE = flags.DEFINE_float("guidance", evaluate.GUIDED["guidance_scale"], "the teacher's", flag_values=FLAGS)
SHIFT = flags.DEFINE_float("shift", evaluate.GUIDED["shift"], "of the teacher's times", flag_values=FLAGS)
FRAMES = flags.DEFINE_integer("num_frames", 33, "4 n + 1", flag_values=FLAGS)
HEIGHT = flags.DEFINE_integer("height", 128, "pixels", flag_values=FLAGS)
WIDTH = flags.DEFINE_integer("width", 128, "pixels", flag_values=FLAGS)
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "of the networks", flag_values=FLAGS)
SHEETS = flags.DEFINE_string("sheets", None, "folder for pictures", flag_values=FLAGS)
SHOWN = 20  # videos of a picture


def main() -> None:
    if LIST.value:
        print("\n".join(evaluate.VARIANTS))
        return
    for name, value in (("prompts", PROMPTS.value), ("batch", BATCH.value)):
        if value < 1:
            raise UserError(f"{name}={value} must be at least 1")
    teacher = user_path(TEACHER.value).absolute() if TEACHER.value else None
    if teacher and not teacher.is_file():
        raise UserError(f"--teacher={teacher} is no file; scripts/train_shapes.py makes one")
    named = {"all": list(evaluate.VARIANTS), "quick": list(evaluate.QUICK)}
    chosen = NAMES.value or ("all" if FOLDER.value else "quick")
    names = named.get(chosen) or [name.strip() for name in chosen.split(";")]
    check_seed(SEED.value)
    output, sheets = check_file(OUTPUT.value), check_folder(SHEETS.value) if SHEETS.value else None
    size = {"num_frames": FRAMES.value, "height": HEIGHT.value, "width": WIDTH.value}
    tasks = evaluate.held_out_tasks(PROMPTS.value, seed=SEED.value)
    judge = train_judge(size=min(HEIGHT.value, WIDTH.value))
    content: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "dtype": DTYPE.value,
        "seed": SEED.value,
        "prompts": len(tasks),
        "size": size,
        "teacher": {"guidance_scale": GUIDANCE.value, "shift": SHIFT.value},
        "judge": {"accuracy": judge.accuracy, "tested": judge.tested},
        "rows": [],
    }
    folder, dtype = user_path(FOLDER.value or MODEL.parent), jnp.dtype(DTYPE.value)
    options: dict[str, Any] = {"size": size, "dtype": dtype, "seed": SEED.value, "batch": BATCH.value}
    options["guided"] = content["teacher"]
    if teacher:
        options["networks"] = evaluate.NETWORKS | {"teacher": str(teacher)}
    for row, videos in evaluate.evaluate(names, tasks, folder, judge, **options):
        content["rows"].append(row)
        write_json(output, content)  # after each, so that a stop loses little
        if sheets:
            file = "".join(c if c.isalnum() or c == "." else "_" for c in row["variant"])
            evaluate.contact_sheet(videos[:SHOWN], sheets / f"{file}.png")
    print(evaluate.table(content["rows"]))

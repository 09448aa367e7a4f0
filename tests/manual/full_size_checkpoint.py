"""Converts and loads checkpoints of TurboDiffusion's exact 1.3B layout: seconds and peak memory of each step, as JSON.

    python tests/manual/full_size_checkpoint.py FOLDER --out=benchmarks/cpu/full_size_checkpoint.json

Fills FOLDER, which it makes and removes, with 12 GB; about 4 minutes on 2 cores. Each step is a process, its peak all
that is resident, mapped files included: steps with one layer show what the libraries take. Not run by pytest.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILES = ("small.pth", "plain.pth", "quant.pth")  # one layer, 30 layers in bfloat16 and in int8
CONVERSIONS = (  # source, output and flags
    ("small.pth", "small.safetensors"),
    ("plain.pth", "plain.safetensors"),
    ("quant.pth", "quant.safetensors"),
    ("plain.pth", "quantized.safetensors", "--quantize=block128"),
    ("plain.pth", "plain.orbax", "--format=orbax"),
)
LOADS = (  # one, or two that must have equal parameters; :int8 quantizes while loading
    *(("small.pth",), ("plain.pth",), ("quant.pth",), ("plain.safetensors",), ("plain.orbax",), ("plain.pth:int8",)),
    *(("plain.pth", "plain.safetensors"), ("plain.pth", "plain.orbax")),
    *(("quant.pth", "quant.safetensors"), ("plain.pth:int8", "quantized.safetensors")),
)


def generate(file: Path) -> None:
    import jax.numpy as jnp

    from turbojax.kernels.int8 import QuantConfig
    from turbojax.models.wan import WanConfig
    from turbojax.weights.io import write_pth
    from turbojax.weights.layouts import generated, wan_layout

    quant = QuantConfig() if file.stem == "quant" else None
    config = WanConfig.t2v_1_3b(attention_type="sla", quant=quant, num_layers=1 if file.stem == "small" else 30)
    write_pth(file, generated(wan_layout(config), jnp.bfloat16))


def load(*paths: str) -> None:
    import numpy as np
    from flax import nnx

    from turbojax.weights.load import load_wan
    from turbojax.weights.options import NetworkOptions

    models = [
        load_wan(path.removesuffix(":int8"), NetworkOptions(quant_linear=path.endswith(":int8") or None))
        for path in paths
    ]
    for variables in zip(*(nnx.to_flat_state(nnx.state(model)) for model in models), strict=True):
        first, *others = (np.asarray(variable.get_value()) for _, variable in variables)
        assert all(np.array_equal(first, other) for other in others), variables[0][0]


def measured(*command: str | Path) -> dict[str, float]:
    """Runs a Python program; its wall-clock seconds and peak resident bytes."""
    start = time.perf_counter()
    _, status, usage = os.wait4(subprocess.Popen([sys.executable, *command], cwd=ROOT).pid, 0)
    if status:
        sys.exit(f"{' '.join(map(str, command))} failed")
    return {"seconds": round(time.perf_counter() - start, 1), "peak_bytes": usage.ru_maxrss * 1024}


def main(folder: Path, out: Path) -> None:
    folder.mkdir()
    try:
        steps = {f"write {name}": measured(__file__, "generate", folder / name) for name in FILES}
        for source, output, *flags in CONVERSIONS:
            command = (f"--input={folder / source}", f"--output={folder / output}", *flags)
            steps[f"convert {source} to {output}"] = measured(ROOT / "scripts" / "convert.py", *command)
        for names in LOADS:
            steps[f"load {' and compare '.join(names)}"] = measured(__file__, "load", *(folder / n for n in names))
        sizes = {file.name: file.stat().st_size for file in folder.iterdir() if file.is_file()}
    finally:
        shutil.rmtree(folder)
    from turbojax.bench import measure  # not before: a process begins with the peak of the one that starts it

    result = {"machine": f"CPU, {os.cpu_count()} cores", "largest_tensor_bytes": 9216 * 1536 * 2}
    measure.save(result | {"file_bytes": sizes, "steps": steps}, out)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["generate", file]:
            generate(Path(file))
        case ["load", *paths]:
            load(*paths)
        case [folder, out] if out.startswith("--out="):
            main(Path(folder), Path(out.removeprefix("--out=")))
        case _:
            sys.exit(__doc__)

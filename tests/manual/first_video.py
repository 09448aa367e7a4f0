"""A process's first 1.3B video at 480p from a local converted checkpoint: seconds from launch to closed mp4, as JSON.

    python tests/manual/first_video.py FOLDER --files
    python tests/manual/first_video.py FOLDER --out=benchmarks/h100/first_video.json

The first form only makes the files, which takes minutes and no GPU: FOLDER gets 13 GB of generated values, published
layouts, the transformer converted to int8. The second needs a GPU: two processes, one with an empty compilation cache
and one with what it left, each with a prompt of its own. Not run by pytest.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = "TurboWan2.1-T2V-1.3B-480P"


def make_files(folder: Path) -> None:
    import jax.numpy as jnp

    from turbojax.models.umt5 import UMT5Config
    from turbojax.models.vae import VAEConfig
    from turbojax.models.wan import WanConfig
    from turbojax.shapes.demo import write_encoders
    from turbojax.weights.io import write_pth
    from turbojax.weights.layouts import generated, wan_layout

    folder.mkdir()
    write_encoders(folder, VAEConfig.wan2_1(), UMT5Config.xxl())
    source, output = folder / f"{WEIGHTS}.pth", folder / f"{WEIGHTS}-quant.safetensors"
    write_pth(source, generated(wan_layout(WanConfig.t2v_1_3b(attention_type="sla")), jnp.bfloat16))
    convert = (ROOT / "scripts" / "convert.py", f"--input={source}", f"--output={output}", "--quantize=block128")
    subprocess.run([sys.executable, *convert], check=True)
    source.unlink()


def video_seconds(folder: Path, prompt: str) -> float:
    """From the launch of a process to its end, after the mp4 is closed."""
    command = (
        *(sys.executable, ROOT / "scripts" / "generate.py", f"--config={ROOT}/configs/wan1_3b_quant.py"),
        *(f"--config.weights={folder / WEIGHTS}-quant.safetensors", "--config.attention_type=sagesla"),
        *(f"--config.prompt={prompt}", f"--config.output={folder / 'video.mp4'}"),
    )
    start = time.perf_counter()
    subprocess.run(command, check=True, env=os.environ | {"XDG_CACHE_HOME": str(folder / "cache")})
    return time.perf_counter() - start


def main(folder: Path, out: Path) -> None:
    if (folder / "cache").exists():
        sys.exit(f"{folder / 'cache'} is there, so its programs are compiled; remove it")
    seconds = {
        "empty_cache": video_seconds(folder, "A cat surfing a wave at sunset"),
        "full_cache": video_seconds(folder, "A dog surfing a wave at sunset"),
    }
    sizes = {file.name: file.stat().st_size for file in folder.iterdir() if file.is_file()}
    from turbojax.bench import measure  # not before: it would take the card's memory

    what = "int8 (block128), SageSLA 0.1, 480p, 81 frames, 4 steps; the files just written, so in the page cache"
    command = "python tests/manual/first_video.py FOLDER"
    measure.save(
        {"case": "first_video", "command": command, "what": what, "file_bytes": sizes, "seconds": seconds}, out
    )


if __name__ == "__main__":
    match sys.argv[1:]:
        case [folder, "--files"]:
            make_files(Path(folder))
        case [folder, out] if out.startswith("--out="):
            main(Path(folder), Path(out.removeprefix("--out=")))
        case _:
            sys.exit(__doc__)

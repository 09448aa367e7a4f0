"""An ablation: a video for each combination of settings, its seconds, and its PSNR to that of a reference.

    python examples/ablation.py

Makes a page, outputs/examples/ablation/index.html, with a plot and tables. Finished videos are not made again. The
command `turbojax ablate` does the same for any configuration.
"""

import json
from pathlib import Path

from turbojax.app.ablation import ablate
from turbojax.config import base_config


def main(folder: str = "outputs/examples", **size: int) -> None:
    config = base_config(
        weights="demo",
        prompt="a red star moving up right on a checkered background",
        dtype="float32",
        **{"height": 128, "width": 128, "num_frames": 33} | size,
    )
    grid = {"sla_topk": [0.25, 0.67], "num_inference_steps": [2, 4]}
    page = ablate(config, grid, Path(folder) / "ablation", reference={"sla_topk": 1.0})
    for line in (page.parent / "results.jsonl").read_text().splitlines():
        print(json.loads(line))
    print(page)


if __name__ == "__main__":
    main()

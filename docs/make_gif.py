"""Makes docs/demo.gif, the moving picture of README: four videos of the demo side by side.

python docs/make_gif.py
"""

import runpy
from pathlib import Path

import numpy as np

from turbojax.app.generate import load_pipeline
from turbojax.media.video import save_video

DOCS = Path(__file__).parent
PROMPTS = (
    "a red star moving up right on a white background",
    "an orange digit two growing on a white background",
    "a green triangle rotating on a gray background",
    "a yellow circle moving left and a purple triangle moving up on a black background",
)


def main() -> None:
    config = runpy.run_path(str(DOCS.parent / "configs" / "demo.py"))["get_config"]()
    pipe = load_pipeline(config)
    size = {name: config[name] for name in ("height", "width", "num_frames", "num_inference_steps")}
    videos = [pipe(prompt, seed=0, **size).videos[0] for prompt in PROMPTS]
    save_video(np.concatenate(videos, axis=2), DOCS / "demo.gif")


if __name__ == "__main__":
    main()

"""Text to video: one pipeline, loaded once and used for many prompts.

    python examples/text_to_video.py

Runs the small model that comes with the package. For a real video on a GPU give from_pretrained
"TurboDiffusion/TurboWan2.1-T2V-1.3B-480P", leave dtype out, and ask for height=480, width=832, num_frames=81.
"""

import jax.numpy as jnp

from turbojax import TurboVideoPipeline
from turbojax.shapes import MODEL

PROMPTS = ("a red star moving up right on a white background", "a blue square growing on a black background")


def main(folder: str = "outputs/examples", **size: int) -> None:
    size = {"height": 128, "width": 128, "num_frames": 33} | size
    pipe = TurboVideoPipeline.from_pretrained(MODEL, dtype=jnp.float32, prepare=size)  # compiles while it loads
    for i, prompt in enumerate(PROMPTS):
        result = pipe(prompt, seed=1, output=f"{folder}/text_{i}.mp4", **size)  # written while it is decoded
        print(prompt, result.files[0], result.videos.shape, result.timings)  # uint8 [videos, frames, height, width, 3]


if __name__ == "__main__":
    main()

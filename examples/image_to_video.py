"""Image to video: the image is the first frame, and its shape that of the video.

    python examples/image_to_video.py

Runs tiny networks with random weights, which make coloured noise of the image. For a real video on a GPU call
main("TurboDiffusion/TurboWan2.2-I2V-A14B-720P", "cat.jpg", height=720, width=1280, num_frames=81): two experts, one for
high noise and one for low, which take turns on the GPU where both do not fit.
"""

from pathlib import Path

from turbojax import TurboVideoPipeline
from turbojax.shapes.demo import demo_picture, write_demo


def main(weights: str | None = None, image: str | None = None, folder: str = "outputs/examples", **size: int) -> None:
    size = {"height": 64, "width": 64, "num_frames": 9} | size
    if weights is None:
        weights = f"{folder}/random"
        Path(weights).mkdir(parents=True, exist_ok=True)
        write_demo(Path(weights), image=True)
    pipe = TurboVideoPipeline.from_pretrained(weights)
    print(pipe.plan(image=image or demo_picture(), **size))  # memory, stage by stage
    result = pipe("The cat jumps", image=image or demo_picture(), seed=1, output=f"{folder}/image.mp4", **size)
    last = result.videos[0, -1]  # uint8 [height, width, 3]: the next video's image, if it is to go on
    result = pipe("The cat lands", image=last, seed=2, output=f"{folder}/image_continued.mp4", **size)
    print(result.files[0], result.videos.shape, result.timings)


if __name__ == "__main__":
    main()

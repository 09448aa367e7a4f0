"""Step 4 of the small model: a dense network of 9 M parameters learns single frames by flow matching.

    python scripts/train.py --config=configs/shapes_image.py

A frame takes a ninth of a video's work, and says as much of how a digit looks. Needs the data,
outputs/shapes/image_data, that scripts/train_shapes.py --stages=text,vae,image_data makes.
"""

from turbojax.shapes_training.settings import FOLDER, flow_matching


def get_config(size: str = "full"):
    return flow_matching(
        size,
        workdir=str(FOLDER / "image"),
        data=str(FOLDER / "image_data"),
        weights="random",
        num_steps=18_000,
        batch_size=1024,
        time_mean=0.0,  # a frame alone drowns in less noise than nine that show the same
    )

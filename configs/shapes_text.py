"""Step 1 of the small model: its text encoder, a small umT5 that learns what captions say.

    python scripts/train_shapes.py --stages=text

It has settings of its own: steps, captions of a step, and the peak of the learning rate. Expect all answers right.
"""

from ml_collections import ConfigDict

from turbojax.shapes_training.settings import FOLDER, check_size


def get_config(size: str = "full"):
    check_size(size)
    config = ConfigDict(dict(workdir=str(FOLDER / "text"), model="shapes", steps=1000, batch=128, peak=4e-3, seed=0))
    if size == "tiny":
        config.update(model="shapes-tiny", steps=20, batch=16)
    return config

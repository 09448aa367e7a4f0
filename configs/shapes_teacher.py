"""Step 5 of the small model: the network that knows single frames learns videos by flow matching.

    python scripts/train.py --config=configs/shapes_teacher.py

Noise levels are those at which shape, colour and motion of a video are decided
(benchmarks/cpu/shapes_noise_levels.json). Needs the data, outputs/shapes/data, and the network, outputs/shapes/image,
that scripts/train_shapes.py --stages=text,vae,image_data,data,image makes.
"""

from turbojax.shapes_training.settings import IMAGE, flow_matching


def get_config(size: str = "full"):
    noise_levels = dict(time_mean=2.2, time_std=1.6)
    rate = dict(learning_rate=3e-3, learning_rate_end=0.02)
    return flow_matching(size, weights=IMAGE, num_steps=40_000, batch_size=128, **rate, **noise_levels)

"""Wan 2.2 image to video, A14B with two experts, 720p, 4 steps.

    python scripts/generate.py --config=configs/wan22_i2v.py --config.image=cat.jpg --config.prompt="It surfs"

Files: TurboWan2.2-I2V-A14B-high-720P.pth and -low-720P.pth of
huggingface.co/TurboDiffusion/TurboWan2.2-I2V-A14B-720P; VAE, text encoder and
tokenizer of huggingface.co/Wan-AI/Wan2.1-T2V-1.3B.
Expect a 5 second video in the shape of the image, at the area of 1280 x 720. Each expert has 28.6 GB of weights.
Where they do not fit together, the second comes from host memory when the first is done.
"""

from turbojax.config import base_config


def get_config():
    weights = "TurboDiffusion/TurboWan2.2-I2V-A14B-720P"
    return base_config(model="wan2.2-i2v-a14b", weights=weights, resolution="720p", sigma_max=200.0)

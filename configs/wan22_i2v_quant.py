"""Wan 2.2 image to video, A14B with two experts, 720p, 4 steps, int8 linear layers.

    python scripts/generate.py --config=configs/wan22_i2v_quant.py --config.image=cat.jpg --config.prompt="It surfs"

Files: TurboWan2.2-I2V-A14B-high-720P-quant.pth and -low-720P-quant.pth of
huggingface.co/TurboDiffusion/TurboWan2.2-I2V-A14B-720P; VAE, text encoder and
tokenizer of huggingface.co/Wan-AI/Wan2.1-T2V-1.3B.
Expect a 5 second video in the shape of the image, at the area of 1280 x 720. Each expert has 14.5 GB of weights.
Where they do not fit together, the second comes from host memory when the first is done.
"""

from turbojax.config import load_config


def get_config():
    return load_config("wan22_i2v", quant_linear=True)

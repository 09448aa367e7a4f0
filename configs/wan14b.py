"""Wan 2.1 text to video, 14B, 720p, 4 steps.

    python scripts/generate.py --config=configs/wan14b.py --config.prompt="A cat surfing a wave at sunset"

Files: TurboWan2.1-T2V-14B-720P.pth of huggingface.co/TurboDiffusion/TurboWan2.1-T2V-14B-720P;
VAE, text encoder and tokenizer of huggingface.co/Wan-AI/Wan2.1-T2V-1.3B.
Expect a 5 second video of 1280 x 720. The weights alone are 28.6 GB: a GPU with 80 GB.
"""

from turbojax.config import base_config


def get_config():
    return base_config(model="wan2.1-t2v-14b", weights="TurboDiffusion/TurboWan2.1-T2V-14B-720P", resolution="720p")

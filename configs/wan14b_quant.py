"""Wan 2.1 text to video, 14B, 720p, 4 steps, int8 linear layers.

    python scripts/generate.py --config=configs/wan14b_quant.py --config.prompt="A cat surfing a wave at sunset"

Files: TurboWan2.1-T2V-14B-720P-quant.pth of huggingface.co/TurboDiffusion/TurboWan2.1-T2V-14B-720P;
VAE, text encoder and tokenizer of huggingface.co/Wan-AI/Wan2.1-T2V-1.3B.
Expect the video of configs/wan14b.py with 14.5 GB of transformer weights.
"""

from turbojax.config import load_config


def get_config():
    return load_config("wan14b", quant_linear=True)

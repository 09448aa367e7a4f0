"""Wan 2.1 text to video, 14B, 480p, 4 steps, int8 linear layers.

    python scripts/generate.py --config=configs/wan14b_480p_quant.py --config.prompt="A cat surfing a wave at sunset"

Files: TurboWan2.1-T2V-14B-480P-quant.pth of huggingface.co/TurboDiffusion/TurboWan2.1-T2V-14B-480P;
VAE, text encoder and tokenizer of huggingface.co/Wan-AI/Wan2.1-T2V-1.3B.
Expect a 5 second video of 832 x 480 with 14.5 GB of transformer weights.
"""

from turbojax.config import load_config


def get_config():
    return load_config("wan14b_quant", weights="TurboDiffusion/TurboWan2.1-T2V-14B-480P", resolution="480p")

"""Wan 2.1 text to video, 1.3B, 480p, 4 steps, int8 linear layers.

    python scripts/generate.py --config=configs/wan1_3b_quant.py --config.prompt="A cat surfing a wave at sunset"

Files: TurboWan2.1-T2V-1.3B-480P-quant.pth of huggingface.co/TurboDiffusion/TurboWan2.1-T2V-1.3B-480P;
VAE, text encoder and tokenizer of huggingface.co/Wan-AI/Wan2.1-T2V-1.3B. An unquantized file works too: it is
quantized while it loads.
Expect the video of configs/wan1_3b.py with half the memory for the transformer's weights.
"""

from turbojax.config import load_config


def get_config():
    return load_config("wan1_3b", quant_linear=True)

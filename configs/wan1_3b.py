"""Wan 2.1 text to video, 1.3B, 480p, 4 steps: TurboDiffusion's distilled checkpoint.

    python scripts/generate.py --config=configs/wan1_3b.py --config.prompt="A cat surfing a wave at sunset"

Files: TurboWan2.1-T2V-1.3B-480P.pth of huggingface.co/TurboDiffusion/TurboWan2.1-T2V-1.3B-480P; VAE, text encoder and
tokenizer of huggingface.co/Wan-AI/Wan2.1-T2V-1.3B. They are downloaded on first use (about 15 GB).
Expect a 5 second video of 832 x 480 at 16 frames a second. For other files set --config.weights, .vae, .text_encoder
and .tokenizer; --config.weights=random runs the network at full size without a download, and makes noise.
"""

from turbojax.config import base_config


def get_config():
    return base_config(model="wan2.1-t2v-1.3b", weights="TurboDiffusion/TurboWan2.1-T2V-1.3B-480P")

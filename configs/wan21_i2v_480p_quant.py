"""Wan 2.1 image to video, 14B with CLIP, 480p, undistilled, int8 linear layers.

    python scripts/generate.py --config=configs/wan21_i2v_480p_quant.py --config.image=cat.jpg --config.prompt="Surfing"

Files: diffusion_pytorch_model*.safetensors, Wan2.1_VAE.pth, the text encoder, its tokenizer and the image encoder
models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth of huggingface.co/Wan-AI/Wan2.1-I2V-14B-480P.
Expect a 5 second video in the shape of the image, at the area of 832 x 480, after 40 steps with guidance. The weights
are quantized while they load. For 720p: --config.weights=Wan-AI/Wan2.1-I2V-14B-720P --config.resolution=720p
--config.shift=5.
"""

from turbojax.config import base_config


def get_config():
    config = base_config(model="wan2.1-i2v-14b", weights="Wan-AI/Wan2.1-I2V-14B-480P", quant_linear=True)
    config.update(sampler="unipc", num_inference_steps=40, guidance_scale=5.0, shift=3.0)
    return config

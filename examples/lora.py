"""A LoRA, merged while the weights load: W' = W + strength * (alpha / rank) * up down.

    python examples/lora.py

Writes a random LoRA for the small model, so that there is a file, and shows what its strength does to a video. Files of
the diffusers, the original and kohya's naming are read; of two experts LoRA(path, expert="high") names one.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from turbojax import TurboVideoPipeline
from turbojax.media.quality import psnr
from turbojax.shapes import MODEL
from turbojax.weights.lora import LoRA


def write_lora(path: Path, width: int, layers: int, rank: int = 4) -> None:
    rng = np.random.default_rng(0)
    tensors = {}
    for layer in range(layers):
        name = f"diffusion_model.blocks.{layer}.self_attn.q"
        tensors[f"{name}.lora_down.weight"] = rng.standard_normal((rank, width), np.float32) / np.sqrt(width)
        tensors[f"{name}.lora_up.weight"] = rng.standard_normal((width, rank), np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)


def main(folder: str = "outputs/examples", **size: int) -> None:
    size = {"height": 128, "width": 128, "num_frames": 33} | size
    plain = TurboVideoPipeline.from_pretrained(MODEL, dtype=jnp.float32)
    path = Path(folder) / "style.safetensors"
    write_lora(path, plain.config.dim, plain.config.num_layers)
    prompt = "a red star moving up right on a white background"
    without = plain(prompt, **size).videos
    for strength in (0.1, 0.5):
        pipe = TurboVideoPipeline.from_pretrained(MODEL, dtype=jnp.float32, loras=[LoRA(path, strength)])
        videos = pipe(prompt, output=f"{folder}/lora_{strength}.mp4", **size).videos
        print(f"strength {strength}: PSNR to the video without it {psnr(videos, without):.1f} dB")


if __name__ == "__main__":
    main()

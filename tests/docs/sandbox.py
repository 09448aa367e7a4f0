"""Fills a folder with all that the pages' commands name: repositories, checkpoints, a LoRA, a picture, clips, data."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from PIL import Image

from turbojax.media.video import save_video
from turbojax.shapes.demo import demo_configs, demo_picture, write_demo, write_encoders
from turbojax.train.toy import write_toy_shards
from turbojax.weights.io import write_pth, write_safetensors
from turbojax.weights.layouts import generated, official_layout, wan_layout

TURBO, BASE = "TurboDiffusion/TurboWan2.1-T2V-1.3B-480P", "Wan-AI/Wan2.1-T2V-1.3B"


def save(path: Path, tensors: dict[str, np.ndarray]) -> None:
    write_safetensors(path, tensors.items(), tensors)


def fill(folder: Path) -> None:
    wan, vae, t5 = demo_configs()
    sparse = dataclasses.replace(wan, attention_type="sla")

    turbo, base = (folder / name for name in (TURBO, BASE))
    for repository in (turbo, base):
        repository.mkdir(parents=True)
        write_encoders(repository, vae, t5)
    write_pth(turbo / "TurboWan2.1-T2V-1.3B-480P.pth", generated(wan_layout(sparse), jnp.bfloat16))
    save(base / "diffusion_pytorch_model.safetensors", dict(generated(official_layout(wan), jnp.bfloat16)))
    images = folder / "TurboDiffusion" / "TurboWan2.2-I2V-A14B-720P"
    images.mkdir()
    write_demo(images, image=True)

    for name, target in (
        ("TurboDiffusion/TurboWan2.1-T2V-14B-720P", TURBO),
        ("Wan2.1-T2V-1.3B", BASE),
        *((file.name, f"{TURBO}/{file.name}") for file in turbo.iterdir()),
    ):
        (folder / name).symlink_to(folder / target)

    for name, layout in (("rcm", wan), ("sla", sparse)):
        trained = folder / "outputs" / name / "transformer.safetensors"
        trained.parent.mkdir(parents=True)
        save(trained, dict(generated(official_layout(layout), jnp.bfloat16, seed=len(name))))
        (folder / f"{name}.safetensors").symlink_to(trained)
    rng = np.random.default_rng(0)
    layer = "diffusion_model.blocks.0.self_attn.q"
    factors = {"lora_down": (2, wan.dim), "lora_up": (wan.dim, 2)}
    lora = {f"{layer}.{name}.weight": rng.standard_normal(shape, np.float32) for name, shape in factors.items()}
    save(folder / "style.safetensors", lora)

    for name in ("cat.jpg", "cat.png"):
        Image.fromarray(demo_picture()).save(folder / name)
    (folder / "prompts.txt").write_text("a red bird\na blue car\n")
    (folder / "clips").mkdir()
    for name in ("a", "b"):
        save_video(rng.integers(0, 256, (9, 32, 48, 3), np.uint8), folder / "clips" / f"{name}.mp4")
        (folder / "clips" / f"{name}.txt").write_text(f"clip {name}\n")
    write_toy_shards(folder / "DATA")

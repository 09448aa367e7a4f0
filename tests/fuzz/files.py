"""Small valid files of every kind, which are damaged later."""

import functools
import json
import pickle
import struct
import zipfile
from collections.abc import Iterable
from io import BytesIO
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from turbojax.kernels.int8 import QuantConfig
from turbojax.models.clip import CLIPConfig
from turbojax.models.umt5 import UMT5Config
from turbojax.models.vae import VAEConfig
from turbojax.models.wan import WanConfig
from turbojax.weights import pth, safetensors
from turbojax.weights.layouts import clip_layout, diffusers_layout, generated, umt5_layout, vae_layout, wan_layout

Tensors = dict[str, np.ndarray]

WAN = WanConfig(dim=32, ffn_dim=48, num_heads=1, num_layers=2, text_dim=16, freq_dim=16)
INT8 = WanConfig(dim=128, ffn_dim=128, num_heads=1, num_layers=1, text_dim=16, freq_dim=16, quant=QuantConfig())
SLA = WanConfig(dim=32, ffn_dim=48, num_heads=2, num_layers=2, text_dim=16, freq_dim=16, attention_type="sla")
VAE = VAEConfig(dim=8, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(True,))
UMT5 = UMT5Config(vocab_size=40, dim=16, attention_dim=16, ffn_dim=24, num_heads=2, num_layers=2)
CLIP = CLIPConfig(dim=160, mlp_dim=32, num_heads=2, num_layers=2, image_size=28, patch=14)


@functools.cache
def networks() -> dict[str, list[Tensors]]:
    """The tensors of each kind of network, in the layouts that it is published in."""
    layouts = {
        "transformer": [wan_layout(WAN), wan_layout(SLA), wan_layout(INT8), diffusers_layout(WAN)],
        "vae": [vae_layout(VAE)],
        "umt5": [umt5_layout(UMT5)],
        "clip": [clip_layout(CLIP)],
    }
    out = {kind: [dict(generated(one, jnp.bfloat16)) for one in some] for kind, some in layouts.items()}
    out["lora"] = [lora("diffusion_model.{}.lora_down.weight", "diffusion_model.{}.lora_up.weight")]
    out["lora"] += [lora("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight")]
    values = np.arange(60, dtype=np.float32)
    plain = {name: values.astype(dtype) for name, dtype in safetensors.DTYPES.items() if name != "BOOL"}
    out["tensors"] = [plain | {"matrix": values.reshape(5, 12), "scalar": np.array(2.5), "empty": np.zeros((0, 3))}]
    return out


def lora(down: str, up: str) -> Tensors:
    """Two modules of the transformer WAN, with an alpha and a difference."""
    out: Tensors = {}
    for name, shape in (("blocks.0.self_attn.q", (32, 32)), ("blocks.1.ffn.0", (48, 32))):
        out[down.format(name)] = np.full((4, shape[1]), 0.5, np.float32)
        out[up.format(name)] = np.full((shape[0], 4), 0.25, np.float32)
    if down.startswith("diffusion_model"):
        out["diffusion_model.blocks.0.self_attn.q.alpha"] = np.array(2, np.float32)
        out["diffusion_model.blocks.1.norm3.diff_b"] = np.ones(32, np.float32)
    return out


def to_safetensors(tensors: Iterable[tuple[str, np.ndarray]], metadata: dict[str, str] | None = None) -> bytes:
    tensors = dict(tensors)
    content = b"".join(np.ascontiguousarray(value).tobytes() for value in tensors.values())
    return safetensors.make_header(tensors, metadata) + content


def to_pth(tensors: Tensors) -> bytes:
    """Writes a file as our writer does, and as PyTorch's newest."""
    file = BytesIO()
    pth.write(file, tensors.items())
    return file.getvalue()


def pickle_of(tensors: Tensors) -> tuple[bytes, dict[str, bytes]]:
    """The program and the storages of a checkpoint."""
    with zipfile.ZipFile(BytesIO(to_pth(tensors))) as archive:
        entries = {name.removeprefix("archive/"): archive.read(name) for name in archive.namelist()}
    return entries.pop("data.pkl"), entries


def zipped(program: bytes, entries: dict[str, bytes]) -> bytes:
    """A .pth file with this program, whatever it is, and right sums."""
    file = BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        for name, content in entries.items():
            archive.writestr(f"archive/{name}", content)
    return file.getvalue()


CONFIGURATION = {
    **{"dim": 32, "ffn_dim": 48, "num_heads": 1, "num_layers": 2, "in_channels": 16, "out_channels": 16},
    **{"patch": [1, 2, 2], "freq_dim": 16, "text_dim": 16, "text_len": 512, "clip_dim": None, "clip_images": 1},
    **{"eps": 1e-6, "attention_type": "sla", "sla_topk": 0.1, "sla_blocks": [64, 64], "sage_values": "float8"},
    **{"sigma_max": 80.0, "attention_implementation": None, "dtype": "bfloat16", "remat": False},
    "quant": {"scheme": "block128", "group": 128, "weight_only": False},
}
PUBLISHED = {"_class_name": "WanModel", "num_heads": 2, "dim": 32, "in_dim": 16, "eps": 1e-6}


def shards() -> dict[str, bytes]:
    """A folder of training data: two videos in one shard."""
    index: dict[str, Any] = {
        **{"format": "turbojax-latents", "version": 1, "latents": [2, 4, 4, 16], "text_dim": 8, "dtype": "bfloat16"},
        **{"num_frames": 5, "height": 32, "width": 32, "fps": 16, "vae": "v", "text_encoder": "t"},
        **{"negative_prompt": "", "shard_size": 2, "shards": [{"file": "shard-00000.safetensors", "samples": 2}]},
    }
    values = {
        "latents": np.ones((2, 2, 4, 4, 16), ml_dtypes.bfloat16),
        "text": np.ones((5, 8), ml_dtypes.bfloat16),
        "text_lengths": np.array([2, 3], np.int32),
    }
    samples = json.dumps([{"source": "a.mp4", "caption": "one"}, {"source": "b.mp4", "caption": "two"}])
    return {
        "index.json": json.dumps(index).encode(),
        "negative.safetensors": to_safetensors({"text": np.ones((1, 8), ml_dtypes.bfloat16)}.items()),
        "shard-00000.safetensors": to_safetensors(values.items(), {"samples": samples}),
    }


def sharded(tensors: Tensors) -> dict[str, bytes]:
    """A checkpoint in two files and their index."""
    names = ("a.safetensors", "b.safetensors")
    weight_map = {name: names[i % 2] for i, name in enumerate(tensors)}
    files = {
        shard: to_safetensors((name, tensors[name]) for name, home in weight_map.items() if home == shard)
        for shard in names
    }
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    return files | {"model.safetensors.index.json": json.dumps(index).encode()}


def plain_pickle(value: Any) -> bytes:
    """The instructions that make a value, without what opens and ends a program."""
    return pickle.dumps(value, protocol=2)[2:-1]


def with_length(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


def to_json(content: Any) -> bytes:
    return json.dumps(content).encode()

"""Small transformer checkpoints in every published arrangement, for tests.

The names of the other arrangements are made here by plain replacements, independent of the tables in turbojax.
"""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from turbojax.models.umt5 import UMT5Encoder
from turbojax.models.wan import WanConfig
from turbojax.weights.encoders import load_encoder, open_umt5
from turbojax.weights.io import write_pth, write_safetensors
from turbojax.weights.layouts import generated, wan_layout

Tensors = dict[str, np.ndarray]


def small(**changes) -> WanConfig:
    """Two layers; widths are multiples of 128, so that the linear layers can be int8."""
    sizes = dict(dim=256, ffn_dim=384, num_heads=2, num_layers=2, text_dim=64, dtype=jnp.float32)
    return WanConfig(**(sizes | changes))


def turbo(config: WanConfig | None = None, *, seed: int = 0) -> Tensors:
    """TurboDiffusion's arrangement."""
    config = config or small()
    return dict(generated(wan_layout(config), np.dtype(config.dtype), seed=seed))


def official(tensors: Tensors, patch: tuple[int, int, int] = (1, 2, 2)) -> Tensors:
    """Wan's own arrangement: the patch embedding is a Conv3d."""
    weight = tensors["patch_embedding.weight"]
    return tensors | {"patch_embedding.weight": weight.reshape(len(weight), -1, *patch)}


def training(tensors: Tensors) -> Tensors:
    """TurboDiffusion's training checkpoints: a prefix, wrappers inside names, bookkeeping."""
    wrapped = {
        f"net.{name}".replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."): tensors[name] for name in tensors
    }
    return wrapped | {"net.accum_video_sample_counter": np.zeros((), np.int64)}


# In this order, as diffusers' own conversion script has them.
DIFFUSERS = (
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("img_emb.proj.0", "condition_embedder.image_embedder.norm1"),
    ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
    ("img_emb.proj.4", "condition_embedder.image_embedder.norm2"),
    ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
    ("head.modulation", "scale_shift_table"),
    ("head.head", "proj_out"),
    ("modulation", "scale_shift_table"),
    ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2", "ffn.net.2"),
    ("norm3", "norm2"),
    ("self_attn", "attn1"),
    ("cross_attn", "attn2"),
    (".q.", ".to_q."),
    (".k.", ".to_k."),
    (".v.", ".to_v."),
    (".o.", ".to_out.0."),
    ("k_img.", "add_k_proj."),
    ("v_img.", "add_v_proj."),
    ("norm_add_k_proj.", "norm_added_k."),
)


def diffusers(tensors: Tensors) -> Tensors:
    renamed = {}
    for name, tensor in official(tensors).items():
        for ours, theirs in DIFFUSERS:
            name = name.replace(ours, theirs)
        renamed[name] = tensor
    return renamed


def parameters(model: nnx.Module) -> dict[str, np.ndarray]:
    """A module's arrays by dotted path."""
    flat = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): np.asarray(variable.get_value()) for path, variable in flat}


def save(path: Path, tensors: Tensors, **metadata: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pth":
        write_pth(path, tensors.items())
    else:
        write_safetensors(path, tensors.items(), tensors, metadata=metadata)
    return path


def save_shards(folder: Path, tensors: Tensors, *, shards: int = 3, stem: str = "diffusion_pytorch_model") -> Path:
    """Writes shards and their index; returns the index."""
    names = list(tensors)
    weight_map = {name: f"{stem}-{1 + i % shards:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)}
    for shard in set(weight_map.values()):
        save(folder / shard, {name: tensors[name] for name in names if weight_map[name] == shard})
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def load_umt5(path: Path, **options) -> UMT5Encoder:
    return load_encoder(open_umt5(path, **options))

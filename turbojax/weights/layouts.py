"""The published layouts: every name and shape of a checkpoint, in PyTorch's order of axes.

This is what `scripts/convert.py` writes, and the layout of files with generated values (the demo, tests).
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
from flax import nnx

from turbojax.kernels.int8 import BLOCK
from turbojax.kernels.sizes import cdiv
from turbojax.models.clip import CLIPConfig
from turbojax.models.umt5 import UMT5Config
from turbojax.models.vae import VAEConfig
from turbojax.models.wan import CLIP_TOKENS, WanConfig
from turbojax.weights.rules import Rule, rename

Layout = dict[str, tuple[int, ...]]


def linear(name: str, features_in: int, features_out: int, *, bias: bool = True) -> Layout:
    layout: Layout = {f"{name}.weight": (features_out, features_in)}
    return layout | {f"{name}.bias": (features_out,)} if bias else layout


def int8_linear(name: str, features_in: int, features_out: int, *, scheme: str) -> Layout:
    blocks = (cdiv(features_out, BLOCK), cdiv(features_in, BLOCK))
    return {
        f"{name}.int8_weight": (features_out, features_in),
        f"{name}.scale": blocks if scheme == "block128" else (features_out,),
        f"{name}.bias": (features_out,),
    }


def affine(name: str, features: int) -> Layout:
    return {f"{name}.weight": (features,), f"{name}.bias": (features,)}


def wan_layout(config: WanConfig) -> Layout:
    """TurboDiffusion's transformer: the official names, a linear patch embedding, `proj_l` with SLA, int8 linears."""
    c = config
    layout = linear("patch_embedding", c.in_channels * c.patch_features, c.dim)
    layout |= linear("text_embedding.0", c.text_dim, c.dim) | linear("text_embedding.2", c.dim, c.dim)
    layout |= linear("time_embedding.0", c.freq_dim, c.dim) | linear("time_embedding.2", c.dim, c.dim)
    layout |= linear("time_projection.1", c.dim, 6 * c.dim)
    for i in range(c.num_layers):
        layout |= wan_block_layout(f"blocks.{i}", c)
    layout |= {"head.modulation": (1, 2, c.dim)} | linear("head.head", c.dim, c.out_channels * c.patch_features)
    if c.clip_dim:
        layout |= affine("img_emb.proj.0", c.clip_dim) | linear("img_emb.proj.1", c.clip_dim, c.clip_dim)
        layout |= linear("img_emb.proj.3", c.clip_dim, c.dim) | affine("img_emb.proj.4", c.dim)
        if c.clip_images > 1:
            layout |= {"img_emb.emb_pos": (1, c.clip_images * CLIP_TOKENS, c.clip_dim)}
    return layout


def wan_block_layout(block: str, config: WanConfig) -> Layout:
    c = config
    quantizable = functools.partial(int8_linear, scheme=c.quant.scheme) if c.quant else linear
    layout: Layout = {f"{block}.modulation": (1, 6, c.dim)}
    names, norms = ("self_attn", "cross_attn"), ("norm_q", "norm_k", "norm_k_img")
    layout |= attention_layout(block, names, ("q", "k", "v", "o", "k_img", "v_img"), norms, c, quantizable)
    if c.attention_type != "original":
        layout |= linear(f"{block}.self_attn.attn_op.local_attn.proj_l", c.head_dim, c.head_dim)
    layout |= affine(f"{block}.norm3", c.dim)
    return layout | quantizable(f"{block}.ffn.0", c.dim, c.ffn_dim) | quantizable(f"{block}.ffn.2", c.ffn_dim, c.dim)


def attention_layout(
    block: str,
    names: tuple[str, str],
    linears: Sequence[str],
    norms: Sequence[str],
    config: WanConfig,
    linear: Callable[..., Layout],
) -> Layout:
    """Self- and cross-attention of a block; of its layers, only cross-attention has those past q, k, v and o."""
    layout: Layout = {}
    for name in names:
        image = name == names[1] and config.clip_dim is not None
        for own in linears if image else linears[:4]:
            layout |= linear(f"{block}.{name}.{own}", config.dim, config.dim)
        layout |= {f"{block}.{name}.{norm}.weight": (config.dim,) for norm in (norms if image else norms[:2])}
    return layout


def official_layout(config: WanConfig) -> Layout:
    """Wan's own transformer: the patch embedding is a Conv3d."""
    return wan_layout(config) | {"patch_embedding.weight": (config.dim, config.in_channels, *config.patch)}


def diffusers_layout(config: WanConfig) -> Layout:
    """diffusers' WanTransformer3DModel."""
    c = config
    layout: Layout = {"patch_embedding.weight": (c.dim, c.in_channels, *c.patch), "patch_embedding.bias": (c.dim,)}
    for name, features_in in (("time_embedder", c.freq_dim), ("text_embedder", c.text_dim)):
        layout |= linear(f"condition_embedder.{name}.linear_1", features_in, c.dim)
        layout |= linear(f"condition_embedder.{name}.linear_2", c.dim, c.dim)
    layout |= linear("condition_embedder.time_proj", c.dim, 6 * c.dim)
    if c.clip_dim:
        image = "condition_embedder.image_embedder"
        layout |= affine(f"{image}.norm1", c.clip_dim) | linear(f"{image}.ff.net.0.proj", c.clip_dim, c.clip_dim)
        layout |= linear(f"{image}.ff.net.2", c.clip_dim, c.dim) | affine(f"{image}.norm2", c.dim)
    for i in range(c.num_layers):
        layout |= diffusers_block_layout(f"blocks.{i}", c)
    return layout | {"scale_shift_table": (1, 2, c.dim)} | linear("proj_out", c.dim, c.out_channels * c.patch_features)


def diffusers_block_layout(block: str, config: WanConfig) -> Layout:
    c = config
    linears = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")
    layout: Layout = {f"{block}.scale_shift_table": (1, 6, c.dim)}
    layout |= attention_layout(block, ("attn1", "attn2"), linears, ("norm_q", "norm_k", "norm_added_k"), c, linear)
    layout |= affine(f"{block}.norm2", c.dim)
    return layout | linear(f"{block}.ffn.net.0.proj", c.dim, c.ffn_dim) | linear(f"{block}.ffn.net.2", c.ffn_dim, c.dim)


def umt5_layout(config: UMT5Config) -> Layout:
    """models_t5_umt5-xxl-enc-bf16.pth."""
    c = config
    layout: Layout = {"token_embedding.weight": (c.vocab_size, c.dim)}
    for i in range(c.num_layers):
        block = f"blocks.{i}"
        layout |= {f"{block}.norm1.weight": (c.dim,)}
        for name in "qkv":
            layout |= linear(f"{block}.attn.{name}", c.dim, c.attention_dim, bias=False)
        layout |= linear(f"{block}.attn.o", c.attention_dim, c.dim, bias=False)
        layout |= {f"{block}.norm2.weight": (c.dim,)}
        layout |= linear(f"{block}.ffn.gate.0", c.dim, c.ffn_dim, bias=False)
        layout |= linear(f"{block}.ffn.fc1", c.dim, c.ffn_dim, bias=False)
        layout |= linear(f"{block}.ffn.fc2", c.ffn_dim, c.dim, bias=False)
        layout |= {f"{block}.pos_embedding.embedding.weight": (c.num_buckets, c.num_heads)}
    return layout | {"norm.weight": (c.dim,)}


def clip_layout(config: CLIPConfig) -> Layout:
    """The image encoder of models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth, without what does not run.

    The file also holds a last layer, `post_norm`, `head` (so named, after the layers) and the text encoder `textual`.
    """
    c = config
    layout: Layout = {
        "visual.cls_embedding": (1, 1, c.dim),
        "visual.pos_embedding": (1, c.tokens, c.dim),
        "visual.patch_embedding.weight": (c.dim, 3, c.patch, c.patch),
    }
    layout |= affine("visual.pre_norm", c.dim)
    for i in range(c.num_layers):
        layer = f"visual.transformer.{i}"
        layout |= affine(f"{layer}.norm1", c.dim) | linear(f"{layer}.attn.to_qkv", c.dim, 3 * c.dim)
        layout |= linear(f"{layer}.attn.proj", c.dim, c.dim) | affine(f"{layer}.norm2", c.dim)
        layout |= linear(f"{layer}.mlp.0", c.dim, c.mlp_dim) | linear(f"{layer}.mlp.2", c.mlp_dim, c.dim)
    return layout


def convolution(name: str, features_in: int, features_out: int, *kernel: int) -> Layout:
    return {f"{name}.weight": (features_out, features_in, *kernel), f"{name}.bias": (features_out,)}


def residual(name: str, features_in: int, features_out: int) -> Layout:
    layout: Layout = {f"{name}.residual.0.gamma": (features_in, 1, 1, 1)}
    layout |= convolution(f"{name}.residual.2", features_in, features_out, 3, 3, 3)
    layout |= {f"{name}.residual.3.gamma": (features_out, 1, 1, 1)}
    layout |= convolution(f"{name}.residual.6", features_out, features_out, 3, 3, 3)
    if features_in != features_out:
        layout |= convolution(f"{name}.shortcut", features_in, features_out, 1, 1, 1)
    return layout


def middle(name: str, features: int) -> Layout:
    layout = residual(f"{name}.0", features, features) | {f"{name}.1.norm.gamma": (features, 1, 1)}
    layout |= convolution(f"{name}.1.to_qkv", features, 3 * features, 1, 1)
    layout |= convolution(f"{name}.1.proj", features, features, 1, 1)
    return layout | residual(f"{name}.2", features, features)


def vae_layout(config: VAEConfig) -> Layout:
    """Wan2.1_VAE.pth."""
    c = config
    widths = [c.dim * m for m in c.dim_mult]
    return (
        encoder_layout(c, widths)
        | convolution("conv1", 2 * c.z_dim, 2 * c.z_dim, 1, 1, 1)
        | convolution("conv2", c.z_dim, c.z_dim, 1, 1, 1)
        | decoder_layout(c, widths[::-1])
    )


def encoder_layout(config: VAEConfig, widths: list[int]) -> Layout:
    layout = convolution("encoder.conv1", 3, widths[0], 3, 3, 3)
    index, width = 0, widths[0]
    for stage, out in enumerate(widths):
        for _ in range(config.num_res_blocks):
            layout |= residual(f"encoder.downsamples.{index}", width, out)
            index, width = index + 1, out
        if stage < len(config.temporal_downsample):
            layout |= convolution(f"encoder.downsamples.{index}.resample.1", width, width, 3, 3)
            if config.temporal_downsample[stage]:
                layout |= convolution(f"encoder.downsamples.{index}.time_conv", width, width, 3, 1, 1)
            index += 1
    layout |= middle("encoder.middle", width) | {"encoder.head.0.gamma": (width, 1, 1, 1)}
    return layout | convolution("encoder.head.2", width, 2 * config.z_dim, 3, 3, 3)


def decoder_layout(config: VAEConfig, widths: list[int]) -> Layout:
    layout = convolution("decoder.conv1", config.z_dim, widths[0], 3, 3, 3) | middle("decoder.middle", widths[0])
    index, width = 0, widths[0]
    for stage, out in enumerate(widths):
        for _ in range(config.num_res_blocks + 1):
            layout |= residual(f"decoder.upsamples.{index}", width, out)
            index, width = index + 1, out
        if stage < len(config.temporal_downsample):
            if config.temporal_downsample[::-1][stage]:
                layout |= convolution(f"decoder.upsamples.{index}.time_conv", width, 2 * width, 3, 1, 1)
            layout |= convolution(f"decoder.upsamples.{index}.resample.1", width, width // 2, 3, 3)
            index, width = index + 1, width // 2
    layout |= {"decoder.head.0.gamma": (width, 1, 1, 1)}
    return layout | convolution("decoder.head.2", width, 3, 3, 3, 3)


def generated(layout: Mapping[str, tuple[int, ...]], dtype, *, seed: int = 0) -> Iterator[tuple[str, np.ndarray]]:
    """Generates tensors, one at a time, whose values keep activations near unit size; for demos and tests.

    int8 weights and their float32 scales keep their own types, everything else has `dtype`.
    """
    rng = np.random.default_rng(seed)
    for name, shape in layout.items():
        if name.endswith("int8_weight"):
            yield name, rng.integers(-127, 128, shape, np.int8)
        elif name.endswith(".scale"):
            features_in = layout[name.removesuffix("scale") + "int8_weight"][1]
            yield name, np.full(shape, 3**0.5 / 127 / features_in**0.5, np.float32)
        else:
            normal = rng.standard_normal(shape, np.float32)
            yield name, (value_of(name, normal)).astype(dtype)


def value_of(name: str, normal: np.ndarray) -> np.ndarray:
    is_norm = normal.size == max(normal.shape) and not name.endswith("bias")
    if is_norm:
        return 1 + 0.1 * normal
    if name.endswith("bias"):
        return 0.02 * normal
    if name.endswith("token_embedding.weight"):
        return normal
    return normal / np.sqrt(normal.size / len(normal) if normal.shape[0] > 1 else normal.shape[-1])


def layout_tensors(module: nnx.Module, layout: Layout, rules: Iterable[Rule]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the module's parameters one after the other as the checkpoint of that layout holds them.

    rules: those that read the layout. Their transforms only move elements, so running them on the places of the
    elements tells where each one comes from. Names that no parameter stands behind are left out.
    """
    parameters = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(module))}
    rules = tuple(rules)
    for name, shape in layout.items():
        hit = rename(name, rules)
        assert hit is not None, name
        (target, layer), rule = hit
        if rule.target is None:
            continue
        value = np.asarray(parameters[target].get_value() if layer is None else parameters[target].get_value()[layer])
        if rule.transform is not None:
            places = rule.transform(np.arange(value.size).reshape(shape))
            moved = np.empty(value.size, value.dtype)
            moved[places.ravel()] = value.ravel()
            value = moved
        yield name, value.reshape(shape)

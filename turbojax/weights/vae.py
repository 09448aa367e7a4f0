"""Names of Wan 2.1 autoencoder checkpoints: official (Wan2.1_VAE.pth) and diffusers (AutoencoderKLWan)."""

import re
from collections.abc import Mapping

import numpy as np

from turbojax.errors import CheckpointError
from turbojax.models.vae import VAEConfig
from turbojax.weights.rules import Rule, conv2d_kernel, conv3d_kernel, rename


def as_linear(weight: np.ndarray) -> np.ndarray:
    """A convolution of one pixel, [out, in, 1, ...], as the linear layer [out, in]."""
    return weight.reshape(weight.shape[:2])


def convolution(pattern: str, target: str, transform=conv3d_kernel) -> tuple[Rule, Rule]:
    return Rule(pattern + r"\.weight", target + ".kernel", transform), Rule(pattern + r"\.bias", target + ".bias")


def linear(pattern: str, target: str) -> tuple[Rule, Rule]:
    return Rule(pattern + r"\.weight", target + ".weight", as_linear), Rule(pattern + r"\.bias", target + ".bias")


def norm(pattern: str, target: str) -> Rule:
    return Rule(pattern + r"\.gamma", target + ".gamma", np.ravel)


def resampling(pattern: str, target: str) -> tuple[Rule, ...]:
    return (
        *convolution(pattern + r"\.resample\.1", target + ".conv", conv2d_kernel),
        *convolution(pattern + r"\.time_conv", target + ".time_conv"),
    )


def attention(pattern: str, target: str) -> tuple[Rule, ...]:
    return (
        norm(pattern + r"\.norm", target + ".norm"),
        *linear(pattern + r"\.to_qkv", target + ".to_qkv"),
        *linear(pattern + r"\.proj", target + ".proj"),
    )


def residual(pattern: str, target: str, names: tuple[str, str, str, str, str]) -> tuple[Rule, ...]:
    """A residual block; names: of its norms, convolutions and shortcut, in the order of the block."""
    norm1, conv1, norm2, conv2, shortcut = (rf"{pattern}\.{name}" for name in names)
    return (
        norm(norm1, f"{target}.norm1"),
        *convolution(conv1, f"{target}.conv1"),
        norm(norm2, f"{target}.norm2"),
        *convolution(conv2, f"{target}.conv2"),
        *linear(shortcut, f"{target}.shortcut"),
    )


_OFFICIAL_RESIDUAL = (r"residual\.0", r"residual\.2", r"residual\.3", r"residual\.6", "shortcut")
_DIFFUSERS_RESIDUAL = ("norm1", "conv1", "norm2", "conv2", "conv_shortcut")

VAE_OFFICIAL: tuple[Rule, ...] = (
    *linear("conv1", "quant"),
    *linear("conv2", "post_quant"),
    *convolution(r"(encoder|decoder)\.conv1", r"\1.conv_in"),
    norm(r"(encoder|decoder)\.head\.0", r"\1.norm"),
    *convolution(r"(encoder|decoder)\.head\.2", r"\1.conv_out"),
    *attention(r"(encoder|decoder)\.middle\.1", r"\1.middle.1"),
    *residual(r"(encoder|decoder)\.(middle|downsamples|upsamples)\.(\d+)", r"\1.\2.\3", _OFFICIAL_RESIDUAL),
    *resampling(r"(encoder|decoder)\.(downsamples|upsamples)\.(\d+)", r"\1.\2.\3"),
)

# Diffusers keeps the encoder's flat list of blocks, but sorts the decoder's into stages of three residual
# blocks and an upsampler (none in the last stage). This is the released depth; no other is published.
_UP_STAGES, _UP_BLOCKS = 4, 3


def up_block(index: int) -> tuple[Rule, ...]:
    """Rules of one of the decoder's blocks by its place in the official list."""
    stage, block = divmod(index, _UP_BLOCKS + 1)
    pattern, target = rf"decoder\.up_blocks\.{stage}", f"decoder.upsamples.{index}"
    if block == _UP_BLOCKS:
        return resampling(rf"{pattern}\.upsamplers\.0", target)
    return residual(rf"{pattern}\.resnets\.{block}", target, _DIFFUSERS_RESIDUAL)


MAX_BLOCKS = 64  # of an encoder; the released one has 11, and each takes time before the rest can be checked

VAE_DIFFUSERS: tuple[Rule, ...] = (
    *linear("quant_conv", "quant"),
    *linear("post_quant_conv", "post_quant"),
    *convolution(r"(encoder|decoder)\.conv_in", r"\1.conv_in"),
    norm(r"(encoder|decoder)\.norm_out", r"\1.norm"),
    *convolution(r"(encoder|decoder)\.conv_out", r"\1.conv_out"),
    *attention(r"(encoder|decoder)\.mid_block\.attentions\.0", r"\1.middle.1"),
    *residual(r"(encoder|decoder)\.mid_block\.resnets\.0", r"\1.middle.0", _DIFFUSERS_RESIDUAL),
    *residual(r"(encoder|decoder)\.mid_block\.resnets\.1", r"\1.middle.2", _DIFFUSERS_RESIDUAL),
    *residual(r"encoder\.down_blocks\.(\d+)", r"encoder.downsamples.\1", _DIFFUSERS_RESIDUAL),
    *resampling(r"encoder\.down_blocks\.(\d+)", r"encoder.downsamples.\1"),
    *(rule for index in range(_UP_STAGES * (_UP_BLOCKS + 1) - 1) for rule in up_block(index)),
)


def vae_rules(tensors: Mapping[str, np.ndarray]) -> tuple[Rule, ...]:
    """The table for a checkpoint's names. Raises CheckpointError if it is no Wan 2.1 autoencoder."""
    if "encoder.conv1.weight" in tensors and "conv2.weight" in tensors:
        return VAE_OFFICIAL
    if "encoder.conv_in.weight" in tensors and "post_quant_conv.weight" in tensors:
        return VAE_DIFFUSERS
    names = ", ".join(sorted(tensors)[:3]) or "nothing"
    raise CheckpointError(
        f"this is no Wan 2.1 autoencoder: it holds {names}, ...; "
        "give Wan2.1_VAE.pth or the vae folder of a diffusers model"
    )


def detect_vae_config(tensors: Mapping[str, np.ndarray], **changes) -> VAEConfig:
    """Reads widths, depth and temporal steps off names and shapes; mean and std are the released constants.

    changes: fields to set by hand, for instance dtype. Raises CheckpointError for any other kind of file.
    """
    rules = vae_rules(tensors)
    shapes = {
        hit[0].target: t.shape
        for name, t in tensors.items()
        if 0 not in (t.ndim, t.size) and (hit := rename(name, rules))
    }
    block = re.compile(r"encoder\.downsamples\.(\d{1,3})\.(conv1|conv|time_conv)\.kernel")
    blocks: dict[int, dict[str, int]] = {}  # out channels of the convolutions in each block of the encoder
    for target, shape in shapes.items():
        if match := block.fullmatch(target):
            blocks.setdefault(int(match[1]), {})[match[2]] = shape[0]
    widths: list[int] = []
    temporal: list[bool] = []
    depth = 0
    for _, convs in sorted(blocks.items()):
        if "conv" in convs:  # the step that ends a stage; the last stage has none
            temporal.append("time_conv" in convs)
        elif "conv1" in convs:  # a residual block
            depth += 1
            if len(widths) == len(temporal):
                widths.append(convs["conv1"])
    try:
        dim, z_dim = shapes["encoder.conv_in.kernel"][0], shapes["post_quant.weight"][0]
        if any(width % dim for width in widths) or depth % len(widths) or len(blocks) > MAX_BLOCKS:
            raise ValueError
        found = dict(
            dim=dim,
            z_dim=z_dim,
            dim_mult=tuple(width // dim for width in widths),
            num_res_blocks=depth // len(widths),
            temporal_downsample=tuple(temporal),
        )
        return VAEConfig(**(found | changes))
    except (ValueError, LookupError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"this is no Wan 2.1 autoencoder: {depth} residual blocks in stages of {widths} channels; "
            "give Wan2.1_VAE.pth or the vae folder of a diffusers model, but not Wan 2.2's 5B autoencoder"
        ) from error

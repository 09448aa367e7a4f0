"""Layers that the models share: linear layers, norms, rotary and time embeddings.

B batch, L tokens, N heads, H head dim, D width. Linear weights are `[out, in]`, as published and as int8 tensor cores
want them. Parameters are stored in the model's dtype (norms and modulation in float32) and reductions run in float32.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from turbojax.kernels import int8
from turbojax.kernels.norms import Residual, Table, along_last, layer_norm, modulated_norm, rms_norm, rms_norm_rotate


class Dense(nnx.Module):
    """y = x W^T + b, x `[..., in]` -> `[..., out]` in x's dtype, accumulated in float32; add_to takes the sum."""

    def __init__(self, features_in: int, features_out: int, *, use_bias: bool = True, dtype, rngs: nnx.Rngs):
        scale = 1 / math.sqrt(features_in)
        self.weight = nnx.Param(scale * jax.random.normal(rngs.params(), (features_out, features_in), dtype))
        self.bias: Any = nnx.Param(jnp.zeros(features_out, dtype)) if use_bias else None

    def __call__(self, x: Float[Array, "*rows in"], *, add_to: Residual | None = None) -> Float[Array, "*rows out"]:
        y = contract(x, self.weight[...].astype(x.dtype))
        y = y if self.bias is None else y + along_last(self.bias[...], y)
        return y if add_to is None else add_to.plus(y)

    # The next three are what a layer and its int8 form have in common: the block is written once for both.

    def prepare(self, x: Float[Array, "*rows in"]) -> Float[Array, "*rows in"]:
        """Returns x in the form that the layer multiplies, for use by several layers: as it is, or quantized."""
        return x

    def prepare_normed(
        self, x: Float[Array, "B L D"], gain: jax.Array, shift: jax.Array, *, eps: float
    ) -> Float[Array, "B L D"]:
        """Returns `modulated_norm` of x in that form."""
        return modulated_norm(x, gain, shift, eps=eps)

    def gelu(self, x: Float[Array, "*rows in"]) -> Float[Array, "*rows out"]:
        """Returns GELU (tanh) of the layer's result, in the form that a following layer of its kind takes."""
        return jax.nn.gelu(self(x))


class Int8Dense(nnx.Module):
    """Dense with an int8 weight `[out, in]`, dequantized inside the matmul, see `turbojax.kernels.int8.reference`."""

    def __init__(self, features_in: int, features_out: int, *, quant: int8.QuantConfig, dtype, rngs: nnx.Rngs):
        self.quant, self.dtype = quant, dtype
        weight = jax.random.normal(rngs.params(), (features_out, features_in), jnp.float32)
        q, scale = int8.quantize_weight(weight / math.sqrt(features_in), quant.scheme)
        self.weight, self.scale = nnx.Param(q), nnx.Param(scale)
        self.bias = nnx.Param(jnp.zeros(features_out, dtype))

    def prepare(self, x: jax.Array) -> jax.Array | int8.Quantized:
        return x if self.quant.weight_only else int8.quantize(x, self.quant)

    def prepare_normed(
        self, x: jax.Array, gain: jax.Array, shift: jax.Array, *, eps: float
    ) -> jax.Array | int8.Quantized:
        if self.quant.weight_only:
            return modulated_norm(x, gain, shift, eps=eps)
        return int8.norm_quantize(x, gain, shift, self.quant, eps=eps)

    def __call__(
        self, x: Float[Array, "*rows in"] | int8.Quantized, *, add_to: Residual | None = None
    ) -> Float[Array, "*_rows out"]:
        if self.quant.weight_only:
            y = self._dequantizing(x, gelu=False)
            return y if add_to is None else add_to.plus(y)
        return int8.matmul(self._quantized(x), *self._parameters(), self.quant, add_to=add_to, dtype=self.dtype)

    def gelu(self, x: jax.Array | int8.Quantized) -> jax.Array | int8.Quantized:
        if self.quant.weight_only:
            return self._dequantizing(x, gelu=True)
        return int8.matmul_requantize(self._quantized(x), *self._parameters(), self.quant, gelu=True, dtype=self.dtype)

    def _dequantizing(self, x: jax.Array | int8.Quantized, *, gelu: bool) -> jax.Array:
        assert isinstance(x, jax.Array)
        return int8.dequantizing_matmul(x, *self._parameters(), self.quant, gelu=gelu)

    def _quantized(self, x: jax.Array | int8.Quantized) -> int8.Quantized:
        return x if isinstance(x, int8.Quantized) else int8.quantize(x, self.quant)

    def _parameters(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        return self.weight[...], self.scale[...], self.bias[...]


class RMSNorm(nnx.Module):
    """x / rms(x) * weight over the last axis, in float32."""

    def __init__(self, features: int, *, eps: float = 1e-6):
        self.eps = eps
        self.weight = nnx.Param(jnp.ones(features, jnp.float32))

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        return rms_norm(x, self.weight[...], eps=self.eps)

    def rotated(self, x: Float[Array, "B L D"], table: Table) -> Float[Array, "B L N H"]:
        """Returns the norm of x, rotated by heads."""
        return rms_norm_rotate(x, self.weight[...], table, eps=self.eps)


class LayerNorm(nnx.Module):
    """Layer norm with weight and bias over the last axis, in float32."""

    def __init__(self, features: int, *, eps: float = 1e-6):
        self.eps = eps
        self.weight = nnx.Param(jnp.ones(features, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(features, jnp.float32))

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        return layer_norm(x, self.weight[...], self.bias[...], eps=self.eps)

    def affine(self) -> tuple[Float[Array, "1 1 D"], Float[Array, "1 1 D"]]:
        """Returns gain and shift as `modulated_norm` takes them."""
        return self.weight[...].reshape(1, 1, -1), self.bias[...].reshape(1, 1, -1)


class MLP(nnx.Module):
    """fc2(activation(fc1(x)))."""

    def __init__(self, sizes: tuple[int, int, int], activation, *, dtype, rngs: nnx.Rngs):
        features_in, hidden, features_out = sizes
        self.activation = activation
        self.fc1 = Dense(features_in, hidden, dtype=dtype, rngs=rngs)
        self.fc2 = Dense(hidden, features_out, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*rows in"]) -> Float[Array, "*rows out"]:
        return self.fc2(self.activation(self.fc1(x)))


def stack_blocks(block: Callable[..., nnx.Module], config: Any, rngs: nnx.Rngs) -> Any:
    """Makes `config.num_layers` blocks whose parameters are stacked `[layers, ...]`."""

    @nnx.split_rngs(splits=config.num_layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs: nnx.Rngs) -> nnx.Module:
        return block(config, rngs=rngs)

    return make(rngs)


def scan_blocks(blocks: nnx.Module, x: Float[Array, "B L D"], context: tuple) -> Float[Array, "B L D"]:
    """Runs x through stacked blocks, `block(x, *context)` each: one scan, so that all of them compile as one."""
    graph, layers = nnx.split(blocks)

    def run_block(x, layer):
        return nnx.merge(graph, layer)(x, *context), None

    return lax.scan(run_block, x, layers)[0]


def split_heads(x: Float[Array, "B L D"], heads: int) -> Float[Array, "B L N H"]:
    """Splits the width into heads."""
    return x.reshape(*x.shape[:-1], heads, -1)


def contract(x: Float[Array, "*rows in"], weight: Float[Array, "out in"]) -> Float[Array, "*rows out"]:
    """x W^T in x's dtype.

    Sums are float32, on the tensor cores and on CPUs; asked for as a result they would go through memory as such.
    """
    return lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())))


def rotary_pairs(head_dim: int) -> tuple[int, int, int]:
    """Returns the rotated pairs for time, height and width: height and width take head_dim // 6 each, time the rest."""
    side = head_dim // 6
    return head_dim // 2 - 2 * side, side, side


def rotary_angles(size: int, pairs: int, *, theta: float = 10000.0) -> Float[np.ndarray, "size pairs"]:
    """Returns the angles of one axis, position * theta^(-i / pairs), in float32."""
    return np.outer(np.arange(size), theta ** (-np.arange(pairs) / max(pairs, 1))).astype(np.float32)


def rotary_table(grid: tuple[int, int, int], head_dim: int) -> Table:
    """Returns cos and sin of the 3-D rotary embedding, float32 `[L, head_dim / 2]` each.

    grid: patches in time, height and width; tokens run with width fastest. Each axis has its own exponent range.
    """
    axes = [rotary_angles(size, n) for size, n in zip(grid, rotary_pairs(head_dim), strict=True)]
    cos, sin = (over_tokens([f(a) for a in axes], grid) for f in (np.cos, np.sin))
    return cos, sin


def over_tokens(axes: list[np.ndarray], grid: tuple[int, int, int]) -> Float[Array, "L pairs"]:
    """Turns per-axis rows `[size, n]` into one row a token; only the small axes become constants."""
    parts = []
    for i, axis in enumerate(axes):
        shape = [1, 1, 1, axis.shape[1]]
        shape[i] = grid[i]
        parts.append(jnp.broadcast_to(jnp.asarray(axis).reshape(shape), (*grid, axis.shape[1])))
    return jnp.concatenate(parts, axis=-1).reshape(math.prod(grid), -1)


def time_sinusoid(timesteps: Float[Array, " B"], dim: int) -> Float[Array, "B dim"]:
    """Returns cos and then sin of t * 10000^(-i / half), float32; timesteps in 0..1000.

    The reference works in float64. Here the phase is counted in turns and split so that the large product is exact
    in float32 and its whole turns can be dropped: the error stays below 1.5e-6, plain float32 reaches 6e-5.
    """
    half = dim // 2
    turns = 10000.0 ** (-np.arange(half) / half) / (2 * np.pi)
    mantissa, exponent = np.frexp(turns)
    coarse = np.ldexp(np.round(mantissa * 2**12), exponent - 12)  # 12 bits, so that 12 bits of t times it fit in 24
    t = timesteps.astype(jnp.float32)[:, None]
    t_coarse = lax.reduce_precision(t, exponent_bits=8, mantissa_bits=11)
    whole = t_coarse * jnp.asarray(coarse, jnp.float32)[None]
    phase = whole - jnp.floor(whole)
    phase = phase + t_coarse * jnp.asarray(turns - coarse, jnp.float32)[None]
    phase = phase + (t - t_coarse) * jnp.asarray(turns, jnp.float32)[None]
    angle = (2 * np.pi) * phase
    return jnp.concatenate((jnp.cos(angle), jnp.sin(angle)), axis=-1)

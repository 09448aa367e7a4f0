"""Kernels and bytes of compiled programs: a program by hand, and one that XLA compiles."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from turbojax.bench import hlo

PROGRAM = """HloModule jit_f, is_scheduled=true

%slice_and_multiply (p0: s8[2,256,128], p1: s32[], p2: bf16[64,128]) -> (bf16[64,256], s8[1024]) {
  %p0 = s8[2,256,128]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %own = s8[1,256,128]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,256,128}
  %flat = s8[256,128]{1,0} bitcast(%own)
  %p2 = bf16[64,128]{1,0} parameter(2)
  ROOT %product = (bf16[64,256]{1,0}, s8[1024]{0}) custom-call(%p2, %flat), custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(f)/while/body/dot_general"}
}

%write (p0: f32[4,64,256], p1: bf16[64,256], p2: s32[]) -> f32[4,64,256] {
  %p0 = f32[4,64,256]{2,1,0} parameter(0)
  %p1 = bf16[64,256]{1,0} parameter(1)
  %wide = f32[1,64,256]{2,1,0} convert(%p1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %into = f32[4,64,256]{2,1,0} dynamic-update-slice(%p0, %wide, %p2, %zero, %zero)
}

%body (carry: (s32[], s8[2,256,128], bf16[64,128], f32[4,64,256])) -> (s32[], s8[2,256,128], bf16[64,128], f32[4,64,256]) {
  %carry = (s32[], s8[2,256,128]{2,1,0}, bf16[64,128]{1,0}, /*index=3*/f32[4,64,256]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %weights = s8[2,256,128]{2,1,0} get-tuple-element(%carry), index=1
  %x = bf16[64,128]{1,0} get-tuple-element(%carry), index=2
  %stack = f32[4,64,256]{2,1,0} get-tuple-element(%carry), index=3
  %multiply = (bf16[64,256]{1,0}, s8[1024]{0}) fusion(%weights, %i, %x), kind=kCustom, calls=%slice_and_multiply
  %y = bf16[64,256]{1,0} get-tuple-element(%multiply), index=0
  %written = f32[4,64,256]{2,1,0} fusion(%stack, %y, %i), kind=kLoop, calls=%write
  ROOT %next = (s32[], s8[2,256,128]{2,1,0}, bf16[64,128]{1,0}, /*index=3*/f32[4,64,256]{2,1,0}) tuple(%i, %weights, %x, %written)
}

ENTRY %main (start: (s32[], s8[2,256,128], bf16[64,128], f32[4,64,256])) -> f32[4,64,256] {
  %start = (s32[], s8[2,256,128]{2,1,0}, bf16[64,128]{1,0}, f32[4,64,256]{2,1,0}) parameter(0)
  %loop = (s32[], s8[2,256,128]{2,1,0}, bf16[64,128]{1,0}, f32[4,64,256]{2,1,0}) while(%start), condition=%never, body=%body
  ROOT %result = f32[4,64,256]{2,1,0} get-tuple-element(%loop), index=3
}
"""  # noqa: E501


def test_slices_updates_and_workspace():
    """A slice of a stack and an updated part count alone, a library's workspace not at all."""
    assert hlo.kernels(PROGRAM) == []
    assert hlo.loop_bodies(PROGRAM) == ["body"]
    multiply, write = hlo.kernels(PROGRAM, within="body")
    assert (multiply.name, multiply.opcode) == ("multiply", "__cublas$lt$matmul")
    assert multiply.source == "jit(f)/while/body/dot_general"
    assert multiply.bytes == 256 * 128 + 4 + 2 * 64 * 128 + 2 * 64 * 256
    assert write.outputs == (hlo.Array("f32", (1, 64, 256)),)
    assert write.bytes == 2 * 64 * 256 + 4 + 4 * 64 * 256


def test_a_compiled_program():
    def f(x, weights):
        return lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, weights)[0]

    spec = jax.ShapeDtypeStruct
    text = jax.jit(f).lower(spec((64, 128), jnp.float32), spec((3, 128, 128), jnp.float32)).compile().as_text()
    (body,) = hlo.loop_bodies(text)
    moved = sum(kernel.bytes for kernel in hlo.kernels(text, within=body))
    assert moved >= 4 * (128 * 128 + 2 * 64 * 128)
    assert hlo.Array("f32", (64, 128)) in [array for k in hlo.kernels(text, within=body) for array in k.outputs]


@pytest.mark.parametrize(
    ("dtype", "size"), [("pred", 1), ("bf16", 2), ("f8e4m3fn", 1), ("s8", 1), ("u32", 4), ("f64", 8)]
)
def test_bytes_of_types(dtype, size):
    assert hlo.Array(dtype, (3, 5)).bytes == 15 * size

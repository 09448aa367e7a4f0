"""Runs Triton kernels on a CPU: the Triton interpreter on NumPy arrays, in the launcher's place.

Import with TRITON_INTERPRET=1 in the environment, before any kernel.
"""

import os
import threading

import jax
import ml_dtypes
import numpy as np
import triton.language as tl
from triton.runtime import interpreter

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1 before kernels are imported"

# A kernel has run when its call returns: one that waited for its arguments in the background would read what a test
# changes afterwards. Set before the first array.
jax.config.update("jax_cpu_enable_async_dispatch", False)

TYPES = {
    np.dtype(np.int8): tl.int8,
    np.dtype(np.int32): tl.int32,
    np.dtype(np.float32): tl.float32,
    np.dtype(ml_dtypes.bfloat16): tl.bfloat16,
    np.dtype(ml_dtypes.float8_e4m3fn): tl.float8e4nv,
}


class HostTensor:
    """As much of a tensor as the interpreter asks for; host and device are the same memory."""

    def __init__(self, array: np.ndarray):
        self.array = array
        self.dtype = TYPES[array.dtype]

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> "HostTensor":
        return self

    def cpu(self) -> "HostTensor":
        return self

    def new_empty(self, size: int, device: str) -> "HostTensor":
        return HostTensor(np.empty(size, self.array.dtype))

    def set_(self, storage: "HostTensor", *_) -> None:
        self.array = storage.array

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        return tuple(s // self.array.itemsize for s in self.array.strides)

    def copy_(self, other: "HostTensor") -> None:
        assert other.array is self.array


one_at_a_time = threading.Lock()  # the interpreter patches Triton while it runs; XLA may call from several threads


def launch(kernel, *arrays, out_shape, grid, num_warps, num_stages, input_output_aliases, **constants):
    """As `jax_triton.triton_call`; outputs start as poison, so that a hole shows, or overwrite an array."""

    def run(*arrays):
        inputs = [np.ascontiguousarray(a) for a in arrays]
        outputs = [poisoned(s) for s in out_shape]
        for i, o in input_output_aliases.items():
            assert (inputs[i].shape, inputs[i].dtype) == (outputs[o].shape, outputs[o].dtype)
            inputs[i] = outputs[o] = inputs[i].copy()
        with one_at_a_time:
            kernel[grid](*map(HostTensor, inputs + outputs), **constants)
        return tuple(outputs)

    return jax.pure_callback(run, tuple(out_shape), *arrays)


def poisoned(spec: jax.ShapeDtypeStruct) -> np.ndarray:
    integer = np.issubdtype(spec.dtype, np.integer)
    return np.full(spec.shape, 77 if integer else 7e7, spec.dtype)


def as_float32(handle):
    """A bfloat16 operand as float32, of which the interpreter's own dot multiplies the raw bits, and a float8 one."""
    if handle.dtype.scalar == tl.float8e4nv:
        return interpreter.TensorHandle(handle.data.view(ml_dtypes.float8_e4m3fn).astype(np.float32), tl.float32)
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    data = handle.data.view(np.uint16).astype(np.uint32) << 16
    return interpreter.TensorHandle(data.view(np.float32), tl.float32)


original_dot = interpreter.InterpreterBuilder.create_dot


def create_dot(self, a, b, d, *settings):
    return original_dot(self, as_float32(a), as_float32(b), d, *settings)


interpreter.InterpreterBuilder.create_dot = create_dot


original_cast = interpreter.InterpreterBuilder.cast_impl


def cast_impl(self, value, target):
    """To bfloat16 by rounding to the nearest, as hardware does; the interpreter truncates, and copies integer bits."""
    source = value.dtype.scalar
    if target.scalar == tl.bfloat16 and source != tl.bfloat16:
        return interpreter.TensorHandle(value.data.astype(ml_dtypes.bfloat16).view(np.uint16), tl.bfloat16)
    return original_cast(self, value, target)


interpreter.InterpreterBuilder.cast_impl = cast_impl


original_fp_to_fp = interpreter.InterpreterBuilder.create_fp_to_fp


def create_fp_to_fp(self, value, target, rounding):
    """float32 to e4m3 as hardware does, ties to even and saturated; the interpreter's own rounds ties up."""
    if target.scalar == tl.float8e4nv and value.dtype.scalar == tl.float32:
        code = np.clip(value.data, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        return interpreter.TensorHandle(code.view(np.uint8), tl.float8e4nv)
    return original_fp_to_fp(self, value, target, rounding)


interpreter.InterpreterBuilder.create_fp_to_fp = create_fp_to_fp


def create_fma(self, x, y, z):
    """Rounds once, as hardware does."""
    wide = [a.data.astype(np.float64) for a in (x, y, z)]
    return interpreter.TensorHandle((wide[0] * wide[1] + wide[2]).astype(np.float32), tl.float32)


interpreter.InterpreterBuilder.create_fma = create_fma


original_patch = interpreter._patch_lang_tensor


def patch_tensor(tensor, scope):
    """Computed loop bounds: the interpreter's scalars have one element, which NumPy no longer takes for an int."""
    original_patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = patch_tensor


def call_helper(self, *arguments, **constants):
    """Patches the helper's Triton at its first call alone; each launch of a kernel patches what it sees anew."""
    if self.fn not in self.rewritten_fn:
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*arguments, **constants)


interpreter.InterpretedFunction.__call__ = call_helper

# Integers of so small arrays do not overflow, and checking each sum and product takes a quarter of the time.
interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)

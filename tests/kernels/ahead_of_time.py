"""Compiles Triton kernels for GPUs that are not here, and reads what they take of them."""

import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.marks import slow

SHARED_MEMORY = {80: 163, 89: 99, 90: 227, 120: 99}  # KiB a block may have, by compute capability
# By default the least and the most of it are tried.
CAPABILITIES = [slow(80), 89, 90, slow(120)]

BF16, INT8, INT32, F32 = "*bf16", "*i8", "*i32", "*fp32"


class Usage(NamedTuple):
    """Registers a thread, bytes of stack a thread (where spilled registers go), bytes of shared memory a block."""

    registers: int
    stack: int
    shared: int


def usage(kernel, pointers: dict[str, str], constants: dict, *, warps: int, stages: int, capability: int) -> Usage:
    """Compiles `kernel` for a compute capability (90 for 9.0); pointers, 16-byte aligned, are given by type."""
    arguments = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={a: pointers.get(a, "constexpr") for a in arguments},
        constexprs={(arguments.index(a),): value for a, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, a in enumerate(arguments) if a in pointers},
    )
    options = {"num_warps": warps, "num_stages": stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return Usage(*registers_and_stack(compiled.asm["cubin"]), compiled.metadata.shared)


def registers_and_stack(cubin: bytes) -> tuple[int, int]:
    """From the disassembler that Triton ships."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(report.split(f"{name}:")[1].split()[0]) for name in ("REG", "STACK"))
    return registers, stack

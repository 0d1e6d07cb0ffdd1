"""Triton kernels without a GPU: marks for tests that run or compile them, and a launcher that only compiles."""

import os
import subprocess
from pathlib import Path

import pytest
import torch

from mllama_graph.ops.cuda_triton import triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if GPU else "cpu"
NO_TRITON = "Triton is not installed"
runs = pytest.mark.skipif(
    triton is None or not (INTERPRETED or GPU), reason=f"{NO_TRITON}, or neither a GPU nor TRITON_INTERPRET=1 is there"
)
compiles = pytest.mark.skipif(triton is None or INTERPRETED, reason=f"{NO_TRITON}, or TRITON_INTERPRET=1 is set")
NAMES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.float8_e4m3fn: "*fp8e4nv",
}


class Launcher:
    """What `wrap_triton` returns: launch[grid](...)."""

    def __init__(self, launch):
        self._launch = launch

    def __getitem__(self, grid):
        return self._launch


def compiling(capability, compiled):
    """A `wrap_triton` whose launches compile the kernel for a GPU and append it to `compiled`."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    def compile_kernel(kernel):
        def launch(*given, num_warps, num_stages=3, **constants):
            types = [NAMES[x.dtype] if isinstance(x, torch.Tensor) else "i32" for x in given]
            source = ASTSource(
                fn=kernel,
                signature=dict(zip(kernel.arg_names, types + ["constexpr"] * len(constants))),
                constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
                attrs={(n,): [["tt.divisibility", 16]] for n, x in enumerate(given) if isinstance(x, torch.Tensor)},
            )
            options = {"num_warps": num_warps, "num_stages": num_stages}
            compiled.append(compile(source, target=GPUTarget("cuda", capability, 32), options=options))

        return Launcher(launch)

    return compile_kernel


def ptxas(kernel, capability, folder: Path) -> str:
    """What NVIDIA's assembler says about a compiled kernel; kernel.cubin in `folder` is its output."""
    (folder / "kernel.ptx").write_text(kernel.asm["ptx"])
    command = [
        triton.knobs.nvidia.ptxas.path,
        "-v",
        f"--gpu-name=sm_{capability}{'a' * (capability == 90)}",
        "kernel.ptx",
        "-o",
        "kernel.cubin",
    ]
    return subprocess.run(command, cwd=folder, text=True, stderr=subprocess.PIPE, check=True).stderr

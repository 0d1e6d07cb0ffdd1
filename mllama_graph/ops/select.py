"""Selection of the operations with which a device's graphs are traced."""

from mllama_graph.model.ops import Ops
from mllama_graph.ops.cpu import CPU
from mllama_graph.ops.plain import PLAIN
from mllama_graph.ops.ranks import ranked


def ops_for(
    device: str, world: int, collectives: str, kernels: str, mode: str | None = None, tiled: bool = False
) -> Ops:
    """The operations of one of `world` ranks on a device: cpu, cuda, npu or npu-sim.

    `collectives` and `kernels` are those of the run; `mode` is torchair's, `tiled` whether an NPU's weights are NZ.
    Raises ImportError if a package is missing.
    """
    # Triton and torch_npu are imported only if their device is used.
    if device == "cuda":
        from mllama_graph.ops.cuda import cuda_ops

        return cuda_ops(world)
    if device in ("npu", "npu-sim"):
        from mllama_graph.ops.npu import npu_ops

        return npu_ops(world, mode or "max-autotune", tiled)
    return ranked(world, collectives, CPU if kernels == "native" else PLAIN)

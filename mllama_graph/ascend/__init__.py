"""Ascend without an NPU: the real torch_npu and torchair on a CPU, and an interpreter that executes their graphs.

    stubs        libraries that stand in for CANN's, so that torch_npu can be imported
    simulation   runs graphs that torchair compiles in the interpreter instead of on an NPU
    interpreter  walks a graph of the graph engine (GE), one operation at a time
    ge_ops       what each GE operation computes, in plain PyTorch
    capture      lowers a step to its GE graph without executing it
    lint         checks a captured graph against the rules of rules.py

Not covered: GE's compilation and fusion, kernels, HCCL, memory and latency.
"""

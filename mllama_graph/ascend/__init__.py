"""Ascend without an NPU: the real torch_npu and torchair on a CPU, and an interpreter that executes their graphs.

    stubs        libraries that stand in for CANN's, so that torch_npu can be imported
    simulation   executes what torchair compiles, in the place of an NPU
    interpreter  walks a graph of the graph engine (GE), one operation at a time
    ge_ops       what each GE operation computes, in plain PyTorch
    capture      lowers a step to its GE graph without executing it
    lint         checks a captured graph by the rules of rules.py

What this can't show: GE's compilation and fusion, kernels, HCCL, memory and latency.
"""

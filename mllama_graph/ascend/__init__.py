"""Offline Ascend: the real torch_npu and torchair on a machine without an NPU, and what executes their graphs there.

`stubs` builds libraries that stand in for CANN, `interpreter` walks the graphs that torchair would hand to CANN, and
`ge_ops` says what each of their operations computes. What this can't show: GE's compilation, kernels, HCCL, latency.
"""

"""What is known of a device's hardware: the options of conf/hardware/."""

from dataclasses import dataclass, field


@dataclass
class Calibration:
    """Figures of plan/latency.py for one kind of NPU. Times are in seconds; conf/hardware/910b.yaml gives each source.

    cores: matrix cores, 0 for hardware without these figures, whose latencies are floors.
    """

    cores: int = 0
    # Reached shares of the peak rates of memory, matrix products and links.
    memory: float = 1.0
    products: float = 1.0
    links: float = 1.0
    # The rate of int8 products, relative to bf16.
    int8_products: float = 1.0
    # Bytes per second of operators without a matrix product.
    vector_bytes_per_second: float = 1.0
    # Between two operators of a graph; then each operator's own time where there are few rows.
    launch: float = 0.0
    matmul: float = 0.0
    attention: float = 0.0
    operator: float = 0.0
    operators: dict[str, float] = field(default_factory=dict)
    # One task on AICPU.
    aicpu: float = 0.0
    # An all-reduce of few bytes between two ranks, and what each further rank adds.
    all_reduce: float = 0.0
    all_reduce_rank: float = 0.0
    # A step outside of its graph, on the host.
    step: float = 0.0
    # Without a graph: the host's time per operator, and per collective.
    eager: float = 0.0
    eager_all_reduce: float = 0.0


@dataclass
class HardwareChoice:
    """One option of conf/hardware/: peak rates per second and sizes in bytes, from which latencies are modelled.

    `device` is the matching value of device=, which decides the storage and compute dtypes.
    """

    name: str = ""
    device: str = "npu"
    flops: float = 0.0
    memory_bytes_per_second: float = 0.0
    memory_bytes: float = 0.0
    link_bytes_per_second: float = 0.0
    calibration: Calibration = field(default_factory=Calibration)

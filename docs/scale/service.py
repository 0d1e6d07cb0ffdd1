"""Modelled service times of one replica of 11B, and the table of docs/scale.md: python docs/scale/service.py.

An NPU's times are those of mllama_graph/plan/latency.py. A GPU and a CPU have no such calibration: their times are
floors (bytes over bandwidth, operations over rate) divided by the fractions in DEVICES. Nothing here was measured on a
server of the kind that it describes.
"""

import sys
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from mllama_graph.core.hardware import Calibration, HardwareChoice  # noqa: E402
from mllama_graph.model.formats import Storage  # noqa: E402
from mllama_graph.model.shape import shape_of  # noqa: E402
from mllama_graph.plan.bucket import Bucket  # noqa: E402
from mllama_graph.plan.cost import kv_bytes, sizes, step_work, work  # noqa: E402
from mllama_graph.plan.latency import BEST, Model  # noqa: E402

PAGE, DAY = 128, 86400
# Ids of a prompt and of an answer, requests that decode at once, and the tiles of a picture.
PROMPT, ANSWER, BATCH = 64, 64, 64
# A host's own memory, and what a graph needs beside weights and pages.
WORKSPACE_BYTES = 6e9


@dataclass(frozen=True)
class Device:
    """What serves one replica. `units`: replicas of a server. `memory`, `products`: fractions of the rates reached.

    The fractions of the 910B are in its calibration, and the H200's are taken from there: a guess. Those of the CPU
    are 1, since its rates are what the session profiles/2026-11-27-mid-bf16-cpu reached on two cores, times 32: 401
    GFLOP/s in the vision encoder. Of 307 GB/s (8 channels of DDR5-4800), 83 % as in that session.
    """

    name: str
    hardware: HardwareChoice
    units: int
    ranks: int = 1
    memory: float = 0.80
    products: float = 0.70


def given(name: str) -> HardwareChoice:
    """An option of conf/hardware/."""
    found = yaml.safe_load((ROOT / "conf" / "hardware" / f"{name}.yaml").read_text())
    return HardwareChoice(**found | {"calibration": Calibration(**found.get("calibration", {}))})


CPU = HardwareChoice(
    name="cpu", device="cpu", flops=32 * 4.01e11, memory_bytes_per_second=0.83 * 3.07e11, memory_bytes=5.12e11
)
NPU, NPU_WHOLE, GPU, HOST = (
    Device("8 x 910B, a replica per NPU", given("910b"), 8),
    Device("8 x 910B, one replica of 8 ranks", given("910b"), 1, ranks=8),
    Device("one H200", given("h200"), 1),
    Device("64 CPU cores", CPU, 1, memory=1.0, products=1.0),
)


@dataclass(frozen=True, eq=False)
class Replica:
    """The times of a replica in seconds. `tiles`: of each picture, 1 to 4."""

    device: Device
    tiles: int = 4

    @cached_property
    def shape(self):
        config = yaml.safe_load((ROOT / "conf" / "model" / "11b.yaml").read_text())["config"]
        return shape_of({"model_type": "mllama", **config})

    @cached_property
    def model(self) -> Model:
        return Model(self.shape, Storage(2, 2, 2), self.device.ranks, self.device.hardware, BEST)

    @property
    def calibrated(self) -> bool:
        return self.device.hardware.calibration.cores > 0

    @property
    def image_tokens(self) -> int:
        """Image tokens of a picture, in whole pages."""
        return -(-self.tiles * self.shape.vision.tokens // PAGE) * PAGE

    @property
    def picture_bytes(self) -> int:
        """The K/V of a picture in all cross-attention layers."""
        return kv_bytes(self.shape, 0, self.image_tokens, Storage(2, 2, 2))[1]

    @property
    def pictures_held(self) -> int:
        """Pictures whose K/V fits beside the weights and BATCH texts of 1024 tokens."""
        storage = Storage(2, 2, 2)
        texts = kv_bytes(self.shape, BATCH * 1024, 0, storage)[0]
        used = sizes(self.shape, storage).total + self.device.ranks * WORKSPACE_BYTES + texts
        whole = self.device.hardware.memory_bytes * self.device.ranks * 0.95
        return int((whole - used) / self.picture_bytes)

    @cached_property
    def vision(self) -> float:
        if self.calibrated:
            return self.model.vision(self.tiles).seconds
        bucket = Bucket("vision", 1, 1, 0, -(-self.shape.vision.max_tiles * self.shape.vision.tokens // PAGE))
        return self._floor(*work(self.shape, PAGE, bucket, Storage(2, 2, 2)))

    @lru_cache(maxsize=4096)  # noqa: B019, replicas live as long as the process
    def prefill(self, tokens: int, past: int = 0) -> float:
        """The prefill of a prompt about a picture, after `past` earlier tokens."""
        if self.calibrated:
            return self.model.prefill(tokens, past, self.image_tokens).seconds
        seen = tokens * (past + tokens / 2), float(tokens * self.image_tokens)
        return self._floor(*self._work(tokens, past + tokens, self.image_tokens, seen, 1))

    @lru_cache(maxsize=4096)  # noqa: B019
    def decode(self, batch: int, keys: int = PROMPT + ANSWER // 2) -> float:
        """A decode step of `batch` sequences of `keys` tokens, each with a picture."""
        if self.calibrated:
            return self.model.decode(batch, keys, self.image_tokens).seconds
        every, images = batch * keys, batch * self.image_tokens
        return self._floor(*self._work(batch, every, images, (every, images), batch))

    def _work(self, rows, keys, image_keys, seen, logits):
        return step_work(self.shape, True, rows, keys, image_keys, seen, logits, Storage(2, 2, 2))

    def _floor(self, moved: float, flops: float) -> float:
        known = self.device.hardware
        return max(
            moved / (known.memory_bytes_per_second * self.device.memory), flops / (known.flops * self.device.products)
        )


def row(device: Device, tiles: int) -> tuple[str, ...]:
    """The table's row of a server whose pictures have `tiles` tiles."""
    of = Replica(device, tiles)
    batch = min(BATCH, of.pictures_held)
    parts = of.vision, of.prefill(PROMPT), ANSWER * of.decode(batch) / batch
    per_second = device.units / sum(parts)
    shares = " / ".join(f"{100 * part / sum(parts):.0f}" for part in parts)
    return (
        device.name,
        str(tiles),
        f"{1e3 * of.vision:.0f}",
        f"{1e3 * parts[1]:.0f}",
        f"{1e3 * of.decode(batch):.0f}",
        f"{per_second:.1f}",
        f"{per_second * DAY / 1e6:.2f}",
        shares,
        f"{of.pictures_held * device.units:,}",
    )


def rows() -> list[tuple[str, ...]]:
    """All rows of the table."""
    return [row(device, tiles) for device in (NPU, NPU_WHOLE, GPU, HOST) for tiles in (4, 1)]


if __name__ == "__main__":
    for cells in rows():
        print(f"| {' | '.join(cells)} |")

"""The program of a process that runs OpenVINO: reads one case per line, and writes its times as one line.

It runs in an environment that has openvino and nncf, and nothing of this project. export.py wrote its folder.

The model is a stateful decoder, written in the forms that the CPU plugin fuses: K/V of a layer are a variable, to
which each step appends, and which it reorders by `beams`.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino
from openvino import opset13 as ops
from openvino.op import Constant, assign, read_value
from openvino.op.util import Variable, VariableInfo

# How the weights of a format are compressed; f32 and f16 are not.
COMPRESSED: dict[str, dict[str, Any]] = {
    "int8": {"mode": nncf.CompressWeightsMode.INT8_SYM},
    "int4": {"mode": nncf.CompressWeightsMode.INT4_SYM, "group_size": 128, "ratio": 1.0},
}
# f32 is meant literally; otherwise the library chooses the dtypes of activations and K/V, as for its users.
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


class Model:
    """A compiled model."""

    def __init__(self, folder: Path, form: str):
        path = convert(folder, form)
        config: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": int(os.environ["OMP_NUM_THREADS"]),
            "PERFORMANCE_HINT": "LATENCY",
        }
        compiled = openvino.Core().compile_model(path, "CPU", config | (EXACT if form == "f32" else {}))
        self.request = compiled.create_infer_request()

    def generate(self, prompts: list[list[int]], new: int) -> tuple[list[list[int]], list[float]]:
        """Generate greedily for all prompts together: each sequence's tokens, and the seconds of each step."""
        self.request.reset_state()
        rows, at, found, seconds = np.array(prompts), 0, [], []
        beams = np.arange(len(rows), dtype=np.int32)
        for _ in range(new):
            start = time.perf_counter()
            positions = np.broadcast_to(np.arange(at, at + rows.shape[1]), rows.shape)
            given = {"ids": rows, "positions": positions, "beams": beams}
            logits = self.request.infer(given, share_inputs=True, share_outputs=True)[0]
            at += rows.shape[1]
            rows = logits[:, -1].argmax(axis=-1)[:, None]
            seconds.append(time.perf_counter() - start)
            found.append(rows[:, 0].tolist())
        return [list(row) for row in zip(*found)], seconds


class Decoder:
    """Builds the graph of a model from its tensors."""

    def __init__(self, folder: Path):
        self.folder, self.text = folder, json.loads((folder / "text.json").read_text())
        self.ids, self.positions = ops.parameter([-1, -1], np.int64, "ids"), ops.parameter([-1, -1], np.int64)
        self.beams = ops.parameter([-1], np.int32)
        for node, name in ((self.ids, "ids"), (self.positions, "positions"), (self.beams, "beams")):
            node.output(0).get_tensor().set_names({name})
        self.kept: list[Any] = []

    def build(self) -> openvino.Model:
        """The graph: ids (B, T), positions (B, T) and beams (B,) -> logits (B, 1, V) of the last position."""
        text = self.text
        x = ops.gather(self.weight("embed"), self.ids, np.int64(0))
        angles = ops.multiply(
            ops.unsqueeze(ops.convert(self.positions, np.float32), np.int64(2)),
            np.array(text["rope"]["inv_freq"], np.float32)[None, None],
        )
        angles = ops.unsqueeze(ops.concat([angles, angles], 2), np.int64(1))
        self.cos, self.sin = ops.cos(angles), ops.sin(angles)
        self.batch = ops.gather(ops.shape_of(self.ids), np.array([0]), np.int64(0))
        self.mask: Any = None
        for layer in range(text["layers"]):
            x = ops.add(x, self.attention(self.norm(x, f"{layer}.attention_norm"), layer))
            h = self.norm(x, f"{layer}.mlp_norm")
            gated = ops.multiply(ops.swish(self.linear(h, f"{layer}.gate")), self.linear(h, f"{layer}.up"))
            x = ops.add(x, self.linear(gated, f"{layer}.down"))
        last = ops.gather(x, np.array([-1]), np.int64(1))
        logits = self.linear(self.norm(last, "norm"), "head")
        return openvino.Model([ops.result(logits)], self.kept, [self.ids, self.positions, self.beams], "text")

    def weight(self, name: str) -> Constant:
        """A tensor in float32; `convert` compresses it."""
        return Constant(widened(np.load(self.folder / f"{name}.npy", mmap_mode="r")), shared_memory=True)

    def linear(self, x: Any, name: str) -> Any:
        return ops.matmul(x, self.weight(name), False, True)

    def norm(self, x: Any, name: str) -> Any:
        square = ops.reduce_mean(ops.power(x, np.float32(2)), np.array([-1]), True)
        scale = ops.divide(np.float32(1), ops.sqrt(ops.add(square, np.float32(self.text["eps"]))))
        return ops.multiply(ops.multiply(x, scale), self.weight(name))

    def heads(self, x: Any, name: str, count: int) -> Any:
        """The projection of x by heads: (B, heads, T, H)."""
        split = ops.reshape(self.linear(x, name), np.array([0, 0, count, self.text["head_width"]]), True)
        return ops.transpose(split, np.array([0, 2, 1, 3]))

    def rope(self, x: Any) -> Any:
        half = self.text["head_width"] // 2
        low, high = ops.variadic_split(x, np.int64(3), np.array([half, half])).outputs()
        turned = ops.concat([ops.multiply(high, np.float32(-1)), low], -1)
        return ops.add(ops.multiply(x, self.cos), ops.multiply(turned, self.sin))

    def appended(self, x: Any, name: str) -> Any:
        """A variable of K or V with x (B, kv heads, T, H) appended; it begins empty."""
        heads, width = self.text["kv_heads"], self.text["head_width"]
        info = VariableInfo()
        info.variable_id, info.data_type = name, openvino.Type.f32
        info.data_shape = openvino.PartialShape([-1, heads, -1, width])
        variable = Variable(info)
        empty = ops.broadcast(np.float32(0), ops.concat([self.batch, np.array([heads, 0, width])], 0))
        past = ops.gather(read_value(empty, variable), self.beams, np.int64(0))
        whole = ops.concat([past, x], 2)
        self.kept.append(assign(whole, variable))
        return whole

    def repeated(self, x: Any) -> Any:
        """K or V for every query head."""
        group, width = self.text["heads"] // self.text["kv_heads"], self.text["head_width"]
        if group == 1:
            return x
        ones = np.array([1, 1, group, 1, 1])
        wide = ops.broadcast(ops.unsqueeze(x, np.int64(2)), ones, broadcast_spec="BIDIRECTIONAL")
        return ops.reshape(wide, np.array([0, self.text["heads"], -1, width]), True)

    def attention(self, h: Any, layer: int) -> Any:
        text = self.text
        q = self.rope(self.heads(h, f"{layer}.q", text["heads"]))
        k = self.appended(self.rope(self.heads(h, f"{layer}.k", text["kv_heads"])), f"{layer}.k")
        v = self.appended(self.heads(h, f"{layer}.v", text["kv_heads"]), f"{layer}.v")
        if self.mask is None:
            length = ops.gather(ops.shape_of(k), np.int64(2), np.int64(0))
            keys = ops.range(np.int64(0), length, np.int64(1), "i64")
            rows = ops.unsqueeze(self.positions, np.array([1, 3]))
            self.mask = ops.select(ops.less_equal(keys, rows), np.float32(0), np.float32(np.finfo(np.float32).min))
        out = ops.scaled_dot_product_attention(q, self.repeated(k), self.repeated(v), self.mask)
        rows = ops.transpose(out, np.array([0, 2, 1, 3]))
        return self.linear(ops.reshape(rows, np.array([0, 0, text["heads"] * text["head_width"]]), True), f"{layer}.o")


def convert(folder: Path, form: str) -> Path:
    """Write the folder's model as an IR with weights in a format of OpenVINO, and remove its tensors."""
    path = folder / f"{form}.xml"
    model = Decoder(folder).build()
    if form in COMPRESSED:
        model = nncf.compress_weights(model, **COMPRESSED[form])
    openvino.save_model(model, path, compress_to_fp16=form != "f32")
    for file in folder.glob("*.npy"):
        file.unlink()
    return path


def widened(values: np.ndarray) -> np.ndarray:
    """bf16, stored as uint16, or another dtype as float32."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def prove(folder: Path) -> None:
    """End the process where the small model's tokens in f32 are not those that export.py computed."""
    proof = json.loads((folder / "text.json").read_text())
    found, _ = Model(folder, "f32").generate(proof["ids"], len(proof["tokens"][0]))
    if found != proof["tokens"]:
        raise SystemExit(f"on the small model OpenVINO in f32 generates {found}, mllama_graph {proof['tokens']}")


def main(setting: dict[str, Any], folder: str, device: str) -> None:
    """Check the export, load the model in `folder` and serve cases until stdin ends. It runs on the CPU."""
    # Libraries print to stdout, also from native code; only answers may go to the real stdout.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    prove(Path(folder) / "proof")
    model = Model(Path(folder), setting["dtype"])
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        case = json.loads(line)
        try:
            _, seconds = model.generate(case["ids"], case["new"])
            told = {"first": seconds[0], "steps": seconds[1:]}
        except Exception as error:
            told = {"fault": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        print(json.dumps(told), file=answers, flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), *sys.argv[2:])

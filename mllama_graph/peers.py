"""Other engines on the same checkpoint, each setting in a process of its own that waits between its turns.

As a program, `python -m mllama_graph.peers`, this is such a process: a case a line in, its times a line out.
"""

import base64
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np

from mllama_graph.config import UserError
from mllama_graph.report import Progress

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Setting:
    """One way to run transformers: dtype as torch names it, the cache, and whether decode steps are compiled."""

    name: str
    dtype: str
    cache: Optional[str] = None
    compiled: bool = False
    freezing: bool = False


SETTINGS = (
    Setting("transformers fp32", "float32"),
    Setting("transformers fp32 static", "float32", "static"),
    Setting("transformers fp32 static compiled", "float32", "static", compiled=True),
    Setting("transformers fp32 static frozen", "float32", "static", compiled=True, freezing=True),
    Setting("transformers bf16", "bfloat16"),
)


def settings_of(peers: list[str]) -> list[Setting]:
    """The settings named: one by its whole name, all of a peer by its first word. Raises UserError for an unknown one."""
    found: list[Setting] = []
    for peer in peers:
        named = [setting for setting in SETTINGS if peer in (setting.name, setting.name.split()[0])]
        if not named:
            known = dict.fromkeys(name for setting in SETTINGS for name in (setting.name.split()[0], setting.name))
            raise UserError(f"peers={peer} is not one of {', '.join(known)}.")
        found += named
    return list(dict.fromkeys(found))


class Peer:
    """A process that runs one setting; `run` has it serve a batch. `fault` says why it ended, if it did."""

    def __init__(self, setting: Setting, folder: Path, device: str, threads: int, progress: Progress):
        self.setting, self.fault = setting, ""
        progress.say(f"starting {setting.name}")
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)} | (
            {"TORCHINDUCTOR_FREEZING": "1"} if setting.freezing else {})
        self._said = tempfile.TemporaryFile("w+", errors="replace")
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __spec__.name, json.dumps(asdict(setting)), str(folder), device], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, env=environment | {"PYTHONPATH": str(ROOT)})

    def run(self, ids: list[list[int]], tiles: list[np.ndarray], aspect: int, new: int) -> Optional[dict[str, Any]]:
        """{"first": seconds to the first token, "steps": seconds of each later one}; None where it can't."""
        images = [{"data": base64.b64encode(image.tobytes()).decode(), "shape": image.shape} for image in tiles]
        try:
            self._process.stdin.write(json.dumps({"ids": ids, "images": images, "aspect": aspect, "new": new}) + "\n")
            self._process.stdin.flush()
            told = json.loads(self._process.stdout.readline() or "null") or {"fault": self._last_words()}
        except OSError:
            told = {"fault": self._last_words()}
        self.fault = told.get("fault", "")
        return None if self.fault else told

    def _last_words(self) -> str:
        """Why the process ended: the last line that it printed."""
        code = self._process.wait()
        self._said.seek(0)
        lines = [line.strip() for line in self._said if line.strip()]
        return f"its process ended with exit code {code}: {lines[-1][:200] if lines else 'it said nothing'}"

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._said.close()


def _serve(setting: Setting, folder: str, device: str) -> None:
    # Whatever libraries print is no answer.
    answers, sys.stdout = sys.stdout, sys.stderr
    import torch
    from transformers import MllamaForConditionalGeneration

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model = MllamaForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, setting.dtype)).eval().to(device)
    for line in sys.stdin:
        try:
            told = _generate(model, setting, json.loads(line))
        except Exception as error:
            told = {"fault": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        print(json.dumps(told), file=answers, flush=True)


def _generate(model, setting: Setting, case: dict[str, Any]) -> dict[str, Any]:
    """A greedy generation of the whole batch, the clock read at each step's logits."""
    import torch
    from transformers import CompileConfig

    vision, ids = model.config.vision_config, torch.tensor(case["ids"])
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if case["images"]:
        each = len(case["images"]) // len(ids)
        data = np.stack([np.frombuffer(base64.b64decode(i["data"]), np.uint8).reshape(i["shape"]) for i in case["images"]])
        pixels = torch.from_numpy(data).view(len(ids), each, *data.shape[1:]).to(model.dtype) / 127.5 - 1
        tiles = (len(ids), each, vision.max_num_tiles)
        inputs |= {"pixel_values": pixels, "aspect_ratio_ids": torch.full(tiles[:2], case["aspect"]),
                   "aspect_ratio_mask": torch.ones(tiles, dtype=torch.long),
                   "cross_attention_mask": torch.ones(len(ids), ids.shape[1], each, vision.max_num_tiles, dtype=torch.long)}
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    times: list[float] = []

    def clock(_, scores):
        if scores.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter())
        return scores

    options: dict[str, Any] = {"cache_implementation": setting.cache} if setting.cache else {}
    if setting.compiled:
        options["compile_config"] = CompileConfig(fullgraph=False)
        options["compile_config"]._compile_all_devices = True
    elif setting.cache:
        options["disable_compile"] = True
    model.generation_config.eos_token_id = None
    start = time.perf_counter()
    with torch.inference_mode():
        model.generate(**inputs, max_new_tokens=case["new"], do_sample=False, logits_processor=[clock], pad_token_id=0,
                       **options)
    return {"first": times[0] - start, "steps": [b - a for a, b in zip(times, times[1:])]}


if __name__ == "__main__":
    _serve(Setting(**json.loads(sys.argv[1])), *sys.argv[2:])

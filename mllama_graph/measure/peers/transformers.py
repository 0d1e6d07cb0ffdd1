"""The program of a process that runs transformers: reads one case per line, and writes its times as one line."""

import base64
import json
import os
import sys
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import CompileConfig, MllamaForConditionalGeneration

# Decode steps that compile a frozen graph: the first traces it, the second traces it again since shapes changed.
COMPILING_STEPS = 2


def main(setting: dict[str, Any], folder: str, device: str) -> None:
    """Load the checkpoint in `folder` and serve cases until stdin ends."""
    # Libraries print to stdout, also from native code; only answers may go to the real stdout.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    dtype = getattr(torch, setting["dtype"])
    model = MllamaForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval().to(device)
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        try:
            told = generate(model, setting, json.loads(line))
        except Exception as error:
            told = {"fault": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        print(json.dumps(told), file=answers, flush=True)


def generate(model: Any, setting: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
    """Generate greedily for the whole batch, timing each step. Steps that compile a frozen graph are left out."""
    if setting["freezing"]:
        # A frozen graph contains the KV cache of the generation that compiled it, so it can't be used again.
        torch._dynamo.reset()
    vision, ids = model.config.vision_config, torch.tensor(case["ids"])
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if case["images"]:
        each = len(case["images"]) // len(ids)
        data = np.stack(
            [np.frombuffer(base64.b64decode(i["data"]), np.uint8).reshape(i["shape"]) for i in case["images"]]
        )
        pixels = torch.from_numpy(data).view(len(ids), each, *data.shape[1:]).to(model.dtype) / 127.5 - 1
        tiles = (len(ids), each, vision.max_num_tiles)
        aspects = torch.tensor([image["aspect"] for image in case["images"]])
        inputs |= {
            "pixel_values": pixels,
            "aspect_ratio_ids": aspects.view(tiles[:2]),
            "aspect_ratio_mask": torch.ones(tiles, dtype=torch.long),
            "cross_attention_mask": torch.ones(len(ids), ids.shape[1], each, vision.max_num_tiles, dtype=torch.long),
        }
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    times: list[float] = []

    def clock(_: Tensor, scores: Tensor) -> Tensor:
        if scores.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter())
        return scores

    options: dict[str, Any] = {"cache_implementation": setting["cache"]} if setting["cache"] else {}
    if setting["compiled"]:
        options["compile_config"] = CompileConfig(fullgraph=False)
        options["compile_config"]._compile_all_devices = True
    elif setting["cache"]:
        options["disable_compile"] = True
    model.generation_config.eos_token_id = None
    start = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            **inputs, max_new_tokens=case["new"], do_sample=False, logits_processor=[clock], pad_token_id=0, **options
        )
    steps = [b - a for a, b in zip(times, times[1:])]
    compiling = min(COMPILING_STEPS, len(steps) - 1) if setting["freezing"] else 0
    return {"first": times[0] - start, "steps": steps[compiling:]}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), *sys.argv[2:])

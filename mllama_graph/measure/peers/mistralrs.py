"""The program of a process that runs mistralrs: reads one case per line, and writes its times as one line.

It runs in an environment that has mistralrs and nothing of this project.
"""

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mistralrs import ChatCompletionRequest, ModelDType, MultimodalArchitecture, Runner, Which

DTYPES = {"float32": ModelDType.F32}


def main(setting: dict[str, Any], folder: str, device: str) -> None:
    """Load the checkpoint in `folder` and serve cases until stdin ends. The installed wheel decides the device."""
    # The library prints to stdout from native code; only answers may go to the real stdout.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    runner = Runner(
        which=Which.MultimodalPlain(model_id=folder, arch=MultimodalArchitecture.VLlama, dtype=DTYPES[setting["dtype"]])
    )
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        try:
            told = generate(runner, json.loads(line))
        except Exception as error:
            told = {"fault": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        print(json.dumps(told), file=answers, flush=True)


def generate(runner: Runner, case: dict[str, Any]) -> dict[str, Any]:
    """Generate greedily for all prompts together, timing each token. `<|image|>` is the image token."""
    prompts, each = len(case["ids"]), len(case["images"]) // len(case["ids"])

    def ask(number: int) -> list[float]:
        images = case["images"][number * each : (number + 1) * each]
        words = ["<|image|>"] * each + [f"t{id}" for id in case["ids"][number][each:]]
        content: Any = [{"type": "image_url", "image_url": {"url": image}} for image in images]
        content.append({"type": "text", "text": " ".join(words)})
        request = ChatCompletionRequest(
            model="",
            messages=[{"role": "user", "content": content}],
            max_tokens=case["new"],
            temperature=0.0,
            stream=True,
        )
        return [time.perf_counter() for _ in runner.send_chat_completion_request(request)]

    start = time.perf_counter()
    with ThreadPoolExecutor(prompts) as threads:
        times = list(threads.map(ask, range(prompts)))
    if any(len(some) != case["new"] for some in times):
        raise RuntimeError(f"{[len(some) for some in times]} tokens came instead of {case['new']}")
    # As in a batch, a step is complete when the last sequence has its token.
    steps = [max(some) for some in zip(*times)]
    return {"first": steps[0] - start, "steps": [b - a for a, b in zip(steps, steps[1:])]}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), *sys.argv[2:])

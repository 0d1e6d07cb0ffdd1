"""The program of a process that runs llama.cpp: reads one case per line, and writes its times as one line.

It runs in an environment that has llama-cpp-python and gguf, and nothing of this project. export.py wrote its folder.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

FORMATS = {
    "F32": llama_cpp.LLAMA_FTYPE_ALL_F32,
    "BF16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
}
NAMES = {
    "embed": "token_embd",
    "norm": "output_norm",
    "head": "output",
    "attention_norm": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "mlp_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}
# The library's own default, which is what its users measure.
PAGES, PROOF_PAGES = llama_cpp.GGML_TYPE_F16, llama_cpp.GGML_TYPE_F32
# Layers that a GPU holds: more than any model has, or none.
ALL_LAYERS, OFFLOADED = 1000, {"cpu": 0}
# The library pads the length of a sequence to this.
LENGTH_MULTIPLE = 256


class Model:
    """A model and the context that fits the last case."""

    def __init__(self, folder: Path, form: str, device: str, pages: int):
        path = convert(folder, form)
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = OFFLOADED.get(device, ALL_LAYERS)
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise SystemExit(f"llama.cpp can't load the {form} file")
        self.pages, self.sizes, self.context = pages, (0, 0), None
        self.vocab = json.loads((folder / "text.json").read_text())["vocab"]

    def fit(self, batch: int, prompt: int, new: int) -> None:
        """Make the context of `batch` sequences, each with its own K/V, or clear it where it fits."""
        length = -(-(prompt + new) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        if self.sizes != (batch, length):
            if self.context:
                llama_cpp.llama_free(self.context)
            params = llama_cpp.llama_context_default_params()
            params.n_ctx, params.n_seq_max = batch * length, batch
            params.n_batch = batch * length
            params.n_threads = params.n_threads_batch = int(os.environ["OMP_NUM_THREADS"])
            params.type_k = params.type_v = self.pages
            self.context, self.sizes = llama_cpp.llama_init_from_model(self.model, params), (batch, length)
            if not self.context:
                self.sizes = (0, 0)
                raise RuntimeError(f"llama.cpp makes no context of {batch} sequences of {length} tokens")
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def step(self, tokens: Any, rows: list[list[int]], at: int) -> list[int]:
        """Run `rows` of new tokens, one per sequence, from position `at`; return each sequence's likeliest token."""
        count = 0
        for sequence, row in enumerate(rows):
            for offset, token in enumerate(row):
                tokens.token[count], tokens.pos[count] = token, at + offset
                tokens.n_seq_id[count], tokens.seq_id[count][0] = 1, sequence
                tokens.logits[count] = offset == len(row) - 1
                count += 1
        tokens.n_tokens = count
        if code := llama_cpp.llama_decode(self.context, tokens):
            raise RuntimeError(f"llama_decode returned {code}")
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(self.context), (len(rows), self.vocab))
        return [int(token) for token in logits.argmax(axis=1)]

    def generate(self, prompts: list[list[int]], new: int) -> tuple[list[list[int]], list[float]]:
        """Generate greedily for all prompts together: each sequence's tokens, and the seconds of each step."""
        self.fit(len(prompts), len(prompts[0]), new)
        tokens = llama_cpp.llama_batch_init(len(prompts) * len(prompts[0]), 0, 1)
        rows, at, found, seconds = prompts, 0, [], []
        for _ in range(new):
            start = time.perf_counter()
            given, rows = rows, [[token] for token in self.step(tokens, rows, at)]
            seconds.append(time.perf_counter() - start)
            at += len(given[0])
            found.append([token for [token] in rows])
        llama_cpp.llama_batch_free(tokens)
        return [list(row) for row in zip(*found)], seconds


def convert(folder: Path, form: str) -> Path:
    """Write the folder's model in a format of llama.cpp, and remove its tensors."""
    text = json.loads((folder / "text.json").read_text())
    source, path = folder / "source.gguf", folder / f"{form}.gguf"
    writer = gguf.GGUFWriter(source, "llama")
    writer.add_vocab_size(text["vocab"])
    writer.add_context_length(text["positions"])
    writer.add_embedding_length(text["width"])
    writer.add_block_count(text["layers"])
    writer.add_feed_forward_length(text["mlp"])
    writer.add_head_count(text["heads"])
    writer.add_head_count_kv(text["kv_heads"])
    writer.add_key_length(text["head_width"])
    writer.add_value_length(text["head_width"])
    writer.add_rope_dimension_count(text["head_width"])
    writer.add_rope_freq_base(text["rope"]["theta"])
    writer.add_layer_norm_rms_eps(text["eps"])
    writer.add_tokenizer_model("no_vocab")
    pairs = np.arange(0, text["head_width"], 2) / text["head_width"]
    unscaled = text["rope"]["theta"] ** -pairs
    # Whatever scales the frequencies, llama.cpp divides them by these factors.
    writer.add_tensor("rope_freqs.weight", (unscaled / np.array(text["rope"]["inv_freq"])).astype(np.float32))
    stored = sorted(folder.glob("*.npy"))
    for file in stored:
        *layer, name = file.stem.split(".")
        values = np.load(file, mmap_mode="r")
        if name in ("q", "k"):
            values = interleaved(values, text["heads" if name == "q" else "kv_heads"])
        name = f"{''.join(f'blk.{number}.' for number in layer)}{NAMES[name]}.weight"
        if values.ndim == 1:
            writer.add_tensor(name, widened(values))
        elif values.dtype == np.uint16:
            writer.add_tensor(name, values.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for file in stored:
        file.unlink()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = FORMATS[form], int(os.environ["OMP_NUM_THREADS"])
    if llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), params):
        raise SystemExit(f"llama.cpp can't convert the model to {form}")
    source.unlink()
    return path


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Order the rows of each head as llama.cpp rotates them: pairs of neighbours, not of a head's two halves."""
    rows, inputs = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, inputs).swapaxes(1, 2).reshape(rows, inputs)


def widened(values: np.ndarray) -> np.ndarray:
    """bf16, stored as uint16, or another dtype as float32."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def prove(folder: Path, device: str) -> None:
    """End the process where the small model's tokens in F32 are not those that export.py computed."""
    proof = json.loads((folder / "text.json").read_text())
    found, _ = Model(folder, "F32", device, PROOF_PAGES).generate(proof["ids"], len(proof["tokens"][0]))
    if found != proof["tokens"]:
        raise SystemExit(f"on the small model llama.cpp in F32 generates {found}, mllama_graph {proof['tokens']}")


def main(setting: dict[str, Any], folder: str, device: str) -> None:
    """Check the export, load the model in `folder` and serve cases until stdin ends."""
    # The library may print to stdout from native code; only answers may go to the real stdout.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    prove(Path(folder) / "proof", device)
    model = Model(Path(folder), setting["dtype"], device, PAGES)
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

"""Other engines on the same checkpoint, each setting in a process of its own that waits between its turns.

Such a process runs `transformers.py` or `mistralrs.py` beside this file: a case a line in, its times a line out.
"""

import base64
import io
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional

from PIL import Image

from mllama_graph.config import Run, UserError
from mllama_graph.images import Tiles
from mllama_graph.processor import Request
from mllama_graph.report import Progress
from mllama_graph.shape import ModelShape

HERE = Path(__file__).parent
MISTRALRS_VERSION = "0.8.23"  # later ones stop at the first image (0.9.5: `max_image_tiles` must be set)


@dataclass(frozen=True)
class Setting:
    """One way to run a peer: dtype as torch names it; for transformers the cache, and whether decode steps are compiled."""

    name: str
    dtype: str
    cache: Optional[str] = None
    compiled: bool = False
    freezing: bool = False

    @property
    def peer(self) -> str:
        """The engine's name."""
        return self.name.split()[0]


SETTINGS = (
    Setting("transformers fp32", "float32"),
    Setting("transformers fp32 static", "float32", "static"),
    Setting("transformers fp32 static compiled", "float32", "static", compiled=True),
    Setting("transformers fp32 static frozen", "float32", "static", compiled=True, freezing=True),
    Setting("transformers bf16", "bfloat16"),
    Setting("mistralrs fp32", "float32"),
)


def settings_of(run: Run) -> list[Setting]:
    """The settings that peers= names: one by its whole name, all of a peer by its first word.

    Raises UserError for an unknown one, and for one whose environment is not there.
    """
    found: list[Setting] = []
    for peer in run.peers:
        named = [setting for setting in SETTINGS if peer in (setting.name, setting.peer)]
        if not named:
            known = dict.fromkeys(name for setting in SETTINGS for name in (setting.peer, setting.name))
            raise UserError(f"peers={peer} is not one of {', '.join(known)}.")
        found += named
    python = Path(run.task.mistralrs).expanduser()
    if any(setting.peer == "mistralrs" for setting in found) and not os.access(python, os.X_OK):
        raise UserError(f"peers=mistralrs runs in an environment of its own, and task.mistralrs={python} is no Python. Make it: "
                        f"python3 -m venv .venv/mistralrs && .venv/mistralrs/bin/pip install mistralrs=={MISTRALRS_VERSION}")
    return list(dict.fromkeys(found))


class Peer:
    """A process that runs one setting; `run` has it serve a batch. `fault` says why it ended, if it did."""

    def __init__(self, setting: Setting, run: Run, shape: ModelShape, folder: Path, device: str, threads: int,
                 progress: Progress):
        self.setting, self.shape, self.fault = setting, shape, ""
        progress.say(f"starting {setting.name}")
        python = sys.executable
        self._own = tempfile.TemporaryDirectory(prefix="mllama_graph-peer-")
        if setting.peer == "mistralrs":
            python = str(Path(run.task.mistralrs).expanduser())
            _write_for_mistralrs(shape, folder, Path(self._own.name))
            folder = Path(self._own.name)
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "RAYON_NUM_THREADS": str(threads)} | (
            {"TORCHINDUCTOR_FREEZING": "1"} if setting.freezing else {})
        self._said = tempfile.TemporaryFile("w+", errors="replace")
        # -P: the programs have the names of what they import.
        self._process = subprocess.Popen(
            [python, "-P", str(HERE / f"{setting.peer}.py"), json.dumps(asdict(setting)), str(folder), device], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, env=environment)

    def run(self, requests: list[Request], new: int) -> Optional[dict[str, Any]]:
        """{"first": seconds to the first token, "steps": seconds of each later one}; None where it can't.

        Requests of equal length with equal numbers of images, their tiles as prepared; mistralrs gets pictures.
        """
        given = _picture if self.setting.peer == "mistralrs" else _tiles
        images = [given(tiles, self.shape) for request in requests for tiles in request.images]
        try:
            self._process.stdin.write(json.dumps({"ids": [list(r.ids) for r in requests], "images": images, "new": new}) + "\n")
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
        self._own.cleanup()


def _tiles(tiles: Tiles, shape: ModelShape) -> dict[str, Any]:
    return {"data": base64.b64encode(tiles.data.tobytes()).decode(), "shape": tiles.data.shape, "aspect": tiles.aspect}


def _picture(tiles: Tiles, shape: ModelShape) -> str:
    """The picture that the tiles are cut from, as a data: URI."""
    rows, columns = shape.vision.aspect_ratios[tiles.aspect - 1]
    side = shape.vision.tile
    grid = tiles.data[: rows * columns].reshape(rows, columns, -1, side, side).transpose(0, 3, 1, 4, 2)
    file = io.BytesIO()
    Image.fromarray(grid.reshape(rows * side, columns * side, -1)).save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _write_for_mistralrs(shape: ModelShape, checkpoint: Path, folder: Path) -> None:
    """The checkpoint as mistralrs reads it: an older config.json, and a tokenizer whose words are `t` and the id.

    Weights are links. mistralrs takes text alone, so that ids are given as such words.
    """
    for file in checkpoint.glob("*.safetensors*"):
        (folder / file.name).symlink_to(file.resolve())
    text, vision, rope = shape.text, shape.vision, shape.text.rope
    scaling = None if rope.type == "default" else {
        "rope_type": rope.type, "factor": rope.factor, "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor, "original_max_position_embeddings": rope.original_positions}
    config = {
        "architectures": ["MllamaForConditionalGeneration"], "model_type": "mllama", "image_token_index": shape.image_token,
        "text_config": {
            "vocab_size": text.vocab, "hidden_size": text.width, "hidden_act": "silu", "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads, "num_key_value_heads": text.kv_heads, "intermediate_size": text.mlp,
            "rope_theta": rope.theta, "rope_scaling": scaling, "rms_norm_eps": text.eps, "tie_word_embeddings": False,
            "max_position_embeddings": text.positions, "cross_attention_layers": text.cross_layers},
        "vision_config": {
            "hidden_size": vision.width, "hidden_act": "gelu", "num_hidden_layers": vision.layers,
            "num_global_layers": vision.global_layers, "num_attention_heads": vision.heads, "num_channels": vision.channels,
            "intermediate_size": vision.mlp, "vision_output_dim": vision.out_width, "image_size": vision.tile,
            "patch_size": vision.patch, "norm_eps": vision.eps, "max_num_tiles": vision.max_tiles,
            "intermediate_layers_indices": vision.features, "supported_aspect_ratios": vision.aspect_ratios}}
    image = {"id": shape.image_token, "content": "<|image|>", "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}
    words = {f"t{id}": id for id in range(text.vocab)} | {image["content"]: shape.image_token}
    files = {
        "config": config,
        "tokenizer": {"version": "1.0", "added_tokens": [image], "pre_tokenizer": {"type": "WhitespaceSplit"},
                      "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
                      "model": {"type": "WordLevel", "vocab": words, "unk_token": "t0"}},
        "tokenizer_config": {"bos_token": None, "eos_token": image["content"],
                             "chat_template": "{% for message in messages %}{{ message['content'] }}{% endfor %}"},
        "generation_config": {"eos_token_id": shape.image_token},
        "preprocessor_config": {
            "do_convert_rgb": True, "do_normalize": True, "do_pad": True, "do_rescale": True, "do_resize": True,
            "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "max_image_tiles": vision.max_tiles, "resample": 2,
            "rescale_factor": 1 / 255, "size": {"height": vision.tile, "width": vision.tile}}}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf8")

"""Runs a peer in one setting, in its own process, which is idle between its turns.

The process runs the program beside this file that has the peer's name: it writes a line when the model is loaded, then
reads one case per line, and writes its times as one line.
"""

import base64
import io
import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from mllama_graph.core.report import Progress
from mllama_graph.inputs.images import TiledImage
from mllama_graph.inputs.request import Request
from mllama_graph.measure.peers import Setting
from mllama_graph.measure.peers.export import export_text
from mllama_graph.measure.timing import Case
from mllama_graph.model.shape import ModelShape

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Engine:
    """How to run a peer.

    checkpoint: the folder that it loads, given the checkpoint and an empty folder for a converted copy. image: an image
    in the form that it takes, or None for a peer of text alone.
    """

    checkpoint: Callable[[ModelShape, Path, Path], Path]
    image: Callable[[TiledImage, ModelShape], Any] | None


class Peer:
    """A process that runs one setting. `run` serves a batch; `fault` is the reason of a failure, else empty."""

    def __init__(
        self,
        setting: Setting,
        python: Path,
        shape: ModelShape,
        folder: Path,
        device: str,
        threads: int,
        progress: Progress,
    ):
        self.setting, self.shape, self.fault = setting, shape, ""
        progress.say(f"starting {setting.name}")
        self._engine = ENGINES[setting.peer]
        self._own = tempfile.TemporaryDirectory(prefix="mllama_graph-peer-")
        folder = self._engine.checkpoint(shape, folder, Path(self._own.name))
        # Set by this process for its own threads; a peer's wait as they do by default.
        given = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
        environment = (
            given
            | {"OMP_NUM_THREADS": str(threads), "RAYON_NUM_THREADS": str(threads)}
            | ({"TORCHINDUCTOR_FREEZING": "1"} if setting.freezing else {})
        )
        self._said = tempfile.TemporaryFile("w+", errors="replace")
        # -P keeps this folder off the import path: its programs have the names of the packages that they import.
        self._process = subprocess.Popen(
            [str(python), "-P", str(HERE / f"{setting.peer}.py"), json.dumps(asdict(setting)), str(folder), device],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env=environment,
        )
        # Converting and loading take memory and both cores, so one peer starts after the other. A process that ended
        # is told of by `run`.
        assert self._process.stdout is not None
        self._process.stdout.readline()

    def case(self, case: Case) -> Case:
        """What the peer serves of a case: all of it, or its text alone."""
        return case if self._engine.image else replace(case, images=0)

    def run(self, requests: list[Request], new: int) -> dict[str, Any] | None:
        """Serve a batch. Returns {"first": seconds to the first token, "steps": seconds per later token}, or None.

        None means a failure, see `fault`. Requests have equal lengths and numbers of images, and begin with the image
        tokens. transformers gets prepared tiles, mistralrs gets pictures, and a peer of text alone gets id 0 in place
        of image tokens.
        """
        ids, take, images = [list(request.ids) for request in requests], self._engine.image, []
        if take is None:
            ids = [[0] * len(request.images) + row[len(request.images) :] for row, request in zip(ids, requests)]
        else:
            images = [take(tiles, self.shape) for request in requests for tiles in request.images]
        to, answers = self._process.stdin, self._process.stdout
        assert to is not None and answers is not None
        try:
            to.write(json.dumps({"ids": ids, "images": images, "new": new}) + "\n")
            to.flush()
            told = json.loads(answers.readline() or "null") or {"fault": self._last_words()}
        except OSError:
            told = {"fault": self._last_words()}
        self.fault = told.get("fault", "")
        return None if self.fault else told

    def _last_words(self) -> str:
        """Why the process ended: its exit code and the last line that it printed."""
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


def _tiles(tiles: TiledImage, shape: ModelShape) -> dict[str, Any]:
    return {"data": base64.b64encode(tiles.data.tobytes()).decode(), "shape": tiles.data.shape, "aspect": tiles.aspect}


def _picture(tiles: TiledImage, shape: ModelShape) -> str:
    """The picture that the tiles were cut from, as a data: URI."""
    rows, columns = shape.vision.aspect_ratios[tiles.aspect - 1]
    side = shape.vision.tile
    grid = tiles.data[: rows * columns].reshape(rows, columns, -1, side, side).transpose(0, 3, 1, 4, 2)
    file = io.BytesIO()
    Image.fromarray(grid.reshape(rows * side, columns * side, -1)).save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _for_mistralrs(shape: ModelShape, checkpoint: Path, folder: Path) -> Path:
    """Convert a checkpoint for mistralrs: an older config.json, and a tokenizer whose words are `t` followed by the id.

    Weights are symbolic links. mistralrs accepts only text, so ids are passed as such words.
    """
    for file in checkpoint.glob("*.safetensors*"):
        (folder / file.name).symlink_to(file.resolve())
    text, vision, rope = shape.text, shape.vision, shape.text.rope
    scaling = (
        None
        if rope.type == "default"
        else {
            "rope_type": rope.type,
            "factor": rope.factor,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_positions,
        }
    )
    config = {
        "architectures": ["MllamaForConditionalGeneration"],
        "model_type": "mllama",
        "image_token_index": shape.image_token,
        "text_config": {
            "vocab_size": text.vocab,
            "hidden_size": text.width,
            "hidden_act": "silu",
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "num_key_value_heads": text.kv_heads,
            "intermediate_size": text.mlp,
            "rope_theta": rope.theta,
            "rope_scaling": scaling,
            "rms_norm_eps": text.eps,
            "tie_word_embeddings": False,
            "max_position_embeddings": text.positions,
            "cross_attention_layers": text.cross_layers,
        },
        "vision_config": {
            "hidden_size": vision.width,
            "hidden_act": "gelu",
            "num_hidden_layers": vision.layers,
            "num_global_layers": vision.global_layers,
            "num_attention_heads": vision.heads,
            "num_channels": vision.channels,
            "intermediate_size": vision.mlp,
            "vision_output_dim": vision.out_width,
            "image_size": vision.tile,
            "patch_size": vision.patch,
            "norm_eps": vision.eps,
            "max_num_tiles": vision.max_tiles,
            "intermediate_layers_indices": vision.features,
            "supported_aspect_ratios": vision.aspect_ratios,
        },
    }
    image = {
        "id": shape.image_token,
        "content": "<|image|>",
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    words = {f"t{id}": id for id in range(text.vocab)} | {image["content"]: shape.image_token}
    files = {
        "config": config,
        "tokenizer": {
            "version": "1.0",
            "added_tokens": [image],
            "pre_tokenizer": {"type": "WhitespaceSplit"},
            "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
            "model": {"type": "WordLevel", "vocab": words, "unk_token": "t0"},
        },
        "tokenizer_config": {
            "bos_token": None,
            "eos_token": image["content"],
            "chat_template": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
        },
        "generation_config": {"eos_token_id": shape.image_token},
        "preprocessor_config": {
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_pad": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
            "max_image_tiles": vision.max_tiles,
            "resample": 2,
            "rescale_factor": 1 / 255,
            "size": {"height": vision.tile, "width": vision.tile},
        },
    }
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf8")
    return folder


ENGINES = {
    "transformers": Engine(lambda shape, checkpoint, folder: checkpoint, _tiles),
    "mistralrs": Engine(_for_mistralrs, _picture),
    "llamacpp": Engine(export_text, None),
    "openvino": Engine(export_text, None),
}

"""Checkpoints in Meta's own format: params.json and consolidated.*.pth, one file per model-parallel rank. No torch.

Names and layout are those of llama_models 0.3.0 (llama3/multimodal/model.py). They differ from Hugging Face's in four
ways: weights are split over the files, each pair of a rotated head's dimensions lies side by side, self- and
cross-attention layers are numbered apart, and position embeddings are given per tile instead of per aspect ratio.
"""

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mllama_graph.core.dtypes import SAFETENSORS
from mllama_graph.core.errors import UserError
from mllama_graph.model import foreign
from mllama_graph.model.adapter import Adapter
from mllama_graph.model.fields import Fields
from mllama_graph.model.files import CheckpointFiles, verify_tensors
from mllama_graph.model.pth import PthFile
from mllama_graph.model.shape import MOST_LAYERS, ModelShape, shape_of
from mllama_graph.model.table import Entry, table

log = logging.getLogger(__name__)

FILES = "consolidated*.pth"
ENCODER, TEXT = "vision_model.vision_encoder", "text_model"
EMBEDDING, LEARNABLE = f"{TEXT}.tok_embeddings.weight", f"{TEXT}.learnable_embedding.weight"
TILE_POSITION = f"{ENCODER}.gated_positional_embedding"
# Computed here from params.json.
IGNORED = (f"{TEXT}.rope.freqs",)
# What params.json does not say: VisionEncoder's number of heads, and the layers whose input joins the output.
VISION_HEADS, FEATURES = 16, [3, 7, 15, 23, 30]
# apply_scaling in llama_models/llama3/model.py, and the context length of Llama 3.1 and later.
SCALED_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
POSITIONS = 131072
CROSS_LAYERS = "vision_num_cross_attention_layers"
# Parts of legacy names -> parts of Meta's names, after the layer's own.
TEXT_PARTS = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "cross_attn_attn_gate": "gate_attn",
    "cross_attn_mlp_gate": "gate_ffwd",
    **{f"{kind}.{part}_proj": f"attention.w{part}" for kind in ("self_attn", "cross_attn") for part in "qkvo"},
    **{f"cross_attn.{part}_norm": f"attention.{part}_norm" for part in "qk"},
}
VISION_PARTS = {
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "gate_attn": "gate_attn",
    "gate_ffn": "gate_ffn",
    **{f"self_attn.{part}_proj": f"attn.w{part}" for part in "qkvo"},
}
# Names outside of layers.
OTHERS = {
    "language_model.model.embed_tokens.weight": EMBEDDING,
    "language_model.model.norm.weight": f"{TEXT}.norm.weight",
    "language_model.lm_head.weight": f"{TEXT}.output.weight",
    "vision_model.patch_embedding.weight": f"{ENCODER}.conv1._linear.weight",
    "vision_model.class_embedding": f"{ENCODER}.class_embedding",
    "vision_model.gated_positional_embedding.gate": f"{ENCODER}.gated_positional_embedding_gate",
    "vision_model.gated_positional_embedding.embedding": f"{ENCODER}.positional_embedding",
    "vision_model.gated_positional_embedding.tile_embedding.weight": TILE_POSITION,
    "multi_modal_projector.weight": "vision_model.vision_projection.weight",
    "multi_modal_projector.bias": "vision_model.vision_projection.bias",
    **{
        f"vision_model.{side}_tile_positional_embedding.{part}": f"{ENCODER}.{side}_tile_pos_embed.{meta}"
        for side in ("pre", "post")
        for part, meta in (("gate", "gate"), ("embedding.weight", "embedding"))
    },
    **{
        f"vision_model.layernorm_{side}.{part}": f"{ENCODER}.ln_{side}.{part}"
        for side in ("pre", "post")
        for part in ("weight", "bias")
    },
}


def is_meta_folder(folder: Path) -> bool:
    """Whether a folder is in Meta's format: .pth files with params.json, and no safetensors beside them."""
    meta = (folder / "params.json").is_file() and any(folder.glob(FILES))
    return meta and not any(folder.glob("model*.safetensors"))


class MetaFiles(CheckpointFiles):
    """A folder in Meta's format. The shape is read from config.json if there is one, else from params.json and tensors.

    Raises UserError naming the file or tensor at fault.
    """

    def __init__(self, folder: Path, adapters: Sequence[Adapter] = ()):
        self.folder, self.adapters = folder, tuple(adapters)
        # In a Hugging Face repository Meta's files lie in original/, beneath config.json.
        configs = [folder / "config.json", *([folder.parent / "config.json"] if folder.name == "original" else [])]
        given = [found for path in configs if (found := Fields.of(path).values)]
        self.config: dict[str, Any] = given[0] if given else self._config()
        shape = shape_of(self.config, str(folder / "params.json"))
        rows = shape.text.vocab + self._size(LEARNABLE, 0)
        self.shape: ModelShape = replace(shape, embeddings=rows)

    def __getstate__(self) -> dict[str, Any]:
        """State without the files' tables; the process that unpickles it reads them itself."""
        return {key: value for key, value in self.__dict__.items() if key != "shards"}

    @cached_property
    def shards(self) -> list[PthFile]:
        """The files, in the order of Meta's ranks. Raises UserError where one is missing or has other tensors."""
        paths = sorted(path for path in self.folder.glob(FILES) if not path.name.startswith("._"))
        numbers = [int(found[1]) for path in paths if (found := re.fullmatch(r"consolidated\.(\d+)\.pth", path.name))]
        if numbers and numbers != list(range(len(paths))):
            raise UserError(f"{self.folder} has {', '.join(p.name for p in paths)}: a file is missing. Download it.")
        shards = [PthFile(path) for path in paths]
        for shard in shards:
            if differing := set(shard.tensors) ^ set(shards[0].tensors):
                raise UserError(
                    f"{shard.path} and {shards[0].path.name} differ in {len(differing)} tensors, the first "
                    f"{min(differing)}. Download them again."
                )
        return shards

    def _size(self, name: str, axis: int, split: bool = True) -> int:
        """Length of a tensor's axis, summed over the files where it is split."""
        parts = [shard.tensors[name].shape for shard in self.shards if name in shard.tensors]
        if not parts or len(parts[0]) <= axis:
            raise UserError(f"{self.folder}: 1 tensors missing: {name}. It is no Llama 3.2 Vision checkpoint.")
        return sum(part[axis] for part in parts) if split else parts[0][axis]

    def _config(self) -> dict[str, Any]:
        """The content of a config.json for params.json and the sizes of the tensors."""
        path = self.folder / "params.json"
        given = Fields.of(path)
        params = given.within("model") if given.has("model") else given
        layers, cross = params.integer("n_layers", 32, 1, MOST_LAYERS), params.integer(CROSS_LAYERS, -1)
        if cross < 1:
            raise UserError(f"{path} has no {CROSS_LAYERS}: it is no Llama 3.2 Vision checkpoint.")
        heads = params.integer("n_heads", 32, 1)
        width = self._size(f"{ENCODER}.class_embedding", 0, split=False)
        depth, global_depth = (
            self._depth(f"{ENCODER}.{part}.resblocks") for part in ("transformer", "global_transformer")
        )
        if (
            self._size("vision_model.vision_projection.weight", 1, split=False) != width * (1 + len(FEATURES))
            or depth < 31
        ):
            raise UserError(
                f"{path} does not say which layers of the vision tower join its output. Put the model's config.json "
                "beside it."
            )
        channels = 3
        return {
            "model_type": "mllama",
            "image_token_index": params.integer("vocab_size", 128256, 1),
            "text_config": {
                "vocab_size": params.integer("vocab_size", 128256, 1),
                "hidden_size": params.integer("dim", 4096, 1),
                "num_hidden_layers": layers + cross,
                "num_attention_heads": heads,
                "num_key_value_heads": params.integer("n_kv_heads", heads, 1) if params.has("n_kv_heads") else heads,
                "intermediate_size": self._size(f"{TEXT}.layers.0.feed_forward.w1.weight", 0),
                "rms_norm_eps": params.number("norm_eps", 1e-5),
                "rope_theta": params.number("rope_theta", 500000.0),
                "rope_scaling": SCALED_ROPE if params.flag("use_scaled_rope", False) else None,
                "max_position_embeddings": POSITIONS,
                "cross_attention_layers": _cross_layers(layers, cross),
            },
            "vision_config": {
                "hidden_size": width,
                "attention_heads": VISION_HEADS,
                "num_hidden_layers": depth,
                "num_global_layers": global_depth,
                "intermediate_size": self._size(f"{ENCODER}.transformer.resblocks.0.mlp.c_fc.weight", 0),
                "patch_size": math.isqrt(self._size(f"{ENCODER}.conv1._linear.weight", 1, split=False) // channels),
                "image_size": params.integer("vision_chunk_size", 448, 1),
                "max_num_tiles": params.integer("vision_max_num_chunks", 4, 1),
                "num_channels": channels,
                "intermediate_layers_indices": FEATURES,
            },
        }

    def _depth(self, name: str) -> int:
        """The number of layers in a stack."""
        found = (re.match(rf"{re.escape(name)}\.(\d+)\.", key) for key in self.shards[0].tensors)
        return 1 + max((int(match[1]) for match in found if match), default=-1)

    def source(self, name: str) -> str:
        """Meta's name of the tensor that a legacy name stands for."""
        if name in OTHERS:
            return OTHERS[name]
        found = re.fullmatch(r"(language_model\.model|vision_model\.\w+)\.layers\.(\d+)\.(.+?)(\.weight|\.bias)?", name)
        assert found, f"a name of the table: {name}"
        stack, layer, part, leaf = found[1], int(found[2]), found[3], found[4] or ""
        if stack != "language_model.model":
            return f"{ENCODER}.{stack.removeprefix('vision_model.')}.resblocks.{layer}.{VISION_PARTS[part]}{leaf}"
        text = self.shape.text
        own = text.cross_layers if layer in text.cross_layers else text.self_layers
        kind = "cross_attention_layers" if layer in text.cross_layers else "layers"
        return f"{TEXT}.{kind}.{own.index(layer)}.{TEXT_PARTS[part]}{leaf}"

    def meta_shape(self, entry: Entry) -> tuple[int, ...]:
        """The shape of an entry's tensor in Meta's layout, joined over the files; the embedding's without new rows."""
        vision, name = self.shape.vision, self.source(entry.name)
        if name == EMBEDDING:
            return (self.shape.text.vocab, *entry.shape[1:])
        if entry.path == "vision.patch":
            return entry.shape[0], math.prod(entry.shape[1:])
        if name == TILE_POSITION:
            return vision.max_tiles, vision.max_tiles, vision.tokens, vision.width
        if name.endswith("tile_pos_embed.embedding"):
            return vision.max_tiles, vision.max_tiles, 1, vision.width
        return entry.shape

    def axis(self, name: str, whole: tuple[int, ...]) -> int | None:
        """The axis along which the files split a tensor; None where each has the whole, or nothing fits.

        A part is never as large as the whole, so that the sizes decide.
        """
        shapes = [shard.tensors[name].shape for shard in self.shards]
        for axis, size in enumerate(whole):
            rest = all(
                len(s) == len(whole) and (*s[:axis], *s[axis + 1 :]) == (*whole[:axis], *whole[axis + 1 :])
                for s in shapes
            )
            if len(shapes) > 1 and rest and sum(s[axis] for s in shapes) == size:
                return axis
        return None

    @property
    def quantised(self) -> str:
        """Empty: Meta's own format holds these models unquantised."""
        return ""

    @cached_property
    def stored(self) -> str:
        """The dtype of the weights: fp32, fp16 or bf16. Raises UserError where a tensor has any other."""
        for shard in self.shards:
            for name, tensor in shard.tensors.items():
                if tensor.kind not in SAFETENSORS and name not in IGNORED:
                    raise UserError(foreign.explain_dtype(shard.path, name, tensor.kind))
        return SAFETENSORS[self.shards[0].tensors[EMBEDDING].kind]

    def verify(self) -> None:
        """Check that the files have the table's tensors, each with its shape and dtype, and that the adapters fit.

        Raises UserError naming the tensors at fault, by Meta's names.
        """
        entries, _ = table(self.shape), self.stored
        expected = [replace(entry, name=self.source(entry.name), shape=self.meta_shape(entry)) for entry in entries]
        text = self.shape.text
        expected.append(Entry(LEARNABLE, "", (self.shape.embeddings - text.vocab, text.width), 0, "embed"))
        shapes = {entry.name: entry.shape for entry in expected}
        found: dict[str, tuple[int, ...]] = {}
        for name, tensor in self.shards[0].tensors.items():
            split = name in shapes and self.axis(name, shapes[name]) is not None
            found |= {name: shapes[name] if split else tensor.shape} if name not in IGNORED else {}
        verify_tensors(self.folder, expected, found)
        for adapter in self.adapters:
            adapter.verify(entries, self.shape)


def _cross_layers(layers: int, cross: int) -> list[int]:
    """Positions of the cross-attention layers among all layers: evenly spread from the last self-attention layer.

    Source: _init_fusion_schedule in llama_models; a cross-attention layer comes before its self-attention layer.
    """
    before = list(range(layers))[::-1][:: math.ceil(layers / cross)][:cross][::-1]
    return [layer + count for count, layer in enumerate(before)]


def open_checkpoint(folder: Path, adapters: Sequence[Adapter] = ()) -> CheckpointFiles:
    """The files of a checkpoint in Hugging Face's or Meta's format. Raises UserError where it is neither."""
    return MetaFiles(folder, adapters) if is_meta_folder(folder) else CheckpointFiles(folder, adapters)

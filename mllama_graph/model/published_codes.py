"""Reads regions of quantised weights from published checkpoints, as codes or as values. stored.py has the layouts.

Shape letters: O outputs and I inputs of the region that is read; N outputs and K inputs of the whole; G groups of
inputs; W words or bytes, each with several codes.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mllama_graph.core.errors import UserError
from mllama_graph.model.codes import Codes, pack, unpack, values
from mllama_graph.model.formats import STATIC, Format
from mllama_graph.model.layout import Layout, LeafRows
from mllama_graph.model.reading import Region, read_safetensors
from mllama_graph.model.stored import Stored
from mllama_graph.model.table import Entry

if TYPE_CHECKING:
    from mllama_graph.model.files import CheckpointFiles

# Weights per block where torch converts them: the intermediate tensors take about 100 MB.
READ_BLOCK = 1 << 23
# Weights per block where a layout writes the file's codes: at most 64 MB of the file are mapped at once.
LAID_BLOCK = 1 << 26
# The same where codes are also summed (`quant_bias`): the block is still in the cache when it is written.
CHECKED_BLOCK = 1 << 22
# The place in a word of AWQ of each of its 8 outputs' codes.
AWQ_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]


class PublishedWeight:
    """A quantised weight of a checkpoint's files."""

    def __init__(self, files: "CheckpointFiles", stored: Stored, entry: Entry):
        self.files, self.stored = files, stored
        self.outputs, self.inputs = entry.shape

    def blocks(self, rows: slice, weights: int = READ_BLOCK) -> Iterator[slice]:
        """Rows in blocks of about so many weights, in multiples of 8 rows: a word of AWQ has 8 outputs."""
        count = max(8, weights // self.inputs // 8 * 8)
        for first in range(rows.start, rows.stop, count):
            yield slice(first, min(first + count, rows.stop))

    def values(self, region: Region) -> Tensor:
        """The values of a region in fp32 (O, I)."""
        rows, columns = region
        found = torch.empty(rows.stop - rows.start, columns.stop - columns.start)
        # Columns that surely share a scale.
        group = 1 if "order" in self.stored.tensors else self.stored.group or self.inputs
        first_G = self._input_groups()[columns][:: (width := math.gcd(group, columns.start, columns.stop))]
        form = Format(self.stored.code, width)
        for block in self.blocks(rows):
            self._check_bias(block, None)
            scale_OG, shift_OG = self._scales(block, None)
            shift_OG = None if shift_OG is None else shift_OG[:, first_G]
            codes = Codes(self._codes(block, columns), scale_OG[:, first_G], shift_OG, codebook=self._codebook())
            found[block.start - rows.start : block.stop - rows.start] = values(codes, form)
        return found

    def write(self, held: LeafRows, rows: slice, columns: slice) -> None:
        """Write a region to rows of a leaf. If the format is sorted, the region must have all columns."""
        most = CHECKED_BLOCK if "quant_bias" in self.stored.tensors else LAID_BLOCK
        for block in self.blocks(rows, most if held.layout else READ_BLOCK):
            self._write_block(held.after(block.start - rows.start), block, columns)

    def _write_block(self, held: LeafRows, rows: slice, columns: slice) -> None:
        self._check_bias(rows, held.layout)
        form, group_K = held.form, self._input_groups()
        order = torch.argsort(group_K, stable=True).to(torch.int32) if form.sorted else None
        in_order = group_K[columns] if order is None else group_K[order]
        first_G = in_order[:: form.group or columns.stop - columns.start]
        raw = self._to_lay_out(form, rows, columns, order) if held.layout else None
        if held.layout and raw is not None:
            held.layout.codes(held.parts["weight"], form, held.at, raw, self.stored.layout, order)
        else:
            held.write("weight", self._packed(form, rows, columns, order))
        for name, of_all in zip(("scale", "shift"), self._scales(rows, held.layout), strict=True):
            if of_all is not None:
                same = torch.equal(first_G, torch.arange(of_all.shape[1]))
                held.write(name, of_all if same else of_all.index_select(1, first_G))
            elif name in held.parts:
                held.write(name, torch.zeros(rows.stop - rows.start, len(first_G)))
        if order is not None:
            held.write("order", order)
        if (codebook := self._codebook()) is not None:
            held.write("codebook", codebook)
        if form.activations == STATIC:
            for name, value in zip(("input_scale", "input_zero"), self.stored.static, strict=True):
                held.parts[name].fill_(value)

    # ---- codes

    def _to_lay_out(self, form: Format, rows: slice, columns: slice, order: Tensor | None) -> Tensor | None:
        """Codes of a region as the file holds them; None if the region cuts a word."""
        layout = self.stored.layout
        if columns.start % 8 or columns.stop % 8:
            return None
        if layout == "rows":
            return self._read("weight", (rows, columns))
        if layout == "blocks":
            return None if self.inputs % 8 else self._rows_of_bytes(rows)[:, columns.start // 2 : columns.stop // 2]
        if layout == "awq":
            cut = rows.start % 8 or rows.stop % 8 or order is not None
            return None if cut else self._read("weight", (columns, slice(rows.start // 8, rows.stop // 8)))
        words = slice(*(end * form.bits // 32 for end in (columns.start, columns.stop)))
        return self._read("weight", (words, rows) if layout == "gptq" else (rows, words))

    def _packed(self, form: Format, rows: slice, columns: slice, order: Tensor | None) -> Tensor:
        """Codes as a leaf stores them. The bytes of a file's words are the leaf's where no column must be moved."""
        aligned = not (columns.start % 8 or columns.stop % 8 or self.inputs % 2)
        if form.bits == 4 and order is None and aligned:
            return self._bytes(rows, columns)
        codes = self._codes(rows, columns)
        return pack(codes if order is None else codes.index_select(1, order), form)

    def _codes(self, rows: slice, columns: slice) -> Tensor:
        """Codes (O, I) in the order of the file."""
        if self.stored.layout == "rows":
            return self._read("weight", (rows, columns))
        if self.stored.layout == "blocks":
            start, stop = rows.start * self.inputs, rows.stop * self.inputs
            raw = self._flat(start // 2, -(-stop // 2))
            flat = torch.stack((raw >> 4, raw & 15), dim=-1).flatten()[start % 2 :][: stop - start]
            return flat.view(-1, self.inputs)[:, columns]
        whole = slice(columns.start // 8 * 8, -(-columns.stop // 8) * 8)
        codes = self._bytes(rows, whole)
        codes = unpack(codes, Format("int4")) if self.stored.code == "int4" else (codes ^ 128).view(torch.int8)
        return codes[:, columns.start - whole.start :][:, : columns.stop - columns.start]

    def _bytes(self, rows: slice, columns: slice) -> Tensor:
        """Bytes (O, W) of codes along the inputs, the first in the low half; columns are multiples of 8."""
        if self.stored.layout == "blocks":
            raw = self._rows_of_bytes(rows)[:, columns.start // 2 : columns.stop // 2]
            return raw >> 4 | raw << 4
        if self.stored.layout == "awq":
            words_IW = self._read("weight", (columns, slice(rows.start // 8, -(-rows.stop // 8))))
            # A byte has the codes of two outputs.
            raw_OI = words_IW.contiguous().view(torch.uint8).T.contiguous()
            even, odd = raw_OI[:, ::2], raw_OI[:, 1::2]
            packed = torch.stack((even & 15 | odd << 4, even >> 4 | odd & 240), dim=1).view(-1, 8, even.shape[1])
            return packed[:, AWQ_PLACES].flatten(0, 1)[rows.start % 8 :][: rows.stop - rows.start]
        per = 32 // int(self.stored.options["bits"])
        words = slice(columns.start // per, -(-columns.stop // per))
        if self.stored.layout == "packed":
            return self._read("weight", (rows, words)).contiguous().view(torch.uint8)
        return self._read("weight", (words, rows)).T.contiguous().view(torch.uint8)

    def _rows_of_bytes(self, rows: slice) -> Tensor:
        """Bytes of the codes of whole rows, of an even number of inputs."""
        return self._flat(rows.start * self.inputs // 2, rows.stop * self.inputs // 2).view(-1, self.inputs // 2)

    def _flat(self, start: int, stop: int) -> Tensor:
        """Bytes of the flattened weight."""
        shape = self.files.stored_shape(self.stored.tensors["weight"])
        taken = slice(start, stop)
        raw = self._read("weight", (taken,) if shape[0] > 1 or len(shape) == 1 else (slice(0, 1), taken))
        return raw.flatten()

    # ---- scales

    def _scales(self, rows: slice, layout: Layout | None) -> tuple[Tensor, Tensor | None]:
        """Scales of all groups of some rows (O, G), as stored or in fp32, and their shifts in fp32 or None."""
        if self.stored.layout == "blocks":
            return self._of_blocks(rows, layout), None
        return {"rows": self._of_rows, "packed": self._of_packed}.get(self.stored.layout, self._of_gptq)(rows)

    def _of_rows(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        options, count = self.stored.options, rows.stop - rows.start

        def of(role: str) -> Tensor:
            whole = self._read(role).float()
            if whole.numel() == 1:
                return whole.view(1, 1).expand(count, 1)
            whole = whole.view(len(whole), -1)
            block = int(options.get("block_rows", 1))
            return whole[torch.arange(rows.start, rows.stop) // block]

        if "deq_scale" in self.stored.tensors:
            given = self._read("deq_scale").flatten()[rows]
            fp32 = given.to(torch.int32).view(torch.float32) if given.dtype == torch.int64 else given
            scale = fp32[:, None] / self.stored.static[0]
        else:
            scale = of("scale") / options.get("divisor", 1.0)
        return scale, -of("zero") * scale if self.stored.shifted else None

    def _of_packed(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        whole = self._read("scale")
        scale = whole.view(1, 1).expand(rows.stop - rows.start, 1) if whole.numel() == 1 else whole[rows]
        if not self.stored.shifted:
            return scale, None
        scale = scale.float()
        if self.files.kind(self.stored.tensors["zero"]) == "I8":
            return scale, -self._read("zero")[rows].float() * scale
        bits = int(self.stored.options["bits"])
        per = 32 // bits
        words = self._read("zero", (slice(rows.start // per, -(-rows.stop // per)), slice(0, scale.shape[1])))
        codes = _unpacked(words.T.contiguous(), bits).T[rows.start % per :][: len(scale)]
        return scale, (float(1 << (bits - 1)) - codes) * scale

    def _of_gptq(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        scale = self._read("scale")[:, rows].T
        if not self.stored.shifted:
            return scale, None
        scale = scale.float()
        bits, words = int(self.stored.options["bits"]), self._read("zero")
        codes = _unpacked(words, bits)
        if self.stored.layout == "awq":
            codes = codes.unflatten(1, (-1, 8))[..., AWQ_PLACES].flatten(1)
        zero = codes[:, rows].T.float() + self.stored.options["less_one"]
        return scale, (float(1 << (bits - 1)) - zero) * scale

    def _of_blocks(self, rows: slice, layout: Layout | None) -> Tensor:
        options, group = self.stored.options, self.stored.group
        block = int(options["block"])
        first, last = rows.start * self.inputs // block, -(-rows.stop * self.inputs // block)
        scale = self._read("scale", (slice(first, last),))
        if "nested_scale" in self.stored.tensors:
            values_256, of_blocks = self._read("nested_map"), self._read("nested_scale")
            each = int(options["nested_block"])
            if layout:
                scale = layout.unnested(scale, values_256, of_blocks, each, first, options["offset"])
            else:
                nested = _repeated(of_blocks, each, first, last)
                scale = values_256.index_select(0, scale.int()) * nested + options["offset"]
        parts = slice(rows.start * self.inputs // group, rows.stop * self.inputs // group)
        skipped, per = first * (block // group), block // group
        scale = _repeated(scale.float(), per, parts.start - skipped, parts.stop - skipped)
        return scale.view(rows.stop - rows.start, -1)

    def _codebook(self) -> Tensor | None:
        return self._read("codebook").float() if self.stored.code == "codebook" else None

    def _input_groups(self) -> Tensor:
        """The group of each input."""
        if "order" in self.stored.tensors:
            return self._read("order").long()
        return torch.arange(self.inputs) // (self.stored.group or self.inputs)

    def _check_bias(self, rows: slice, layout: Layout | None) -> None:
        """Raises UserError where ModelSlim's quant_bias is not just the share of the zero of activations."""
        if "quant_bias" not in self.stored.tensors:
            return
        bias = self._read("quant_bias").flatten()[rows].long()
        codes = self._codes(rows, slice(0, self.inputs))
        sums = layout.sums(codes) if layout else codes.sum(1, dtype=torch.int32)
        # One for rounding.
        if wrong := ((bias + round(self.stored.static[1]) * sums).abs() > 1).nonzero().flatten().tolist():
            raise UserError(
                f"{self.files.folder}: {self.stored.tensors['quant_bias']} holds a bias of its own in {len(wrong)} "
                f"rows (row {rows.start + wrong[0]}), and the layer has none. Quantise again without anti_outlier."
            )

    def _read(self, role: str, region: Region | None = None) -> Tensor:
        name, path = self.files.tensors[self.stored.tensors[role]]
        return read_safetensors(path, name, region)


def _repeated(each: Tensor, times: int, first: int, last: int) -> Tensor:
    """Elements first .. last of a vector whose elements are repeated so often."""
    some = each[first // times : -(-last // times)]
    return some if times == 1 else some.repeat_interleave(times)[first % times :][: last - first]


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """Codes of int32 words (..., W), the lowest bits first, as uint8."""
    raw = words.contiguous().view(torch.uint8)
    return torch.stack((raw & 15, raw >> 4), dim=-1).flatten(-2) if bits == 4 else raw

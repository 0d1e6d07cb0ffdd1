"""Parts of block tables: together they hold each key once, whatever the lengths, and empty ones weigh nothing."""

import pytest
import torch

from mllama_graph.model.inputs import ImageInput
from mllama_graph.ops.npu_parts import image_parts, merged, text_parts

P = 128


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("S", [2, 3, 5, 7])
def test_parts_of_text_hold_each_key_once_in_order(S):
    lengths = [1, 127, 128, 129, 384, 640, 896]
    table = torch.arange(len(lengths) * 7, dtype=torch.int32).view(-1, 7)
    parts, count, empty = text_parts(table, torch.tensor(lengths), S, P)
    assert parts.dtype == torch.int32 and count.dtype == torch.int64 and empty.dtype == torch.float32
    assert parts.shape == (len(lengths) * S, -(-7 // S)) and empty.shape == (len(lengths), S, 1, 1)
    for b, length in enumerate(lengths):
        held, sizes = [], []
        for s in range(S):
            pages, tokens = parts[b * S + s], int(count[b * S + s])
            if empty[b, s] < 0:
                # It reads the sequence's own first token.
                assert tokens == 1 and (pages == table[b, 0]).all()
                continue
            sizes.append(-(-tokens // P))
            held += [int(pages[at // P]) * P + at % P for at in range(tokens)]
        assert held == [int(table[b, at // P]) * P + at % P for at in range(length)]
        assert max(sizes) - min(sizes) <= 1 and len(sizes) == min(S, -(-length // P))


@pytest.mark.parametrize("S", [2, 4])
def test_parts_of_images_list_what_a_row_sees_and_no_part_is_wholly_masked(S):
    table = int32([[4, 2, 1, 5], [7, 3, 7, 7], [0, 0, 0, 0], [8, 2, 5, 8]])
    fill = int32([[128, 100, 128, 3], [128, 9, 0, 0], [0, 0, 0, 0], [128, 1, 128, 0]])
    see = int32([[0, 4], [1, 2], [0, 0], [1, 3]])
    parts, count, empty, unseen = image_parts(ImageInput(table, fill, see), S, P)
    for b in range(len(table)):
        held = []
        for s in range(S):
            e = b * S + s
            hidden = unseen[e, 0, 0, : int(count[e])]
            assert not hidden.all()
            if not empty[b, s]:
                held += [(int(parts[e, at // P]), at % P) for at in range(len(hidden)) if not hidden[at]]
        first, last = see[b].tolist()
        wanted = [(int(table[b, j]), at) for j in range(first, last) for at in range(int(fill[b, j]))]
        # A row that sees no image reads a page, and its result is discarded.
        assert held == wanted or (first == last and held == [(int(table[b, 0]), at) for at in range(P)])


def test_a_part_without_keys_changes_nothing():
    out, lse = torch.randn(2, 2, 3, 4), 40 * torch.randn(2, 2, 3, 1)
    alone = merged(out[:, :1], lse[:, :1], torch.zeros(2, 1, 1, 1))
    assert torch.equal(merged(out, lse, torch.tensor([0.0, -1e30]).view(1, 2, 1, 1).expand(2, -1, 1, 1)), alone)

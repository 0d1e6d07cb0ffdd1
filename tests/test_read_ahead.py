"""A checkpoint's files are asked for in the order of the table, a bounded number of bytes ahead of the loader."""

from mllama_graph.model import read_ahead
from mllama_graph.model.files import CheckpointFiles
from mllama_graph.model.read_ahead import ReadAhead
from mllama_graph.model.small import place_of
from mllama_graph.model.table import Shard, table


def test_all_tensors_are_asked_for_in_order_and_never_far_ahead(checkpoint, monkeypatch):
    files, asked = CheckpointFiles(checkpoint("base")), []
    monkeypatch.setattr(read_ahead, "_ask", lambda path, start, stop: asked.append((start, stop)))
    entries = table(files.shape)
    places = [place_of(files.tensors[entry.name][1], files.tensors[entry.name][0]) for entry in entries]
    wanted = [(place.start, place.stop) for place in places]
    largest = max(stop - start for start, stop in wanted)
    monkeypatch.setattr(read_ahead, "AHEAD", 2 * largest)
    ahead, loaded = ReadAhead(files), 0
    leaves = {}
    for entry, (start, stop) in zip(entries, wanted, strict=True):
        leaves[entry.path] = leaves.get(entry.path, 0) + stop - start
    for size in leaves.values():
        ahead.advance()
        assert loaded + size <= sum(stop - start for start, stop in asked) <= loaded + 3 * largest
        loaded += size
    assert sorted(asked) == sorted(wanted)


def test_a_rank_asks_for_its_rows_of_tensors_that_are_split_by_rows(checkpoint, monkeypatch):
    files, asked = CheckpointFiles(checkpoint("base")), []
    monkeypatch.setattr(read_ahead, "_ask", lambda path, start, stop: asked.append((start, stop)))
    for rank in range(2):
        ReadAhead(files, Shard(rank, 2)).advance()
    for entry in table(files.shape):
        place = place_of(files.tensors[entry.name][1], files.tensors[entry.name][0])
        cut = (place.start + place.stop) // 2
        if entry.shard == 0 and entry.shape[0] % 2 == 0:
            assert asked.count((place.start, cut)) == 1 and asked.count((cut, place.stop)) == 1, entry.name
        elif entry.shard != 0:
            assert asked.count((place.start, place.stop)) == 2, entry.name


def test_what_the_page_cache_holds_is_not_asked_for(tmp_path, monkeypatch):
    path, hints = tmp_path / "file", []
    path.write_bytes(bytes(100))
    monkeypatch.setattr(read_ahead.os, "posix_fadvise", lambda *given: hints.append(given))
    read_ahead._ask(path, 10, 90)
    assert not hints
    monkeypatch.setattr(read_ahead, "_is_cached", lambda file, offset: False)
    read_ahead._ask(path, 10, 90)
    assert [hint[1:3] for hint in hints] == [(10, 80)]

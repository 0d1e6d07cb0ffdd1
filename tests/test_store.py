"""The graph store: an entry is complete or absent, and the fault of a damaged entry is named."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import time

import pytest

from mllama_graph.graphs.store import ASIDE, PACKAGE, GraphStore, key_of


def add(store, content=b"package", key="key", fields=None):
    """An entry of `content`, as the compiler would add it."""
    with store.workspace() as workspace:
        (workspace / "built").write_bytes(content)
        return store.add(key, fields or {"a": 1}, workspace / "built").parent


DAMAGES = {
    "emptied": (lambda entry: (entry / PACKAGE).write_bytes(b""), "graph.pt2 is altered or truncated"),
    "altered": (lambda entry: (entry / PACKAGE).write_bytes(b"Package"), "graph.pt2 is altered or truncated"),
    "gone": (lambda entry: (entry / PACKAGE).unlink(), "graph.pt2 can't be read"),
    "other key": (lambda entry: (entry / "key.json").write_text("{}"), "key.json is altered or truncated"),
    "no sums": (lambda entry: (entry / "checksums.json").unlink(), "checksums.json can't be read"),
    "half sums": (lambda entry: (entry / "checksums.json").write_text("{"), "checksums.json can't be read"),
    "list of sums": (lambda entry: (entry / "checksums.json").write_text("[]"), "checksums.json can't be read"),
    "empty sums": (
        lambda entry: (entry / "checksums.json").write_text("{}"),
        "checksums.json lists neither graph.pt2 nor torchair",
    ),
    "binary sums": (lambda entry: (entry / "checksums.json").write_bytes(b"\xff"), "checksums.json can't be read"),
    "absent": (shutil.rmtree, None),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_named_not_used_and_can_be_written_again(damage, tmp_path):
    store = GraphStore(tmp_path)
    assert store.find("key") == (None, None)
    entry = add(store)
    assert store.find("key")[0].read_bytes() == b"package"
    act, fault = DAMAGES[damage]
    act(entry)
    assert store.find("key") == (None, fault)
    add(store, b"again")
    assert store.find("key")[0].read_bytes() == b"again"


def write_for_ever(folder):
    store, content = GraphStore(folder), os.urandom(4_000_000)
    while True:
        add(store, content)


def test_a_kill_at_any_moment_leaves_no_entry_or_a_whole_one(tmp_path):
    context = multiprocessing.get_context("fork")
    turn, path = 0, None
    # Turns grow longer until an entry has been written, since a slow machine writes nothing in the first turns.
    while turn < 15 or path is None:
        writer = context.Process(target=write_for_ever, args=(tmp_path,))
        writer.start()
        time.sleep(0.01 + 0.004 * turn)
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        path, fault = GraphStore(tmp_path).find("key")
        assert fault is None, fault
        turn += 1


def test_a_sweep_clears_old_leftovers_and_nothing_else(tmp_path):
    store = GraphStore(tmp_path)
    add(store)
    old, young = tmp_path / f"{ASIDE}old", tmp_path / f"{ASIDE}young"
    old.mkdir(), young.mkdir()
    os.utime(old, (0, 0))
    store.sweep()
    assert not old.exists() and young.exists() and store.find("key")[0]


def enter(folder, order, name):
    with GraphStore(folder).lock("key"):
        order.put((name, "in"))
        time.sleep(0.2)
        order.put((name, "out"))


def test_two_processes_build_one_entry_one_after_the_other(tmp_path):
    context = multiprocessing.get_context("fork")
    order = context.Queue()
    builders = [context.Process(target=enter, args=(tmp_path, order, name)) for name in "ab"]
    for builder in builders:
        builder.start()
    events = [order.get(timeout=30) for _ in range(4)]
    for builder in builders:
        builder.join()
    assert [what for _, what in events] == ["in", "out", "in", "out"] and events[0][0] == events[1][0]


def test_without_locks_the_entry_of_either_writer_stays_whole(tmp_path, monkeypatch):
    # As on NFS without its lock service.
    monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "no locks")))
    ours, theirs = GraphStore(tmp_path), GraphStore(tmp_path)
    with ours.lock("key"), theirs.lock("key"):
        add(theirs, b"theirs")
    # The other host has renamed its entry into place after we have looked.
    monkeypatch.setattr(ours, "_discard", lambda entry: None)
    assert (add(ours, b"ours") / PACKAGE).read_bytes() == b"theirs"
    assert not list(tmp_path.glob(f"{ASIDE}*"))


def test_a_removal_that_leaves_files_behind_is_no_error(tmp_path, monkeypatch):
    # NFS keeps a removed file that is open as .nfsXXXX, so that its folder can't be removed.
    store = GraphStore(tmp_path)
    add(store)
    monkeypatch.setattr("os.rmdir", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.ENOTEMPTY, "not empty")))
    add(store, b"again")
    assert store.find("key")[0].read_bytes() == b"again"


def test_the_clock_of_this_host_does_not_make_a_workspace_old(tmp_path, monkeypatch):
    store = GraphStore(tmp_path)
    with store.workspace() as workspace:
        monkeypatch.setattr("time.time", lambda: os.stat(workspace).st_mtime + 1e6)
        store.sweep()
        assert workspace.is_dir()


def test_a_folder_that_can_t_be_written_warns_and_keeps_graphs_for_the_run(tmp_path):
    # A file in the place of the folder also stops root, which ignores permissions.
    (tmp_path / "file").write_text("")
    store = GraphStore(tmp_path / "file" / "graphs")
    assert "can't be written" in store.warning and store.libraries == store.written != store.folder
    add(store)
    assert store.find("key")[0].read_bytes() == b"package"


def test_entries_come_last_used_first_with_their_fields_and_faults(tmp_path):
    store = GraphStore(tmp_path)
    for key, used in (("old", 100), ("new", 200)):
        entry = add(store, key=key, fields={"name": key})
        os.utime(entry, (used, used))
    (tmp_path / "old" / PACKAGE).write_bytes(b"")
    found = [(entry.key, entry.fields, entry.fault) for entry in store.entries(verify=True)]
    assert found == [("new", {"name": "new"}, None), ("old", {"name": "old"}, "graph.pt2 is altered or truncated")]


def test_the_key_is_that_of_the_fields_as_json():
    fields = {"b": [1, 2], "a": {"x": 1.5}}
    assert key_of(fields) == key_of(json.loads(json.dumps(fields))) == key_of(dict(reversed(fields.items())))
    assert key_of(fields) != key_of(fields | {"b": [1, 3]})

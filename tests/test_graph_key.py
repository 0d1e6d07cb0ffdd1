"""The key of a stored graph: what changes it, and what must not."""

import ast
import re
import shutil
from dataclasses import replace

import pytest
import torch
from engines import GRAPH_PLAN, GRAPH_SPEC, start
from safetensors.torch import save_file

from mllama_graph.core.paths import PACKAGE
from mllama_graph.graphs import key as keys
from mllama_graph.plan.bucket import Bucket

SPEC = GRAPH_SPEC
PLAN = GRAPH_PLAN | {"compile": "wait", "kernels": "plain"}
DECODE = Bucket("decode", 4, 4, 6, 0)


@pytest.fixture
def key(checkpoint, empty_store):
    """key(bucket, changes to the plan) -> the key of a graph and its readable fields."""

    def of(bucket=DECODE, name=SPEC, **changes):
        engine = start(checkpoint(name), **(PLAN | {"graph_cache": str(empty_store)} | changes))
        return keys.key(engine.executor.graphs.spec, bucket)

    return of


CHANGES = {
    "dtype": {"dtype": "bf16"},
    "format of pages": {"kv": "int8"},
    "narrow weights": {"name": "half", "dtype": "auto"},
    "page size": {"page_size": 8, "pages": [12]},
    "number of pages": {"num_pages": 50},
    "threads": {"threads": 2},
    "model": {"name": "cross_last"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_key_changes_with(change, key):
    threads = torch.get_num_threads()
    try:
        plain = key(name=CHANGES[change].get("name", SPEC)) if change == "narrow weights" else key()
        assert key(**CHANGES[change]) != plain
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "bucket",
    [
        Bucket("decode", 8, 8, 6, 0),
        Bucket("decode", 4, 4, 7, 0),
        Bucket("decode", 4, 4, 6, 4),
        Bucket("prefill", 1, 32, 6, 0),
    ],
)
def test_the_key_changes_with_the_bucket(bucket, key):
    assert key(bucket) != key()


def test_the_key_changes_with_backend_options_source_torch_and_processor(monkeypatch, checkpoint):
    spec, bucket = start(checkpoint(SPEC), **PLAN).executor.graphs.spec, Bucket("decode", 4, 4, 6, 0)

    def of(**changes):
        return keys.key(replace(spec, **changes), bucket)

    plain = of()
    assert of(options=(("max_autotune", True),)) != plain
    assert of(backend="inductor") != of(backend="eager")
    assert of(world_size=2) != plain
    assert of(collectives="distributed") == plain, "a single rank exchanges nothing"
    assert of(world_size=2, collectives="distributed") != of(world_size=2)
    assert of(deterministic=True) != plain
    for name, value in (("source_hash", lambda: "other"), ("processor_name", lambda capability: "other")):
        with monkeypatch.context() as patch:
            patch.setattr(keys, name, value)
            assert of() != plain, name
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "9.9")
        assert of() != plain
    assert of() == plain


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "other"},
        {"seed": 5},
        {"temperature": 0.7},
        {"image": "a.png"},
        {"memory_gib": 8.0},
        {"output_dir": "elsewhere"},
        {"graph_cache": "elsewhere"},
    ],
    ids=str,
)
def test_the_key_ignores_settings_that_shape_no_graph(change, key):
    assert key(**change) == key()


@pytest.fixture
def package(tmp_path):
    """A copy of the package's source."""
    copy = tmp_path / "mllama_graph"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "conf"))
    return copy


def changed(package, name: str, change) -> bool:
    """Whether replacing a file's text by change(text) changes the hash of the source."""
    path, before = package / name, keys.source_hash.__wrapped__(package)
    text = path.read_text()
    assert change(text) != text
    path.write_text(change(text))
    try:
        return keys.source_hash.__wrapped__(package) != before
    finally:
        path.write_text(text)


def test_the_import_pattern_finds_every_import():
    """The key finds imports with a pattern, which is faster than parsing; Python's parser is the oracle."""
    for file in PACKAGE.rglob("*.py"):
        parsed = set()
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.ImportFrom):
                parsed |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                parsed |= {alias.name for alias in node.names}
        # The pattern may find more, since a line of a docstring can look like an import; this is harmless.
        assert parsed <= set(keys._imports(file)), file


@pytest.mark.parametrize(
    "name",
    [
        "model/text.py",
        "model/vision.py",
        "model/tree.py",
        "model/shape.py",
        "ops/plain.py",
        "ops/npu.py",
        "graphs/aot.py",
        "graphs/torchair.py",
        "core/dtypes.py",
        "graphs/build.py",
        "native/operators.py",
        "native/graph.h",
    ],
)
def test_the_source_hash_follows_every_file_that_decides_what_a_graph_computes(package, name):
    assert changed(package, name, lambda text: text + "\n")


def test_a_constant_that_tracing_reads_is_part_of_the_source(package):
    # ops/plain.py reads WIDEN_ROWS while a linear layer is traced; a graph with another value must not be reused.
    assert changed(
        package, "core/dtypes.py", lambda text: re.sub(r"^WIDEN_ROWS = \d+", "WIDEN_ROWS = 7", text, flags=re.M)
    )


def test_a_new_file_counts_once_it_is_imported(package):
    (package / "model" / "gate.py").write_text("FACTOR = 2\n")
    assert changed(package, "model/text.py", lambda text: "from mllama_graph.model import gate\n" + text)
    text = package / "model" / "text.py"
    text.write_text("from mllama_graph.model.gate import FACTOR\n" + text.read_text())
    assert changed(package, "model/gate.py", lambda text: "FACTOR = 3\n")


@pytest.mark.parametrize(
    "name",
    [
        "__init__.py",
        "cli.py",
        "core/report.py",
        "core/place.py",
        "engine/scheduler.py",
        "plan/cost.py",
        "inputs/processor.py",
        "tasks/bench.py",
    ],
)
def test_the_source_hash_ignores_files_that_shape_no_graph(package, name):
    # __init__.py holds the version.
    assert not changed(package, name, lambda text: text + "# changed\n")


def test_an_adapter_leaves_the_key_as_it_is(key, tmp_path):
    # Weights are not in graphs, so that a fine-tune is served by the graphs of its base.
    weight = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
    factors = {f"{weight}.lora_A.weight": torch.ones(2, 192), f"{weight}.lora_B.weight": torch.ones(192, 2)}
    save_file(factors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    assert key(adapter=str(tmp_path)) == key()

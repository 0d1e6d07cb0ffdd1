"""Building a native library: once, complete or not at all, and with one-line errors."""

import os
import platform
import stat
from pathlib import Path

import pytest

from mllama_graph import native


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """compiler(script) -> the log of its builds. The compiler is replaced by a shell script that writes to $out."""

    def install(script: str) -> Path:
        path, log = tmp_path / "bin" / "c++", tmp_path / "log"
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            f'#!/bin/sh\n[ "$1" = --version ] && echo "compiler 1" && exit\necho build >> {log}\n'
            f'for out in "$@"; do :; done\n{script}\n'
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("CXX", str(path))
        return log

    return install


def build(rank, world, folder, cxx):
    os.environ["CXX"] = cxx
    try:
        return str(native.build("collectives", folder)), Path(native.build("collectives", folder)).read_text()
    finally:
        del os.environ["CXX"]


def test_concurrent_processes_build_a_library_once(team, compiler, tmp_path):
    log = compiler('sleep 0.5; echo whole > "$out"')
    built = team(3, build, tmp_path / "store", os.environ["CXX"])
    assert len(set(built)) == 1 and built[0][1] == "whole\n"
    assert log.read_text() == "build\n"
    assert Path(built[0][0]).parents[1] == tmp_path / "store" / "native"


def test_leftovers_of_a_killed_build_are_neither_used_nor_kept(compiler, tmp_path):
    compiler('echo whole > "$out"')
    first = native.build("collectives", tmp_path)
    first.rename(first.parent / f"{native.ASIDE}half")
    assert native.build("collectives", tmp_path) == first and first.read_text() == "whole\n"
    assert {path.name for path in first.parent.iterdir()} <= {first.name, ".lock"}


def test_another_compiler_or_source_is_another_library(compiler, tmp_path, monkeypatch):
    log = compiler('echo whole > "$out"')
    first = native.build("collectives", tmp_path)
    source = tmp_path / "source"
    source.mkdir()
    (source / "collectives.cpp").write_text((native.SOURCE / "collectives.cpp").read_text() + "\n")
    with monkeypatch.context() as patch:
        patch.setattr(native, "SOURCE", source)
        second = native.build("collectives", tmp_path)
    script = Path(os.environ["CXX"])
    script.write_text(script.read_text().replace("compiler 1", "compiler 2"))
    third = native.build("collectives", tmp_path)
    assert len({first, second, third}) == 3 and log.read_text() == 3 * "build\n"


def test_a_built_library_needs_no_compiler(compiler, tmp_path, monkeypatch):
    log = compiler('echo whole > "$out"')
    first = native.build("collectives", tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert native.build("collectives", tmp_path) == first == native.built("collectives", tmp_path)
    assert native.built("kernels", tmp_path) is None and log.read_text() == "build\n"


def test_with_a_read_only_folder_a_process_builds_for_itself(compiler, tmp_path):
    compiler('echo whole > "$out"')
    (tmp_path / "file").write_text("no folder")
    built = native.build("collectives", tmp_path / "file" / "store")
    assert built.read_text() == "whole\n" and not built.is_relative_to(tmp_path / "file")


def test_a_compiler_that_fails_is_quoted_in_one_line(compiler, tmp_path):
    compiler('echo note: here >&2; echo "a.cpp:1: error: boom" >&2; exit 3')
    with pytest.raises(native.BuildError) as error:
        native.build("collectives", tmp_path)
    assert str(error.value) == (
        f"collectives.cpp does not build with {os.environ['CXX']} (exit code 3): "
        "a.cpp:1: error: boom. Install g++ 11 or newer, or name a compiler with CXX=."
    )
    assert not list(tmp_path.rglob("*.so")) and not list(tmp_path.rglob(f"{native.ASIDE}*"))


@pytest.mark.parametrize(
    "cxx, rule",
    [
        ("false", r"does not build with .*/false \(exit code 1\): no message. Install g\+\+"),
        ("no-such-compiler", r"no C\+\+ compiler: 'no-such-compiler' is no program that is found. Install g\+\+"),
        # Inductor would not find a compiler with arguments.
        ("g++ -O1", r"no C\+\+ compiler: 'g\+\+ -O1' is no program that is found. .* without arguments"),
    ],
)
def test_a_missing_or_broken_compiler_is_reported(tmp_path, monkeypatch, cxx, rule):
    monkeypatch.setenv("CXX", cxx)
    with pytest.raises(native.BuildError, match=rule):
        native.build("collectives", tmp_path)


def test_loading_again_neither_builds_nor_waits(libraries, monkeypatch):
    native.load("collectives", libraries)
    monkeypatch.setenv("CXX", "no-such-compiler")
    native.load("collectives", Path("/nowhere"))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names CPUs of x86")
@pytest.mark.parametrize("cpu", ["icelake-server", "alderlake"])
@pytest.mark.parametrize("name", ["kernels", "quantised"])
def test_kernels_are_valid_for_other_cpus(name, cpu):
    # The first has AVX-512 with products of bytes, the second such products in AVX2's vectors.
    command = [word.replace("-march=native", f"-march={cpu}") for word in native._command(name, native.find_compiler())]
    native.run_compiler([*command, "-fsyntax-only"], f"{name}.cpp does")

"""C++: CPU kernels, collectives of ranks on one CPU host, and what releases the GIL: running packages, writing streams.

A library is built once, by the machine's own compiler, when it is first needed, into the folder of the graph store:

    <folder>/native/<key>/<compiler>.so

If there is no compiler, a library that another compiler built is used.

Importing this module imports no torch: the process that supervises the ranks only calls unlink.
"""

import atexit
import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from mllama_graph.native import operators
from mllama_graph.native.operators import OPERATORS

SOURCE = Path(__file__).parent
# Additional compiler flags of each library. `runner` uses torch's unstable ABI; `streams` does not use torch.
LIBRARIES = {
    "kernels": ("-O3", "-DTORCH_TARGET_VERSION=0x020d000000000000"),
    "quantised": ("-O3", "-DTORCH_TARGET_VERSION=0x020d000000000000"),
    "collectives": ("-O3", "-DTORCH_TARGET_VERSION=0x020d000000000000"),
    "runner": ("-O1",),
    "streams": ("-O1",),
}
ASIDE = ".aside-"

_loaded: set[str] = set()
_declared: set[str] = set()


class BuildError(RuntimeError):
    """A library could not be built; the message is one line with the reason and the remedy."""


def load(name: str, folder: Path) -> None:
    """Make the operators of a library available as torch.ops.mllama_graph.*, with what tracing needs of them.

    `name` is one of LIBRARIES; `folder` is the graph store's. A second call does nothing. If the folder can't be
    written, the library lasts as long as the process. Raises BuildError.
    """
    import torch

    if name in _loaded:
        return
    torch.ops.load_library(str(build(name, folder)))
    declare_operators(name)
    _loaded.add(name)


def declare_operators(name: str) -> None:
    """Register the schemas and fake implementations of a library's operators, which is all that tracing needs.

    Those of `kernels` can be registered before the library is built, so that graphs are traced meanwhile.
    """
    import torch

    if name in _declared:
        return
    for operator, (schema, traced) in OPERATORS[name].items():
        if schema:
            torch.library.define(f"mllama_graph::{operator}", schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.register_fake(f"mllama_graph::{operator}", traced)
    _declared.add(name)


def attach(name: str, rank: int, world: int, timeout: float, slot_bytes: int = 1 << 20) -> None:
    """Join the ranks that share the memory segment `name`; every rank calls it once, and rank 0 creates the segment.

    `timeout` is the longest wait for a peer in seconds, here and in every collective. The segment takes
    2 x world x slot_bytes of /dev/shm; its name is removed as soon as all ranks have joined. Raises RuntimeError if
    rank 0 did not create it in time, /dev/shm is full, or it was created for another world or slot size.
    """
    _operators("collectives").attach(name, rank, world, timeout, slot_bytes)
    declare(world)


def detach() -> None:
    """Leave the group of ranks, if attached to one."""
    _operators("collectives").detach()


def declare(world: int) -> None:
    """Set the number of ranks, to trace collectives without being attached to a group."""
    operators.world = world


def unlink(name: str) -> None:
    """Remove a segment's name, if it still exists: for the process that outlives the ranks. Needs no torch."""
    # The folder in which Linux keeps the segments of shm_open.
    with contextlib.suppress(FileNotFoundError):
        os.unlink(Path("/dev/shm") / name)


def last_error() -> str:
    """The error of the last failed collective of this process, or "": an error raised by a package lacks the text."""
    return _operators("collectives").last_error()


def build(name: str, folder: Path) -> Path:
    """The library's file, built if it does not exist. Concurrent processes build it only once."""
    from filelock import FileLock

    if missing_compiler() and (found := built(name, folder)):
        return found
    compiler = find_compiler()
    version = hashlib.sha256("\0".join((compiler, compiler_version(compiler))).encode()).hexdigest()[:8]
    library = _home(name, folder) / f"{version}.so"
    if library.is_file():
        return library
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(library.parent / ".lock"):
            if not library.is_file():
                # Under the lock, temporary files can only be those of killed builders.
                for left in library.parent.glob(f"{ASIDE}*"):
                    left.unlink()
                _compile(name, compiler, library)
        return library
    except OSError:
        home = Path(tempfile.mkdtemp(prefix="mllama_graph-"))
        atexit.register(shutil.rmtree, home, ignore_errors=True)
        _compile(name, compiler, home / library.name)
        return home / library.name


def built(name: str, folder: Path) -> Path | None:
    """The library's file in the folder, built by whichever compiler, or None."""
    return next(_home(name, folder).glob("*.so"), None)


def _compile(name: str, compiler: str, library: Path) -> None:
    """Build to a temporary file and rename it, so that a kill leaves no partial library."""
    descriptor, aside = tempfile.mkstemp(prefix=ASIDE, dir=library.parent)
    os.close(descriptor)
    try:
        run_compiler([*_command(name, compiler), "-o", aside], f"{name}.cpp does")
        os.replace(aside, library)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(aside)


def find_compiler() -> str:
    """The C++ compiler: CXX, without arguments as Inductor needs it, else g++. Raises BuildError if there is none."""
    command = os.environ.get("CXX") or "g++"
    found = shutil.which(command)
    if found is None:
        raise BuildError(
            f"no C++ compiler: {command!r} is no program that is found. Install g++ 11 or newer, or name a compiler, "
            "without arguments, with CXX=."
        )
    return found


def missing_compiler() -> str | None:
    """The reason why no library or graph can be built here; None if they can."""
    try:
        find_compiler()
        return None
    except BuildError as error:
        return str(error)


def compiler_version(compiler: str) -> str:
    """The output of --version of a compiler: part of the key of all that it builds."""
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, errors="replace").stdout


def run_compiler(command: list[str], what: str) -> None:
    """Run a compiler. Raises BuildError, which begins with `what` ("x.cpp does") and gives the first error."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines()] or ["no message"]
        reason = next((line for line in lines if "error" in line), lines[0])
        raise BuildError(
            f"{what} not build with {command[0]} (exit code {done.returncode}): {reason}. "
            "Install g++ 11 or newer, or name a compiler with CXX=."
        )


def _flags(name: str) -> list[str]:
    # The compiler must not contract products and sums into FMAs, so that every build rounds alike.
    machine = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    return [*LIBRARIES[name], machine, "-ffp-contract=off", "-std=c++20", "-fPIC", "-shared", "-w"]


def _command(name: str, compiler: str) -> list[str]:
    import torch

    home = Path(torch.__file__).parent
    return [
        compiler,
        *_flags(name),
        f"-I{home / 'include'}",
        f"-I{home / 'include/torch/csrc/api/include'}",
        str(SOURCE / f"{name}.cpp"),
        f"-L{home / 'lib'}",
        "-ltorch_cpu",
        "-lc10",
        "-lrt",
    ]


def _home(name: str, folder: Path) -> Path:
    """The folder of a library. Its key covers all but the compiler: sources, torch, flags and the CPU."""
    import torch

    from mllama_graph.core.machine import processor_name

    sources = [path.read_text() for path in (SOURCE / f"{name}.cpp", *sorted(SOURCE.glob("*.h")))]
    parts = (*sources, torch.__version__, *_flags(name), processor_name(torch.backends.cpu.get_cpu_capability()))
    return folder / "native" / hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _operators(name: str) -> Any:
    import torch

    if name not in _loaded:
        raise RuntimeError(f"load({name!r}, folder) first")
    return torch.ops.mllama_graph

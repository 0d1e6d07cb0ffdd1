"""Libraries that stand in for CANN's, so that the real torch_npu and torchair run on a machine without an NPU.

torch_npu's libraries list the symbols that they need from CANN. Each becomes a function that does nothing and returns
0, except the few in cann_stubs.cpp. The machine's compiler builds them once, when they are first needed, beside the
graph store:

    <folder>/native/<key>/{libcann_stubs.so, libascendcl.so -> libcann_stubs.so, ...}

The loader reads LD_LIBRARY_PATH once, when a process starts, and torch loads torch_npu by itself. A process that
simulates an NPU is therefore started with `environment`. This module imports no torch.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from mllama_graph.native import ASIDE, BuildError, compiler_version, find_compiler, run_compiler

SOURCE = Path(__file__).parent / "cann_stubs.cpp"
LIBRARY = "libcann_stubs.so"
# The subject of the message when the compiler fails.
WHAT = "the CANN stubs do"
# Variable that `environment` sets: the folder of the libraries.
ACTIVE = "MLLAMA_CANN_STUBS"
# The plugin for ATB needs a library and headers of its own; torch_npu loads it only where ATB is installed.
LEFT_OUT = "libop_plugin_atb.so"
# Symbols of Python, the C++ runtime and the linker: resolved at load time, or weak.
FOREIGN = re.compile(r"_?Py|_ITM_|__gmon|__cxa|__tls")
# Symbols that torch_npu looks up by name at run time (torch_npu/csrc/core/npu/interface, `dlsym`).
LOOKED_UP = re.compile(rb"\0((?:acl(?:rt|mdl|mdlRI|prof|sys|op)?|Hccl)[A-Z]\w{3,})(?=\0)")
FLAGS = ("-O1", "-w", "-fPIC", "-shared")


def installed() -> bool:
    """Whether torch_npu is installed, without importing it."""
    return importlib.util.find_spec("torch_npu") is not None


def active() -> bool:
    """Whether this process was started with the stubs."""
    return ACTIVE in os.environ


def environment(folder: Path) -> dict[str, str]:
    """os.environ for a process that simulates an NPU. The stubs are built under `folder`. Raises BuildError.

    Eager operations on NPU tensors raise in such a process, since there are no kernels: create data on the CPU and
    move it.
    """
    libraries = build(folder)
    paths = [str(libraries), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return os.environ | {
        ACTIVE: str(libraries),
        "LD_LIBRARY_PATH": os.pathsep.join(paths),
        # Operations run synchronously, so that a failing one raises in its own call (torch_npu's documentation).
        "ASCEND_LAUNCH_BLOCKING": "1",
        # torch_npu's allocator warns about padding that this CANN and chip would need.
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }


def build(folder: Path) -> Path:
    """The folder of the stub libraries, which are built unless they exist. A file lock lets only one process build.

    Raises BuildError where torch_npu, a C++ compiler or binutils is missing, or the stubs don't compile.
    """
    from filelock import FileLock

    if not installed():
        raise BuildError("torch_npu is not installed. Install it with: pip install 'mllama_graph[npu]'")
    for tool in ("nm", "readelf"):
        if shutil.which(tool) is None:
            raise BuildError(f"{tool} is not found; the CANN stubs are built with it. Install binutils.")
    compiler = find_compiler()
    home = folder / "native" / _key(compiler)
    if (home / LIBRARY).is_file():
        return home
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home / ".lock"):
        if not (home / LIBRARY).is_file():
            _build(home, compiler)
    return home


def _key(compiler: str) -> str:
    """A hash of everything that the libraries depend on."""
    parts = (
        SOURCE.read_text(),
        Path(__file__).read_text(),
        version("torch_npu"),
        version("torch"),
        sys.version,
        compiler,
        compiler_version(compiler),
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _build(home: Path, compiler: str) -> None:
    """Builds the library and the links to it. The rename into place comes last, so that an existing one is complete."""
    torch_npu = _folder_of("torch_npu")
    users = [path for path in torch_npu.rglob("*.so*") if path.name != LEFT_OUT]
    present = _present(_folder_of("torch") / "lib", users, compiler)
    with tempfile.TemporaryDirectory(prefix=ASIDE, dir=home) as aside:
        special, noops, library = (Path(aside) / name for name in ("special.o", "noops.c", LIBRARY))
        run_compiler([compiler, *FLAGS[:-1], "-c", str(SOURCE), "-o", str(special)], WHAT)
        missing = missing_symbols(users, present) - symbols([special], "--defined-only")
        noops.write_text("".join(f"long {name}(void) {{ return 0; }}\n" for name in sorted(missing)))
        inputs = [str(special), "-x", "c", str(noops)]
        run_compiler([compiler, *FLAGS, *inputs, f"-Wl,-soname,{LIBRARY}", "-o", str(library)], WHAT)
        for name in missing_libraries(users, present):
            (home / name).unlink(missing_ok=True)
            (home / name).symlink_to(LIBRARY)
        os.replace(library, home / LIBRARY)


def _folder_of(package: str) -> Path:
    """The folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    assert spec, f"{package} is installed"
    assert spec.origin, f"{package} has an __init__.py"
    return Path(spec.origin).parent


def _present(torch_lib: Path, users: list[Path], compiler: str) -> list[Path]:
    """The libraries that exist without CANN: torch's, torch_npu's own, the system's."""
    found = [*torch_lib.glob("*.so*"), *users]
    for name in sorted(needed_libraries(users) - {path.name for path in found}):
        path = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        if os.path.isabs(path):
            found.append(Path(path))
    return found


def needed_libraries(users: list[Path]) -> set[str]:
    """Names of the libraries that the loader must find for `users`."""
    output = subprocess.run(["readelf", "-dW", *map(str, users)], capture_output=True, text=True).stdout
    return set(re.findall(r"\(NEEDED\)\s+Shared library: \[(.+?)\]", output))


def missing_libraries(users: list[Path], present: list[Path]) -> set[str]:
    """Names of the libraries that only CANN has."""
    return needed_libraries(users) - {path.name for path in present}


def missing_symbols(users: list[Path], present: list[Path]) -> set[str]:
    """Symbols that `users` bind at load time or look up later, and that no library of `present` defines."""
    undefined = symbols(users, "--undefined-only", dynamic=True)
    bound = {name for name in undefined if "@" not in name and not FOREIGN.match(name)}
    defined = {name.split("@")[0] for name in symbols(present, "--defined-only", dynamic=True)}
    looked_up: set[bytes] = set()
    for path in users:
        looked_up.update(LOOKED_UP.findall(path.read_bytes()))
    return (bound | {name.decode() for name in looked_up}) - defined


def symbols(files: list[Path], kind: str, dynamic: bool = False) -> set[str]:
    """Symbols of object files. `kind` is nm's --defined-only or --undefined-only."""
    command = ["nm", "-P", kind, *(["-D"] if dynamic else []), *map(str, files)]
    output = subprocess.run(command, capture_output=True, text=True).stdout
    return {line.split()[0] for line in output.splitlines() if line and not line.endswith(":")}

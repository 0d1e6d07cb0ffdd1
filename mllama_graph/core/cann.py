"""CANN's and the driver's versions, read from their files, and which versions the graphs for an NPU need. No torch."""

import os
import platform
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from mllama_graph.core.errors import UserError

# Set by CANN's set_env.sh; the first one is what CANN itself reads (hicann/runtime, src/acl/aclrt_impl/acl.cpp).
VARIABLES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")
# The driver's and the firmware's folders lie in the folder that this file names.
INSTALLED = Path("/etc/ascend_install.info")
DRIVER_FOLDER = "/usr/local/Ascend"
# aclnnScatterPaKvCache, which writes pages, exists on a 910B from this version (ops-transformer, 8.5.0).
LEAST = (8, 5)
# From here every head width takes the newer decode kernel, and flash decoding exists (ops-transformer, FIA's tiling).
ADVISED = (9, 0)


def installed(environment: Mapping[str, str] = os.environ) -> str | None:
    """The version of the CANN that the environment selects, such as 9.1.0 or 8.3.RC1; None where no file gives one."""
    for variable in VARIABLES:
        if environment.get(variable):
            for path in _files(Path(environment[variable])):
                if version := version_in(path):
                    return version
    return None


def _files(home: Path) -> Iterator[Path]:
    """The files that may state the version of a toolkit: the runtime's, which CANN reads, then the installer's."""
    yield home / "share" / "info" / "runtime" / "version.info"
    yield home / f"{platform.machine()}-linux" / "ascend_toolkit_install.info"
    yield from sorted(home.glob("*-linux/ascend_toolkit_install.info"))
    yield home / "ascend_toolkit_install.info"


def version_in(path: Path) -> str | None:
    """The value of `version=` or `Version=` in a file of CANN or the driver; None without the file or the line."""
    try:
        found = re.search(r"^version\s*=\s*(\S+)", path.read_text(encoding="utf8", errors="replace"), re.M | re.I)
    except OSError:
        return None
    # Older files hold an internal version, a colon and then the version of the release.
    return found[1].strip("[]\"'").rpartition(":")[2] if found else None


def components(environment: Mapping[str, str] = os.environ) -> dict[str, str | None]:
    """Versions of CANN, of each of its packages that states one, of the driver and of the firmware."""
    found: dict[str, str | None] = {"cann": installed(environment)}
    for variable in VARIABLES:
        if environment.get(variable):
            for path in sorted(Path(environment[variable]).glob("share/info/*/version.info")):
                found.setdefault(f"cann {path.parent.name}", version_in(path))
    for name in ("driver", "firmware"):
        found[name] = version_in(_driver_folder(name) / name / "version.info")
    return found


def _driver_folder(name: str) -> Path:
    """The folder that holds the folder of the driver or the firmware."""
    try:
        text = INSTALLED.read_text(encoding="utf8", errors="replace")
    except OSError:
        text = ""
    found = re.search(rf"^{name}_Install_Path_Param=(\S+)", text, re.M | re.I)
    return Path(found[1] if found else DRIVER_FOLDER)


def release(version: str) -> tuple[int, int] | None:
    """The first two numbers of a version, by which releases are compared: a pre-release counts as its release."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else None


def require(version: str | None) -> None:
    """Raises UserError for a CANN on which the graphs can't run. A version that is not known passes."""
    known = release(version) if version else None
    if known and known < LEAST:
        raise UserError(
            f"CANN {version}: device=npu needs CANN 8.5 or newer, since the operation that writes K/V pages "
            f"(npu_scatter_pa_kv_cache) does not exist before it on a 910B. Install CANN 9.1 and source its set_env.sh."
        )


def notes(version: str | None) -> tuple[str, ...]:
    """What to say about a CANN that passes `require`, before weights are loaded."""
    known = release(version) if version else None
    if known is None:
        where = " and ".join(VARIABLES)
        return (f"CANN's version is not known: {where} name no folder with its version file. 8.5 or newer is needed.",)
    if known < ADVISED:
        return (
            f"CANN {version} is below 9.0: decode attention takes the old kernel, except for heads 64 or 128 wide, and "
            "never splits short sequences over cores. CANN 9.0 or newer is advised.",
        )
    return ()

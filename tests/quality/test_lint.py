"""ruff, cython-lint and mypy find nothing."""

from __future__ import annotations

import os
import subprocess
import sysconfig

import pytest

from quality.tree import ROOT

TOOLS = {
    "ruff": ["ruff", "check", "--no-cache", "."],
    "cython-lint": ["cython-lint", "vq_core"],
    "mypy": ["mypy", "--cache-dir", os.devnull],
}


@pytest.mark.parametrize("tool", TOOLS)
def test_lint(tool: str) -> None:
    # cython-lint starts pycodestyle by its name.
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    run = subprocess.run(TOOLS[tool], cwd=ROOT, env=os.environ | {"PATH": path}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr

"""The documentation is built without a warning, with a page for each document and what the docstrings say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from quality.tree import ROOT, below


def test_the_documentation_is_built(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", tmp_path / "trees", "docs", tmp_path]
    environment = os.environ | {"NO_COLOR": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    pages = {path.stem for path in tmp_path.glob("*.html")}
    assert {path.stem for path in below("docs", ".md") if path.parent == ROOT / "docs"} <= pages
    reference = (tmp_path / "reference.html").read_text()
    for name in ("vq.device.Device.handle", "vq.pump.Pump.run", "vq.frontend.Frontend.driver", "vq.errors.GuestError"):
        assert f'id="{name}"' in reference
    # From compiled modules too.
    assert 'id="vq_core.driver.DriverQueue.add"' in reference

"""The checks of IOTLB messages find a back-end out that keeps what is void, asks for nothing, or looks too early."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import vq.check
from pump_rig import pumping
from vq.check import Outcome
from vq.translation import Translation


@pytest.fixture
def failed(tmp_path: Path) -> Iterator[Callable[[], dict[str, str]]]:
    """Run the checks on an echo; gives why those that fail do."""
    path = f"{tmp_path}/s"

    def run() -> dict[str, str]:
        results = list(vq.check.run(path, device="net", only=["iotlb.*"], timeout=1))
        assert len(results) > 5
        return {result.name: result.reason for result in results if result.outcome is Outcome.FAIL}

    with pumping(f"vhost:{path}"):
        yield run


def test_what_is_right_passes(failed: Callable[[], dict[str, str]]) -> None:
    assert failed() == {}


def test_an_invalidation_that_is_not_heeded(
    failed: Callable[[], dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Translation, "invalidate", lambda *_: None)
    assert failed() == {
        "iotlb.nothing-is-used-after-invalidate": "a buffer was used through translations that are void"
    }


def test_nothing_is_asked_for(failed: Callable[[], dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Translation, "take", lambda _: [])
    found = failed()
    assert set(found) >= {"iotlb.everything-is-asked-for", "iotlb.a-ring-waits", "iotlb.a-buffer-waits"}


def test_too_much_is_taken_away(failed: Callable[[], dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Updates that are forgotten at once: no work is ever done."""
    update = Translation.update

    def forgetful(self: Translation, effect: object) -> None:
        update(self, effect)  # type: ignore[arg-type]
        self.invalidate(effect.iova, effect.iova + effect.size - 1)  # type: ignore[attr-defined]

    monkeypatch.setattr(Translation, "update", forgetful)
    assert "iotlb.everything-is-asked-for" in failed()

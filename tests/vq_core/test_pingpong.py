"""The ball between two processors."""

from __future__ import annotations

import os
import threading

import pytest

from vq_core.pingpong import PingPong


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two threads that wait busily need a processor each")
def test_each_sample_is_the_time_of_a_round_and_the_ball_can_be_used_again() -> None:
    game = PingPong(rounds=500, samples=7)
    for _ in range(2):
        catcher = threading.Thread(target=game.catch)
        catcher.start()
        found = game.throw()
        catcher.join(60)
        assert not catcher.is_alive()
        assert len(found) == 7
        # No processor passes a line on within a nanosecond, so the ball really went to and fro.
        assert min(found) > 1


@pytest.mark.parametrize(("rounds", "samples"), [(0, 1), (1, 0), (1_000_001, 1), (1, 1001)])
def test_numbers_out_of_range_are_refused(rounds: int, samples: int) -> None:
    with pytest.raises(ValueError, match="are possible"):
        PingPong(rounds, samples)

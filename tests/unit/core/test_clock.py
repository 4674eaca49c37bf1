import pytest

from serve_app.core.clock import ManualClock, MonotonicClock


def test_the_manual_clock_moves_only_when_told_to():
    clock = ManualClock(5.0)
    assert clock.now() == 5.0
    clock.advance(2.5)
    assert clock.now() == 7.5
    with pytest.raises(ValueError, match="never goes back"):
        clock.advance(-1)


def test_the_monotonic_clock_never_goes_back():
    clock = MonotonicClock()
    assert clock.now() <= clock.now()

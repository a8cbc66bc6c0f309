"""The check of the marker `slow`: by the CPU seconds of a test and of the shared fixtures that it requests."""

import pytest

from tests.helpers.cpu_time import CpuTimes


@pytest.mark.parametrize(
    ("seconds", "of_fixture", "slow", "said"),
    [
        (30.0, 0.0, False, "a takes 30.0 CPU s: make it cheaper, or mark it slow (over 20 s)"),
        (1.0, 30.0, False, "a takes 1.0 CPU s and its fixture 30.0: make it cheaper, or mark it slow (over 20 s)"),
        (1.0, 0.0, True, "a takes 1.0 CPU s: it is not slow (over 20 s)"),
        (1.0, 30.0, True, None),
        (30.0, 0.0, True, None),
        (19.0, 19.0, False, None),
        (0.0, 0.0, True, None),  # skipped
    ],
)
def test_a_marker_that_does_not_agree_with_the_cpu_seconds_is_told(pytestconfig, seconds, of_fixture, slow, said):
    times = CpuTimes(pytestconfig)
    times.tests["a"] = seconds, of_fixture, slow
    assert times.wrongly_marked() == ([said] if said else [])


@pytest.fixture(scope="module")
def shared():
    return sum(number * number for number in range(2_000_000))  # some tenths of a CPU second


def test_a_shared_fixture_is_measured_once_and_by_itself(pytestconfig, shared):
    times = pytestconfig.pluginmanager.get_plugin("cpu-times")
    assert times.fixtures["shared"] > 0.02
    assert [name for name, _ in times.shared if name.endswith("::shared (fixture)")] == []  # reported with the setup

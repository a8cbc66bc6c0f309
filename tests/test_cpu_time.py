"""The check of the marker `slow`: by the CPU seconds of a test and of the shared fixtures that it requests."""

from types import SimpleNamespace

import pytest

from tests.helpers.cpu_time import CpuTimes, _place_of_marker


@pytest.fixture
def times():
    """Nothing measured yet; the limit is 1 s."""
    return CpuTimes(SimpleNamespace(getini={"slow_cpu_seconds": "1"}.get))


@pytest.mark.parametrize(
    ("seconds", "of_fixture", "place", "said"),
    [
        (3.1, 0.0, "", "f.py::a takes 3.1 CPU s: make it cheaper, or mark it slow (over 1 s)"),
        (0.1, 5.0, "", "f.py::a takes 0.1 CPU s and its fixture 5.0: make it cheaper, or mark it slow (over 1 s)"),
        (0.3, 0.0, "test", "f.py::a takes 0.3 CPU s: it is not slow (over 1 s)"),
        (0.9, 0.0, "file", "f.py takes 0.9 CPU s: it is not slow (over 1 s)"),
        (0.1, 0.3, "test", None),
        (0.1, 0.9, "file", None),
        (9.0, 0.0, "test", None),
        (2.9, 2.9, "", None),
        (0.0, 0.0, "test", None),  # skipped
        (0.0, 0.0, "file", None),
    ],
)
def test_a_marker_that_does_not_agree_with_the_cpu_seconds_is_told(times, seconds, of_fixture, place, said):
    times.tests["f.py::a"] = seconds, of_fixture, place
    assert times.wrongly_marked() == ([said] if said else [])


def test_the_dearest_case_of_a_function_and_the_sum_of_a_file_count(times):
    times.tests |= {"f.py::a[1]": (0.1, 0.0, "test"), "f.py::a[2]": (1.1, 0.0, "test")}
    times.tests |= {f"g.py::{name}": (0.3, 0.0, "file") for name in "abcd"}
    assert times.wrongly_marked() == []


def test_a_test_has_the_marker_itself_or_by_its_file():
    slow, other = pytest.mark.slow.mark, pytest.mark.usefixtures.mark
    for own, all_markers, place in (([slow], [slow], "test"), ([other], [other, slow], "file"), ([other], [other], "")):
        names = {marker.name: marker for marker in all_markers}
        assert _place_of_marker(SimpleNamespace(own_markers=own, get_closest_marker=names.get)) == place


@pytest.fixture(scope="module")
def shared():
    return sum(number * number for number in range(2_000_000))  # some tenths of a CPU second


def test_a_shared_fixture_is_measured_once_and_by_itself(pytestconfig, shared):
    times = pytestconfig.pluginmanager.get_plugin("cpu-times")
    assert times.fixtures["shared"] > 0.02
    assert [name for name, _ in times.shared if name.endswith("::shared (fixture)")] == []  # reported with the setup

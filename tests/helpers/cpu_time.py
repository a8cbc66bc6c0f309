"""A pytest plugin that measures CPU seconds per test, children included, and checks the `slow` marker with them.

Wall time depends on what else runs on the machine, CPU time does so far less. `--durations-cpu=N` prints the N largest
entries and the total of each file. A fixture that tests share is an entry of its own: its cost is not the cost of the
test that happens to run first. `--check-slow` fails the session if the marker `slow` does not agree with the seconds
beyond doubt, where `slow_cpu_seconds` (pytest configuration) is the limit:

* a test without the marker, or a shared fixture that it requests, takes more than three times the limit;
* of the cases of a function with the marker, none takes a third of it, its shared fixture included;
* the tests of a file that has the marker as a whole take less than the limit together.

Between a third and three times the limit both are right, since CPU seconds are noisy: a busy second thread of the same
core makes a test up to half as dear again, the first test that needs a program compiles it for all others, and the
processor is another one elsewhere. So a marker is wrong only if it would be wrong on any machine.

Only children that were waited for are counted (`os.times`). Compiled programs are cached on disk, so a first session
costs more than later ones: the check is made with an empty cache, as in CI, and two sessions are comparable only when
both began with an empty or both with a filled one.
"""

import os
from collections import defaultdict
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

SHARED = "shared_fixtures"
SECONDS = "cpu_seconds"
REQUESTED = "requested_fixture_seconds"
MARKED = "slow_marker"
TOLERANCE = 3.0
"""Factor by which a test has to miss the limit before its marker is called wrong."""


def cpu_seconds() -> float:
    """CPU seconds of this process, all its threads, and its children that were waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _place_of_marker(item: pytest.Item) -> str:
    """Returns where a test's marker `slow` is: "test" if the function or case has it, "file", or "" without one."""
    if any(marker.name == "slow" for marker in item.own_markers):
        return "test"
    return "file" if item.get_closest_marker("slow") else ""


class CpuTimes:
    """Measures in every process that runs tests; the process that prints receives the reports of all of them."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.shared: list[tuple[str, float]] = []  # fixtures set up since the last report
        self.fixtures: dict[str, float] = {}  # seconds of the shared fixtures that exist now, by name
        self.entries: list[tuple[float, str]] = []
        # Seconds, those of its dearest fixture, and where the marker is: "test", "file", or "" without one.
        self.tests: dict[str, tuple[float, float, str]] = {}
        self.elapsed: dict[tuple[str, str], float] = {}

    @contextmanager
    def _measure(self, item: pytest.Item, phase: str) -> Iterator[None]:
        start, shared = cpu_seconds(), len(self.shared)
        try:
            yield
        finally:
            of_fixtures = sum(seconds for _, seconds in self.shared[shared:])
            self.elapsed[item.nodeid, phase] = cpu_seconds() - start - of_fixtures

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Measures the fixtures of the test's own."""
        with self._measure(item, "setup"):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Measures the test itself."""
        with self._measure(item, "call"):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
    ) -> Generator[None, Any, Any]:
        """Measures a fixture of a module or session by itself, without the shared fixtures that it sets up inside."""
        if fixturedef.scope == "function":
            self.fixtures.pop(fixturedef.argname, None)  # another one of this name was that of another module
            return (yield)
        start, inside = cpu_seconds(), len(self.shared)
        try:
            return (yield)
        finally:
            seconds = cpu_seconds() - start - sum(seconds for _, seconds in self.shared[inside:])
            place = fixturedef.baseid or "tests"
            self.shared.append((f"{place}::{fixturedef.argname} (fixture)", seconds))
            self.fixtures[fixturedef.argname] = seconds

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
        """Attaches the seconds to the report, with which xdist sends them to the process that prints."""
        report = yield
        setattr(report, SECONDS, self.elapsed.pop((item.nodeid, call.when), 0.0))
        setattr(report, SHARED, self.shared[:])
        names = getattr(item, "fixturenames", ())
        setattr(report, REQUESTED, max((self.fixtures.get(name, 0.0) for name in names), default=0.0))
        setattr(report, MARKED, _place_of_marker(item))
        self.shared.clear()
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Collects the seconds."""
        self.entries.extend((seconds, name) for name, seconds in getattr(report, SHARED, ()))
        before, fixture, _ = self.tests.get(report.nodeid, (0.0, 0.0, ""))
        fixture = max(fixture, getattr(report, REQUESTED, 0.0))
        self.tests[report.nodeid] = (before + getattr(report, SECONDS, 0.0), fixture, getattr(report, MARKED, ""))

    def wrongly_marked(self) -> list[str]:
        """Returns a line for each test, function or file whose marker does not agree with its CPU seconds."""
        limit = float(self.config.getini("slow_cpu_seconds"))
        found = []
        functions: dict[str, float] = defaultdict(float)  # with a marker of their own -> seconds of the dearest case
        files: dict[str, float] = defaultdict(float)  # marked as a whole -> seconds
        for name, (seconds, fixture, place) in sorted(self.tests.items()):
            if not place and max(seconds, fixture) > TOLERANCE * limit:
                taken = f"{name} takes {seconds:.1f} CPU s"
                taken += f" and its fixture {fixture:.1f}" if fixture >= 0.1 else ""
                found.append(f"{taken}: make it cheaper, or mark it slow (over {limit:g} s)")
            if place == "test" and seconds > 0:  # 0: skipped
                function = name.partition("[")[0]
                functions[function] = max(functions[function], seconds + fixture)
            if place == "file" and seconds > 0:
                files[name.partition("::")[0]] += seconds + fixture
        least = {**{name: limit / TOLERANCE for name in functions}, **dict.fromkeys(files, limit)}
        for name, seconds in {**functions, **files}.items():
            if seconds < least[name]:
                found.append(f"{name} takes {seconds:.1f} CPU s: it is not slow (over {limit:g} s)")
        return found

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Prints the largest entries and files, and the tests whose marker is wrong."""
        number = self.config.getoption("durations_cpu")
        if number is not None:
            entries = sorted(
                self.entries + [(seconds, name) for name, (seconds, *_) in self.tests.items()], reverse=True
            )
            files: dict[str, float] = defaultdict(float)
            for seconds, name in entries:
                files[name.partition("::")[0]] += seconds
            total = sum(files.values())
            terminalreporter.section(f"CPU seconds: {total:.0f} in {len(self.tests)} tests")
            for seconds, name in entries[: number or None]:
                terminalreporter.write_line(f"{seconds:8.1f}  {name}")
            terminalreporter.write_line("by file:")
            for name, seconds in sorted(files.items(), key=lambda file: -file[1])[: number or None]:
                terminalreporter.write_line(f"{seconds:8.1f}  {name}")
        if self.config.getoption("check_slow") and (lines := self.wrongly_marked()):
            terminalreporter.section("the marker slow")
            for line in lines:
                terminalreporter.write_line(line)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Fails a session without other failures if a marker is wrong."""
        is_worker = hasattr(self.config, "workerinput")
        if self.config.getoption("check_slow") and not is_worker and self.wrongly_marked() and not session.exitstatus:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options."""
    group = parser.getgroup("CPU time")
    group.addoption(
        "--durations-cpu", type=int, metavar="N", help="print the N tests and files with the most CPU seconds (0: all)"
    )
    group.addoption("--check-slow", action="store_true", help="fail if the marker slow does not agree with CPU seconds")
    parser.addini("slow_cpu_seconds", "CPU seconds above which a test must be marked slow", default="20")


def pytest_configure(config: pytest.Config) -> None:
    """Registers the measurement."""
    config.pluginmanager.register(CpuTimes(config), "cpu-times")

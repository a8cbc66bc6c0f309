"""Google's package computes from what a run reports the goodput that the run has."""

import dataclasses
import datetime
import sys

import pytest

from clvr_jax.errors import ClvrError
from clvr_jax.training.monitoring.clock import Goodput
from clvr_jax.training.monitoring.cloud_recorder import CloudReport, cloud_recorder
from clvr_jax.training.trainer import fit
from tests.training import line_recipe


class KeptLog:
    """A log in memory, in place of Cloud Logging."""

    def __init__(self):
        self.entries = []

    def write_cloud_logging_entry(self, entry):
        self.entries.append(entry)

    def read_cloud_logging_entries(self, *_, **__):
        now = datetime.datetime.now(datetime.UTC)
        return list(self.entries), (now, str(len(self.entries)))

    def flush(self):
        pass


@pytest.fixture
def package():
    return pytest.importorskip("ml_goodput_measurement").goodput


def test_the_package_finds_the_goodput_of_a_run(package, tmp_path):
    """Of 100 s the program starts for 10, reads a checkpoint for 5, waits for a batch for 5, and trains for 80."""
    log = KeptLog()
    recorder = package.GoodputRecorder("run", "log", logging_enabled=True, cloud_logger=log)
    began = datetime.datetime.now(datetime.UTC).timestamp() - 100
    clock = Goodput(began)
    report = CloudReport(recorder, clock)
    log.entries[-1]["tpu_init_end_time"] = began + 10  # now, in a real run
    report.end_phase("restore", began + 10, began + 15)
    report.end_phase("input", began + 15, began + 20)
    for step in range(8):
        report.begin_step(step, began + 20 + 10 * step)
    report.end("complete", began + 100)
    calculator = package.GoodputCalculator("run", "log", cloud_logger=log, cache_dir=str(tmp_path))
    goodput, _, last_step = calculator.get_job_goodput()
    assert last_step == 7
    assert goodput == pytest.approx(80, abs=1)


def test_a_run_reports_its_steps_and_its_end(package, tmp_path):
    log = KeptLog()
    recorder = package.GoodputRecorder("run", "log", logging_enabled=True, cloud_logger=log)
    config = dataclasses.replace(line_recipe.CONFIG.train, steps=3)
    with Goodput() as clock:
        clock.listeners.append(CloudReport(recorder, clock))
        fit(line_recipe.task(line_recipe.CONFIG), config, tmp_path)
    assert [entry["step_count"] for entry in log.entries if "step_count" in entry] == [0, 1, 2]
    assert "job_end_time" in log.entries[-1]
    assert sum("training_prep_start_time" in entry for entry in log.entries) == 1


def test_without_a_project_or_the_package_a_run_ends_in_one_line_before_it_begins(tmp_path, monkeypatch):
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "absent.json"))
    config = dataclasses.replace(line_recipe.CONFIG.train, steps=1, goodput_logger="log")
    expected = "needs a package: pip install|cannot be logged to Google Cloud .*absent.json"
    with pytest.raises(ClvrError, match=expected):
        fit(line_recipe.task(line_recipe.CONFIG), config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.setitem(sys.modules, "ml_goodput_measurement", None)
    with pytest.raises(ClvrError, match=r"pip install 'clvr-jax\[goodput\]'"):
        cloud_recorder("run", "log")

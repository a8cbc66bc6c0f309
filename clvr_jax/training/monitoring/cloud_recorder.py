"""Reports a run to `ml-goodput-measurement`, Google's package, which computes goodput from Cloud Logging.

The package has no other place to write to: its recorder needs a Google Cloud project with credentials.
`goodput.jsonl` needs neither, and is written in any case.
"""

import datetime
from collections.abc import Callable
from typing import Protocol

from clvr_jax.display.console import console
from clvr_jax.errors import ClvrError
from clvr_jax.training.monitoring.clock import Goodput

_CUSTOM = ("save", "evaluation", "export")
"""Categories that the package knows by name only."""
_SHORTEST_INPUT_SECONDS = 0.1
"""Shorter waits for a batch are not reported, so that a step is one entry of the log."""


class Recorder(Protocol):
    """The part of the package's `GoodputRecorder` that is used; all times are datetimes in UTC."""

    record_job_start_time: Callable[..., None]
    record_job_end_time: Callable[..., None]
    record_tpu_init_start_time: Callable[..., None]
    record_tpu_init_end_time: Callable[..., None]
    record_training_preparation_start_time: Callable[..., None]
    record_training_preparation_end_time: Callable[..., None]
    record_data_loading_start_time: Callable[..., None]
    record_data_loading_end_time: Callable[..., None]
    record_step_start_time: Callable[..., None]
    record_custom_badput_event_start_time: Callable[..., None]
    record_custom_badput_event_end_time: Callable[..., None]
    flush: Callable[[], None]


def cloud_recorder(job: str, logger: str) -> Recorder:
    """Returns the package's recorder.

    Args:
      job: name of the job, the same after a restart.
      logger: name of the logger of Cloud Logging.
    Raises: ClvrError if the package is not installed, or there is no project or no credentials.
    """
    try:
        from ml_goodput_measurement import goodput
    except ImportError as error:
        raise ClvrError("logging goodput to Google Cloud needs a package: pip install 'clvr-jax[goodput]'") from error
    try:
        recorder: Recorder = goodput.GoodputRecorder(job, logger, logging_enabled=True)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ClvrError(
            f"goodput cannot be logged to Google Cloud ({reason}); set up credentials, or leave the logger out"
        ) from error
    return recorder


class CloudReport:
    """Reports what a clock measures to a recorder.

    Args:
      recorder: of the package.
      clock: of the run, whose program has started.
    """

    def __init__(self, recorder: Recorder, clock: Goodput):
        self._recorder, self._has_input = recorder, False
        recorder.record_job_start_time(_utc(clock.began))
        recorder.record_tpu_init_start_time(_utc(clock.began))
        recorder.record_tpu_init_end_time()

    def begin_step(self, iteration: int, time: float) -> None:
        """Reports that an iteration begins."""
        self._recorder.record_step_start_time(iteration, _utc(time))

    def end_phase(self, name: str, begin: float, end: float) -> None:
        """Reports a phase of the clock, if the package has something like it."""
        recorder = self._recorder
        if name == "restore":
            recorder.record_training_preparation_start_time(_utc(begin))
            recorder.record_training_preparation_end_time(_utc(end))
        elif name == "input" and (end - begin > _SHORTEST_INPUT_SECONDS or not self._has_input):
            self._has_input = True
            recorder.record_data_loading_start_time(_utc(begin))
            recorder.record_data_loading_end_time(_utc(end))
        elif name in _CUSTOM:
            recorder.record_custom_badput_event_start_time(_utc(begin), name)
            recorder.record_custom_badput_event_end_time(_utc(end), name)

    def end(self, reason: str, time: float) -> None:
        """Reports the end of a run that is complete; otherwise the job continues with the next start."""
        if reason == "complete":
            self._recorder.record_job_end_time(_utc(time))
        try:
            self._recorder.flush()
        except Exception as error:  # noqa: BLE001 - of Google's client; the run itself has ended well
            console.print(f"the goodput was not logged to Google Cloud completely ({error})", markup=False)


def _utc(time: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(time, datetime.UTC)

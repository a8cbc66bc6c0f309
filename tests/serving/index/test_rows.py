"""Rows of running loops with damage of many kinds: each is one line, or a loop that the scheduler can run."""

import json
from types import SimpleNamespace

import pytest

from clvr_jax.errors import ClvrError
from clvr_jax.reasoning import Budget
from clvr_jax.reasoning.loop.work import Roles, perform
from clvr_jax.serving.event_log import EventLog
from clvr_jax.serving.index.files import DirectoryFiles
from clvr_jax.serving.index.rows import event_from, run_from
from clvr_jax.serving.index.shared import SharedStore
from clvr_jax.serving.jobs import LoopJob, LoopSpec
from clvr_jax.serving.models import StageKey
from clvr_jax.serving.replicas.specs import capture, given_files, restore, spec_to_json
from clvr_jax.serving.scheduling.limits import Limits
from tests.reasoning.loop.test_resumable import GIVEN, NoisyVerifier
from tests.reasoning.scripted import NoisyController, NoisyDrawer
from tests.robustness.corpus import NO_FILES, json_texts, json_values

SPEC = LoopSpec("p", 18, budget=Budget(max_steps=6), images=GIVEN, request={"user": "u", "parent": {"step": 0}})
ROLES = Roles(NoisyController(), NoisyDrawer(), NoisyVerifier())


class Models:
    name = "scripted"
    flux = SimpleNamespace(settings=SimpleNamespace(num_inference_steps=4))

    def key(self, work, sampling):
        return StageKey(type(work).__name__, sampling)


class Stored(SharedStore):
    """The files of a loop and its events, without a database."""

    def __init__(self, directory, events):
        self._files, self._events = DirectoryFiles(directory), events

    def events_after(self, loop_id, after):
        return [event_from(each, loop_id) for each in self._events], True


def new_job(spec, events=()):
    return LoopJob(spec, Models(), EventLog(None, events), lambda *_: None)


def performed(job, count):
    """Performs works of a job; returns their number."""
    for number in range(count):
        tasks = job.tasks(0.0)
        assert len({task.key for task in tasks}) <= 1
        if not tasks:
            return number
        perform([(job, task.work) for task in tasks], ROLES)
    return count


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A loop between two works: the fields of its row, and its store."""
    job = new_job(SPEC)
    assert performed(job, 9) == 9
    job.tasks(0.0)
    progress = capture(job)(0, 0)
    assert progress.images > 1
    store = Stored(tmp_path_factory.mktemp("rows"), [json.dumps(event) for event in progress.events])
    for name, content in {**given_files(SPEC), **progress.files}.items():
        store._files.add(job.id, name, content)
    fields = {
        "loop_id": job.id, "owner": "a", "resumptions": 0, "started": 1.0, "images": progress.images,
        "best": progress.best, "spec": json.dumps(spec_to_json(SPEC)), "snapshot": json.dumps(progress.snapshot),
        "created": 1.0, "request": json.dumps(SPEC.request),
    }  # fmt: skip
    return fields, store


def restored(fields, store):
    """Returns the job of a row. Raises: ClvrError, as the replica that takes it over sees it."""
    run = run_from(SimpleNamespace(**fields, _mapping=fields))
    if run.damage is not None:
        raise ClvrError(run.damage)
    return restore(run, store, Limits(), new_job)


def test_a_whole_row_is_a_loop_that_continues(stored):
    job = restored(*stored)
    assert (job.id, job.spec.seed, job.spec.request) == (stored[0]["loop_id"], 18, SPEC.request)
    assert performed(job, 1000) < 1000
    assert job.state.finished("m", {}) is not None


@pytest.mark.parametrize("column", ["spec", "snapshot", "request"])
def test_a_damaged_row_is_one_line_or_a_loop_that_can_be_scheduled(stored, column, tmp_path):
    fields, store = stored
    valid = fields[column]
    cases = [case for case in json_texts(valid.encode()) if case.name not in NO_FILES]
    cases += json_values(json.loads(valid), 300, seed=1)
    messages = {}
    for number, case in enumerate(cases):
        path = tmp_path / str(number)
        case.write(path)
        # A database refuses bytes that are no text.
        text = path.read_bytes().decode(errors="replace")
        try:
            job = restored({**fields, column: text}, store)
        except ClvrError as error:
            messages[case.name] = str(error)
            continue
        hash(job.tasks(0.0)[0].key)
        json.dumps(job.spec.request, allow_nan=False, ensure_ascii=False).encode()
    for name, message in messages.items():
        assert "\n" not in message, name
        assert fields["loop_id"] in message, name
    assert len(messages) > len(cases) / (8 if column == "request" else 3)

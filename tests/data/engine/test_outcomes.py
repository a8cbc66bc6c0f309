"""Tests of stored outcomes: round trips, statistics, and errors of files that cannot be read or written."""

import json
import re
import zipfile

import numpy as np
import pytest

from clvr_jax.data.engine import outcomes
from clvr_jax.data.engine.engine import Settings, synthesize
from clvr_jax.data.engine.metering import UsageTracker
from clvr_jax.data.engine.outcomes import OutcomeStore
from clvr_jax.data.engine.reporting.card import dataset_card, headline, statistics_page, warning
from clvr_jax.data.engine.reporting.sharegpt import sharegpt_entry, write_sharegpt
from clvr_jax.data.engine.reporting.statistics import Statistics
from clvr_jax.data.engine.roles.shapes import correct_images, make_shapes_roles, needed_corrections
from clvr_jax.errors import ClvrError
from clvr_jax.files.image_io import pixels, read_image
from clvr_jax.interfaces import ProviderError, Usage
from clvr_jax.reasoning.conversation.actions import IMAGE_GEN, TERMINATE
from tests.data.engine.exact_generator import ExactGenerator, item


def made(store, number, wrong=0, **options):
    one, tracker = item(number), UsageTracker()
    outcome = synthesize(
        one, make_shapes_roles(one), tracker.image_model(ExactGenerator(wrong)), Settings(**options), seed=5
    )
    store.write(outcome, tracker.to_json(), 1.5)
    return outcome


def test_a_kept_outcome_has_its_record(tmp_path):
    store = OutcomeStore(tmp_path / "outcomes")
    assert store.ids() == set()
    outcome = made(store, 0)
    assert outcome.item.id in store
    assert store.ids() == {outcome.item.id}
    finished = store.read(outcome.item.id)
    assert (finished.stage, finished.is_kept, finished.seconds) == ("kept", True, 1.5)
    assert finished.usage["draw"]["nfe"] == 4 * (finished.num_images + 1)  # and the baseline
    record = store.record(finished)
    assert record.proxies == outcome.record.proxies
    assert list(record.checklists) == list(outcome.record.checklists)
    assert record.metadata == outcome.record.metadata
    assert record.trajectory == outcome.record.trajectory
    for got, wanted in zip(record.trajectory.generated, outcome.record.trajectory.generated, strict=True):
        np.testing.assert_array_equal(got.image, pixels(wanted.image))
    assert correct_images(record) == (True,) * finished.steps


def test_a_discarded_outcome_has_a_trajectory_and_no_record(tmp_path):
    store = OutcomeStore(tmp_path)
    outcome = made(store, 0, wrong=3)
    finished, trajectory = store.read(outcome.item.id), store.trajectory(outcome.item.id)
    assert (finished.is_kept, finished.reason) == (False, "passive verification")
    assert trajectory.generated[-1].verdict.unmet
    assert trajectory.error.startswith("passive verification: Is ")
    assert finished.content["events"][0]["turn"]["action"] == "INITIAL_GENERATION"
    with pytest.raises(ClvrError, match="was not kept"):
        store.record(finished)


def test_wrong_images_are_found_in_the_record(tmp_path):
    store = OutcomeStore(tmp_path)
    found = [made(store, number, wrong=5, verify=False) for number in range(10)]
    kept = [outcome.record for outcome in found if outcome.record]
    assert kept
    assert not all(right for record in kept for right in correct_images(record))


def test_errors_of_damaged_or_missing_files_name_them(tmp_path):
    store = OutcomeStore(tmp_path)
    outcome = made(store, 1)
    path = store.path(outcome.item.id)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ClvrError, match=r"complex-1\.zip: cannot be read .* processed again"):
        store.read(outcome.item.id)
    with pytest.raises(ClvrError, match="no such outcome"):
        store.read("other")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("reason"), "outcome.json: lacks reason"),
        (lambda content: content.update(usage={"draw": {"nfe": "x"}}), "usage: draw: nfe must be a number, got 'x'"),
        (lambda content: content.update(verification=[{"id": 3}]), "id must be a text, got 3"),
        (lambda content: content.update(proxies=[3]), "proxies must be a list of objects"),
        (lambda content: content.update(seconds=10**400), "seconds must be a finite number"),
    ],
)
def test_errors_of_changed_outcomes_name_the_field(tmp_path, change, message):
    store = OutcomeStore(tmp_path)
    id = made(store, 1).item.id
    with zipfile.ZipFile(store.path(id)) as archive:
        content = json.loads(archive.read("outcome.json"))
    change(content)
    with zipfile.ZipFile(store.path(id), "w") as archive:
        archive.writestr("outcome.json", json.dumps(content))
    with pytest.raises(ClvrError, match=re.escape(message)):
        store.read(id)


def test_large_or_empty_archives_are_errors(tmp_path, monkeypatch):
    store = OutcomeStore(tmp_path)
    path = store.path("a")
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("other", "x" * 1000)
    with pytest.raises(ClvrError, match=r"a\.zip: cannot be read .*outcome\.json"):
        store.read("a")
    monkeypatch.setattr(outcomes, "_MAX_BYTES", 999)
    with pytest.raises(ClvrError, match=r"a\.zip: cannot be read \(more than .* when unpacked"):
        store.read("a")
    monkeypatch.setattr(outcomes, "_MAX_BYTES", 99)
    with pytest.raises(ClvrError, match=r"a\.zip: cannot be read \(more than 0 MiB\)"):
        store.read("a")


def test_a_full_disk_leaves_no_partial_outcome(tmp_path, monkeypatch):
    store = OutcomeStore(tmp_path)
    path_type = type(store.directory)
    whole = path_type.write_bytes

    def full(path, data):
        whole(path, data[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(path_type, "write_bytes", full)
    with pytest.raises(ClvrError, match="No space left on device"):
        made(store, 1)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_statistics_count_stages_reasons_and_usage(tmp_path):
    store = OutcomeStore(tmp_path)
    outcomes = [made(store, number, wrong=0 if number < 3 else 4) for number in range(6)]
    corrections = [len(outcome.record.mistakes) for outcome in outcomes if outcome.record]
    examples = [example for outcome in outcomes for example in outcome.verification]
    statistics = Statistics({"empty": 2})
    for id in store.ids():
        statistics.add(store.read(id))
    for outcome in outcomes:
        if outcome.record:
            statistics.add_corrections(len(outcome.record.mistakes), needed_corrections(outcome.record))
            statistics.add_audit(correct_images(outcome.record))
    found = statistics.to_json()
    kept = sum(outcome.record is not None for outcome in outcomes)
    assert 3 <= kept <= 6
    assert found["stages"]["kept"] == {"prompts": kept, "share": kept / 6}
    assert sum(entry["prompts"] for entry in found["discarded"].values()) == 6 - kept
    reached = [entry["prompts"] for entry in found["stages"].values()]
    assert reached == sorted(reached, reverse=True)
    steps = sum(int(steps) * count for steps, count in found["steps"].items())
    assert steps - sum(corrections) == found["audit"]["pictures"]
    assert found["corrections"]["total"] == sum(corrections) > 0
    assert found["corrections"]["share"] == np.mean([count > 0 for count in corrections])
    assert found["corrections"]["per_trajectory"] == np.mean(corrections)
    assert found["verification"]["wrong"] + found["verification"]["right"] == len(examples) > 0
    assert found["total"]["nfe"] == 4 * found["total"]["pictures"]
    assert found["audit"]["wrong"] == 0
    whole = {"recipe": "r<b>", "description": "d", "verified": True, "trajectories": kept, **found}
    assert f"{kept} trajectories of 6 prompts" in headline(whole)
    page, card = statistics_page(whole), dataset_card(whole)
    assert "r&lt;b&gt;" in page
    assert "r<b>" not in page
    assert '<i style="width:100.00%"></i></span><span>6</span><span>100.0%</span>' in page
    assert "<tr><th>reason</th><th>example</th></tr>" in page
    assert "<h2>Verification examples by verdict</h2>" in page
    assert "| refused: empty | 2 |" in card
    assert "Every image was verified" in card
    assert "Every image was verified" not in dataset_card({**whole, "verified": False})
    for text in (page, card):
        assert f"{sum(corrections)} wrong images are part of the trajectories. {sum(corrections)} of them had" in text
        assert f"{len(examples)} examples, among them" in text
        assert "latest image wrong" in text
    assert warning(whole) is None
    none = {**whole, "corrections": {**found["corrections"], "total": 0}}
    assert "does not learn to inspect images" in warning(none)


def test_failed_calls_are_in_the_usage():
    tracker = UsageTracker()

    class Refusing(ExactGenerator):
        def generate(self, task):
            raise ProviderError("refused", "refused", Usage(calls=1, dollars=0.04, seconds=2.0))

    one = item(0)
    outcome = synthesize(one, make_shapes_roles(one), tracker.image_model(Refusing()))
    assert outcome.reason == "refused"
    assert tracker.total.dollars == 0.04
    assert tracker.to_json() == {"draw": {"calls": 1, "seconds": 2.0, "dollars": 0.04}}


def test_failed_attempts_are_stored_until_there_is_an_outcome_and_stay_in_its_usage(tmp_path):
    store = OutcomeStore(tmp_path)
    id = item(1).id
    for _ in range(2):
        store.write_failed(id, "down", "tiny (localhost): HTTP 503", {"draw": {"calls": 1, "seconds": 2.5}})
    assert id not in store
    assert store.ids() == set()
    assert store.failed(id).usage == {"draw": {"calls": 2, "seconds": 5.0}}
    statistics = Statistics()
    statistics.add_failed(id, store.failed(id))
    statistics.add_failed("other", None)
    found = statistics.to_json()
    assert found["unfinished"]["faults"] == {"down": 1, "not reached": 1}
    assert "2 prompts have no outcome yet" in statistics.unfinished_sentence
    outcome = made(store, 1)
    assert store.failed(id) is None
    finished = store.read(id)
    assert finished.usage["draw"]["calls"] == 2 + len(outcome.history.images) + 1


def test_sharegpt_records_name_the_place_of_each_image(tmp_path):
    store = OutcomeStore(tmp_path / "outcomes")
    outcome = made(store, 2)
    entry = sharegpt_entry(outcome.record)
    turns = entry["conversations"]
    assert turns[0] == {"from": "human", "value": outcome.item.prompt}
    assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
    assert all(turn["value"].endswith(IMAGE_GEN) for turn in turns[1:-1:2])
    assert turns[-1]["value"].endswith(TERMINATE)
    assert [turn["value"] for turn in turns[2::2]] == [f"<IMG_GEN_{n + 1}>" for n in range(len(entry["images"]))]
    assert write_sharegpt([outcome.record], tmp_path / "share") == 1
    first = read_image(tmp_path / "share" / entry["images"][0])
    np.testing.assert_array_equal(first, pixels(outcome.record.trajectory.generated[0].image))

"""Tests of corrected mistakes: context of image generators, never targets; verdicts on them are targets."""

import numpy as np
import pytest

from clvr_jax.data.engine.engine import Settings, synthesize
from clvr_jax.data.engine.outcomes import OutcomeStore
from clvr_jax.data.engine.reporting.sharegpt import sharegpt_entry
from clvr_jax.data.engine.roles.shapes import correct_images, make_shapes_roles, needed_corrections
from clvr_jax.data.engine.states import MACHINE
from clvr_jax.data.preprocessing.qwen3_vl_images import Qwen3VLImageProcessor
from clvr_jax.data.preprocessing.text import load_tokenizer
from clvr_jax.data.sft_examples import ConversationExamples, GenerationExamples, record_conversation
from clvr_jax.data.trajectories.dataset import VERIFICATION, TrajectoryDataset, write_dataset
from clvr_jax.data.trajectories.proxy_steps import ProxySteps
from clvr_jax.errors import ClvrError
from clvr_jax.files.image_io import pixels
from clvr_jax.interfaces import ImageResponse
from clvr_jax.pipelines.registry import SHIPPED
from clvr_jax.reasoning.conversation.actions import IMAGE_GEN, TERMINATE, parse
from clvr_jax.tasks.shapes import recorded_examples
from clvr_jax.worlds.shapes.check import check
from clvr_jax.worlds.shapes.detect import detect
from clvr_jax.worlds.shapes.layout import plan
from clvr_jax.worlds.shapes.metadata import parse_metadata
from clvr_jax.worlds.shapes.render import render
from clvr_jax.worlds.shapes.scene import Scene, place
from tests.data.engine.exact_generator import MistakesAt, item

PROCESSOR = Qwen3VLImageProcessor(patch_size=8, min_pixels=64 * 64, max_pixels=64 * 64)
ALWAYS = range(100)


def made(number, *wrong, **settings):
    """Returns the outcome of a prompt if the calls `wrong` of the image generator are wrong; retries are calls, too."""
    one = item(number)
    return synthesize(one, make_shapes_roles(one), MistakesAt(*wrong), Settings(**settings), seed=5)


@pytest.fixture(scope="module")
def outcomes():
    """Returns outcomes with mistakes in the first image, the second, the first and its retry, none, and the last."""
    return [made(0, 0), made(1, 1), made(2, 0, 1), made(3), made(4, *ALWAYS)]


@pytest.fixture(scope="module")
def directory(outcomes, tmp_path_factory):
    directory = tmp_path_factory.mktemp("data") / "dataset"
    records = [record for one in outcomes for record in (one.record, *one.verification) if record]
    assert write_dataset(directory, records) == 4
    return directory


@pytest.fixture(scope="module")
def wrong_images(outcomes):
    return [
        pixels(one.record.trajectory.steps[at].image) for one in outcomes if one.record for at in one.record.mistakes
    ]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(SHIPPED / "shapes-tiny" / "tokenizer")


def is_among(image, images):
    return any(np.array_equal(image, other) for other in images)


@pytest.mark.parametrize(("number", "wrong", "mistakes"), [(0, (0,), (0,)), (1, (1,), (1,)), (2, (0, 1), (0,))])
def test_a_mistake_stays_in_the_history_and_is_corrected(number, wrong, mistakes):
    outcome = made(number, *wrong)
    record, metadata = outcome.record, parse_metadata(outcome.item.metadata)
    assert record.mistakes == mistakes
    assert needed_corrections(record) == 1
    steps = record.trajectory.steps
    (at,) = mistakes
    assert any(not passed for _, _, passed in record.checklists[at])
    assert all(passed for place in record.generator_targets for _, _, passed in record.checklists[place])
    assert "Replace the" in steps[at + 1].reasoning  # the verdict on it is in the next reply, with the correction
    assert steps[at].verdict.unmet
    assert steps[at + 1].references == tuple(range(at + 1))
    assert check(detect(record.trajectory.image), metadata).correct
    assert correct_images(record) == (True,) * len(record.generator_targets)
    assert len(record.generator_targets) == len(record.trajectory.generated) - 1


def test_a_right_retry_gives_a_pair_with_the_same_history(outcomes):
    assert [len(one.verification) for one in outcomes[:4]] == [2, 2, 0, 0]
    for outcome in outcomes[:2]:
        wrong, right = outcome.verification
        at = outcome.record.mistakes[0]
        assert (wrong.id, right.id) == (f"{outcome.item.id}-{at}-wrong", f"{outcome.item.id}-{at}-right")
        assert wrong.is_verification
        assert right.is_verification
        (replies, images), (others, other_images) = map(record_conversation, (wrong, right))
        assert replies[:-1] == others[:-1]
        assert all(np.array_equal(one, other) for one, other in zip(images[:-1], other_images[:-1], strict=True))
        assert not np.array_equal(images[-1], other_images[-1])
        assert len(parse(replies[-1], True).unmet) > len(parse(others[-1], True).unmet)
        assert replies[-1] == outcome.record.trajectory.steps[at + 1].reasoning + IMAGE_GEN
        assert (wrong.mistakes, right.mistakes) == ((at,), ())
        assert wrong.generator_targets == right.generator_targets == ()


def test_a_trajectory_with_a_wrong_last_image_gives_a_verdict_and_no_target(outcomes):
    outcome = outcomes[-1]
    assert (outcome.record, outcome.reason) == (None, "passive verification")
    (example,) = outcome.verification
    # One more failure than the budget of the state allows.
    assert len(example.trajectory.steps) == MACHINE["refine"].retries + 1
    assert example.id.endswith("-1-wrong")
    assert example.mistakes == (0, 1)
    assert example.generator_targets == ()
    assert record_conversation(example)[0][-1].endswith(IMAGE_GEN)


def test_without_keep_mistakes_one_mistake_discards_the_trajectory():
    outcome = made(0, 0, keep_mistakes=False)
    assert (outcome.record, outcome.reason, outcome.verification) == (None, "passive verification", ())
    assert len(outcome.history.images) == 1


def test_a_right_final_verdict_ends_the_conversation():
    one = item(0)
    last = len(made(0).record.trajectory.generated) - 1
    wrong, right = made(0, last).verification
    assert record_conversation(wrong)[0][-1].endswith(IMAGE_GEN)
    assert record_conversation(right)[0][-1].endswith(f"Unmet: nothing.{TERMINATE}")
    assert check(detect(right.trajectory.steps[-1].image), parse_metadata(one.metadata)).correct


def test_no_training_input_has_a_wrong_image_as_target(directory, outcomes, wrong_images, tokenizer):
    assert len(wrong_images) == 3
    dataset = TrajectoryDataset(directory)
    generated = GenerationExamples(dataset, tokenizer, dropout=0.0)
    batches = [generated.batch([sample], [np.random.default_rng(0)]) for sample in generated.samples]
    targets = [(batch["references"][0], batch["target"][0]) for batch in batches]
    recorded = recorded_examples(directory, tokenizer)
    targets_of_shapes = [(example.references, example.target) for example in recorded]
    count = sum(len(one.record.generator_targets) for one in outcomes if one.record)
    for pairs in (targets, targets_of_shapes):
        assert len(pairs) == count
        assert not any(is_among(target, wrong_images) for _, target in pairs)
        assert all(any(is_among(wrong, references) for references, _ in pairs) for wrong in wrong_images)
    with pytest.raises(ClvrError, match="no training example"):
        GenerationExamples(TrajectoryDataset(directory, VERIFICATION), tokenizer)
    steps = ProxySteps(dataset, 64)
    assert any(is_among(image, wrong_images) for step in steps.steps for image in steps.references(step))
    for record in (one.record for one in outcomes if one.record):
        entry = sharegpt_entry(record)
        assert entry["wrong_images"] == [entry["images"][at] for at in record.mistakes]


def test_verdicts_on_mistakes_have_loss_and_of_examples_the_last_turn_only(directory, outcomes, tokenizer):
    verification = TrajectoryDataset(directory, VERIFICATION)
    examples = ConversationExamples(TrajectoryDataset(directory), tokenizer, PROCESSOR, verification=verification)
    taught = {}
    for sample in examples.samples:
        batch = examples.batch([sample], [])
        taught[sample.id] = tokenizer.decode(batch["input_ids_bt"][batch["weights_bt"] > 0])
        assert (batch["weights_bt"] > 0).sum() == np.count_nonzero(batch["learned_bk"])
    assert len(taught) == 4 + 5
    for outcome in outcomes:
        if outcome.record:
            for at in outcome.record.mistakes:
                assert outcome.record.trajectory.steps[at + 1].reasoning in taught[outcome.record.id]
        for example in outcome.verification:
            assert taught[example.id] == record_conversation(example)[0][-1] + "<|im_end|>"


def test_an_image_with_objects_of_later_steps_is_no_target_and_needs_no_correction():
    one = item(0)

    class Hasty(MistakesAt):
        """Makes the whole plan in its first call."""

        def generate(self, task):
            is_first = not self.calls
            done = super().generate(task)
            return ImageResponse(render(Scene(tuple(place(*each, rng) for each in planned)))) if is_first else done

    rng = np.random.default_rng(0)
    planned = [(each.color, each.shape, each.cell) for each in plan(parse_metadata(one.metadata))][:3]
    outcome = synthesize(one, make_shapes_roles(one), Hasty(), seed=5)
    assert outcome.record.mistakes == (0,)
    assert needed_corrections(outcome.record) == 0


def test_stored_outcomes_round_trip(directory, outcomes, tmp_path):
    store = OutcomeStore(tmp_path)
    for outcome in outcomes:
        store.write(outcome, {}, 1.0)
        finished = store.read(outcome.item.id)
        assert list(store.verification(finished)) == list(outcome.verification)
        assert finished.verdicts == tuple(one.id.endswith("-right") for one in outcome.verification)
        if outcome.record:
            assert store.record(finished) == outcome.record
    dataset, examples = TrajectoryDataset(directory), TrajectoryDataset(directory, VERIFICATION)
    assert dataset.has_verification
    assert [dataset[number].mistakes for number in range(4)] == [(0,), (1,), (0,), ()]
    assert all(examples[number].is_verification for number in range(len(examples)))

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from clvr_jax.data.preprocessing.qwen3_vl_images import Qwen3VLImageProcessor
from clvr_jax.data.preprocessing.text import load_tokenizer, prompt_tokens
from clvr_jax.data.sft_examples import ConversationExamples, GenerationExamples, PackedExamples, padding_share
from clvr_jax.data.sft_input import Batches, BatchLoader
from clvr_jax.data.trajectories.dataset import TrajectoryDataset, write_dataset
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.files.image_io import encode_png
from clvr_jax.pipelines.registry import SHIPPED
from clvr_jax.reasoning import IMAGE_GEN, TERMINATE, Step, Trajectory
from tests.data.simulated import simulated

PROCESSOR = Qwen3VLImageProcessor(patch_size=8, min_pixels=64 * 64, max_pixels=64 * 64)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(SHIPPED / "shapes-tiny" / "tokenizer")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data") / "trajectories"
    write_dataset(directory, (simulated(seed) for seed in range(300)))
    return TrajectoryDataset(directory)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data") / "few"
    write_dataset(directory, (simulated(seed) for seed in range(1000, 1030)))
    return TrajectoryDataset(directory)


@pytest.fixture(scope="module")
def generated(few, tokenizer):
    return GenerationExamples(few, tokenizer, dropout=0.1)


@pytest.fixture(scope="module")
def conversations(few, tokenizer):
    return ConversationExamples(few, tokenizer, PROCESSOR)


def small(directory: Path, *trajectories) -> TrajectoryDataset:
    write_dataset(directory / "set", trajectories)
    return TrajectoryDataset(directory / "set")


def gray(value, side=64):
    return np.full((side, side, 3), value, np.uint8)


def rolled_back_once():
    return Trajectory(
        "a cat",
        (
            Step("Draw a cat.", IMAGE_GEN, (), gray(0)),
            Step("Add ears.", IMAGE_GEN, (0,), gray(1), rolled_back=True),
            Step("Add ears.", IMAGE_GEN, (0,), gray(2), redraw=1),
            Step("Add a tail.", IMAGE_GEN, (0, 2), gray(3)),
            Step("Unmet: nothing.", TERMINATE),
        ),
        "accepted",
    )


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def decode(tokenizer, ids, mask):
    return tokenizer.decode(ids[mask.astype(bool)])


def test_an_image_is_conditioned_on_all_previous_steps(tmp_path, tokenizer):
    examples = GenerationExamples(small(tmp_path, rolled_back_once()), tokenizer, dropout=0.0)
    assert [sample.step for sample in examples.samples] == [0, 1, 2]
    loader = BatchLoader(examples, 2)
    last = next(batch for batch in map(loader, range(9)) if batch["references"].shape[1] == 2)
    assert last["references"].dtype == last["target"].dtype == np.uint8
    assert last["references"][0, :, 0, 0, 0].tolist() == [0, 2]
    assert last["target"][0, 0, 0].tolist() == [3] * 3
    text = "a cat\nDraw a cat.<IMG_GEN_1>\nAdd ears.<IMG_GEN_2>\nAdd a tail."
    decoded = decode(tokenizer, last["ids"][0], last["mask"][0])
    assert decoded == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert last["mask"][0].sum() == examples.samples[2].length


def test_a_packed_trajectory_has_the_images_texts_and_references_of_its_steps(few, tokenizer):
    examples = GenerationExamples(few, tokenizer, dropout=0.0, text_buckets=(192, 1024))
    packed = PackedExamples(examples)
    rngs = [np.random.default_rng(0)]
    targets = 0
    for sample in packed.samples:
        batch = packed.batch([sample], rngs)
        assert batch["references"].shape[1] == sample.step == batch["seen"].max()
        for number, seen in enumerate(batch["seen"][0]):
            (single,) = (
                each
                for each in examples.samples
                if (each.record, each.step, each.padded) == (sample.record, seen, sample.padded)
            )
            expected = examples.batch([single], rngs)
            np.testing.assert_array_equal(batch["references"][:, :seen], expected["references"])
            for name in ("ids", "mask", "target"):
                np.testing.assert_array_equal(batch[name][:, number], expected[name])
            targets += 1
    assert targets == len(examples.samples)
    assert len({sample.record for sample in packed.samples}) == len({sample.record for sample in examples.samples})
    assert {sample.padded for sample in packed.samples} == {192, 1024}
    assert max(len(BatchLoader(packed, 2)(step)["seen"][0]) for step in range(20)) > 1


def test_a_conversation_has_all_steps_that_were_not_rolled_back(tmp_path, tokenizer):
    unheard = Trajectory("a dog", rolled_back_once().steps[:1], "step limit")
    silent = Trajectory("?", (), "unparseable")
    examples = ConversationExamples(small(tmp_path, rolled_back_once(), unheard, silent), tokenizer, PROCESSOR)
    assert [sample.id for sample in examples.samples] == ["00000000", "00000001"]
    batches = list(map(BatchLoader(examples, 1), range(2)))
    taught = {tokenizer.decode(batch["input_ids_bt"][batch["weights_bt"] > 0]): batch for batch in batches}
    replies = ["Draw a cat.", "Add ears.", "Add a tail."]
    whole = "".join(f"{reply}{IMAGE_GEN}<|im_end|>" for reply in replies) + f"Unmet: nothing.{TERMINATE}<|im_end|>"
    assert set(taught) == {whole, f"Draw a cat.{IMAGE_GEN}<|im_end|>"}
    assert taught[whole]["grid_thw"] == ((1, 8, 8),) * 3
    shown = taught[whole]["pixel_values"].reshape(3, -1).mean(axis=1)
    np.testing.assert_allclose(shown, np.array([0, 2, 3]) / 127.5 - 1, atol=1e-6)


@pytest.mark.slow
def test_padding_is_a_small_share_of_an_epoch(dataset, tokenizer):
    """Pads real texts of the shapes world to the lengths of their samples."""
    generated = GenerationExamples(dataset, tokenizer, dropout=0.0)
    conversations = ConversationExamples(dataset, tokenizer, PROCESSOR)
    for examples, name in ((generated, "mask"), (conversations, "attention_mask_bt")):
        loader = BatchLoader(examples, 8)
        masks = [loader(step)[name] for step in range(loader.plan.steps(1))]
        share = 1 - sum(mask.sum() for mask in masks) / sum(mask.size for mask in masks)
        assert share < 0.15
        assert share == pytest.approx(padding_share(examples.samples), abs=0.02)
        assert {mask.shape[1] for mask in masks} <= {sample.padded for sample in examples.samples}
        assert len({sample.bucket for sample in examples.samples}) < 48  # each needs a compilation


def test_the_lengths_of_the_plan_are_those_of_the_batches(conversations):
    """Compares lengths computed with one token per image with those of the batches."""
    for sample in conversations.samples[:20]:
        batch = conversations.batch([sample], [])
        assert batch["attention_mask_bt"].sum() == sample.length
        assert batch["input_ids_bt"].shape[1] == sample.padded
        assert batch.get("grid_thw", ()) == sample.shape[0]


def test_given_buckets_are_used_as_in_the_pipeline(few, tokenizer, generated, capsys):
    examples = GenerationExamples(few, tokenizer, text_buckets=(96, 192))
    batches = list(map(BatchLoader(examples, 16), range(12)))
    assert {batch["ids"].shape[1] for batch in batches} == {96, 192}
    longer = [sample.length > 192 for sample in generated.samples]
    assert 0 < sum(longer) == examples.left_out
    assert f"{sum(longer)} of {len(longer)} histories are longer than 192 tokens" in capsys.readouterr().err
    for fitted, whole, is_longer in zip(examples.samples, generated.samples, longer, strict=True):
        assert fitted.length <= 192 if is_longer else fitted.length == whole.length
    with pytest.raises(ClvrError, match=r"trajectory \w+, image 0: the prompt and the current instruction take \d+"):
        GenerationExamples(few, tokenizer, text_buckets=(40,))


def test_the_latest_instruction_is_never_left_out(tokenizer, tmp_path):
    """Uses long histories that differ in their last instruction only."""

    def trajectory(last):
        replies = [f"Unmet: {'a red star at the top left, ' * (2 * n + 1)}. Add it." for n in range(7)]
        steps = [
            Step(reply, IMAGE_GEN, tuple(range(n)), gray(n, 8)) for n, reply in enumerate([*replies, f"Add {last}."])
        ]
        return Trajectory("a cat", tuple(steps), "step limit")

    dataset = small(tmp_path, trajectory("one blue star"), trajectory("one red star"))
    examples = GenerationExamples(dataset, tokenizer, dropout=0.0, text_buckets=(256, 384))
    assert examples.left_out > 0
    ends = [sample for sample in examples.samples if sample.step == 7]
    batch = examples.batch(ends, [np.random.default_rng(0)] * 2)
    texts = [decode(tokenizer, *row) for row in zip(batch["ids"], batch["mask"], strict=True)]
    assert [text.count("a cat") for text in texts] == [1, 1]
    for text, last in zip(texts, ("one blue star", "one red star"), strict=True):
        assert f"<IMG_GEN_7>\nAdd {last}." in text


@pytest.mark.slow
def test_dropout_removes_texts_and_keeps_images(few, tokenizer):
    examples = GenerationExamples(few, tokenizer, dropout=0.25)
    loader, kept = BatchLoader(examples, 16), BatchLoader(GenerationExamples(few, tokenizer, dropout=0.0), 16)
    empty = len(prompt_tokens(tokenizer, [""])[0])
    dropped = []
    for step in range(20):
        ours, full = loader(step), kept(step)
        for name in ("references", "target"):
            np.testing.assert_array_equal(ours[name], full[name])
        lengths = ours["mask"].sum(axis=1)
        dropped.append(lengths == empty)
        np.testing.assert_array_equal(lengths[~dropped[-1]], full["mask"].sum(axis=1)[~dropped[-1]])
    assert 0.17 < np.mean(dropped) < 0.33
    assert_equal(loader(3), loader(3))
    with pytest.raises(UsageError, match="dropout"):
        GenerationExamples(few, tokenizer, dropout=2)


@pytest.mark.parametrize("kind", ["generated", "conversations"])
def test_processes_have_the_rows_of_one_batch(request, kind):
    examples = request.getfixturevalue(kind)
    whole = BatchLoader(examples, 8)
    parts = [BatchLoader(examples, 8, process_index=index, process_count=4) for index in range(4)]
    assert {part.fingerprint for part in parts} == {whole.fingerprint}
    for step in range(6):
        expected, rows = whole(step), [part(step) for part in parts]
        grids = {row.pop("grid_thw", ()) for row in rows}
        assert grids == {expected.pop("grid_thw", ())}
        for name, value in expected.items():
            np.testing.assert_array_equal(np.concatenate([row[name] for row in rows]), value, err_msg=name)


def test_process_counts_that_do_not_divide_a_batch_are_errors(generated):
    with pytest.raises(UsageError, match="batch_size 8 is no multiple of the 3 processes"):
        BatchLoader(generated, 8, process_index=0, process_count=3)
    with pytest.raises(UsageError, match="process_index 2 of 2"):
        BatchLoader(generated, 8, process_index=2, process_count=2)


@pytest.mark.parametrize("kind", ["generated", "conversations"])
@pytest.mark.parametrize("stop", [0, 2, 40])
def test_a_restored_iterator_resumes_at_its_state(request, kind, stop):
    """Restores at the start, in the first epoch, and after it, with other threads and half of the processes."""
    loader = BatchLoader(request.getfixturevalue(kind), 4, seed=5, process_index=0, process_count=1)
    half = BatchLoader(request.getfixturevalue(kind), 4, seed=5, process_index=0, process_count=2)
    assert (loader.plan.epoch(stop) > 0) == (stop == 40)
    batches = Batches(loader, threads=3, prefetch=5)
    for _ in range(stop):
        next(batches)
    state = json.loads(json.dumps(batches.state()))
    following = [next(batches) for _ in range(3)]
    batches.close()
    for threads, prefetch in ((1, 1), (8, 3)):
        again = Batches(loader, threads=threads, prefetch=prefetch)
        next(again)
        again.restore(state)
        for expected in following:
            assert_equal(next(again), expected)
        assert again.state() == {**state, "step": stop + 3}
        again.close()
    split = Batches(half)
    split.restore(state)
    np.testing.assert_array_equal(next(split)[next(iter(following[0]))], next(iter(following[0].values()))[:2])
    split.close()


@pytest.mark.slow
def test_worker_processes_do_not_change_batches(conversations):
    loader = BatchLoader(conversations, 8)
    batches = Batches(loader, threads=2, prefetch=2, workers=2)
    for step in (0, 1, 2):
        assert_equal(next(batches), loader(step))
    batches.restore({**batches.state(), "step": 7})
    for step in (7, 8):
        assert_equal(next(batches), loader(step))
    batches.close()


def test_a_state_of_other_batches_is_an_error(generated):
    state = Batches(BatchLoader(generated, 8, seed=1)).state()
    for other in (BatchLoader(generated, 8, seed=2), BatchLoader(generated, 16, seed=1)):
        with pytest.raises(ClvrError, match="belongs to other batches"):
            Batches(other).restore(state)


def test_errors_of_unusable_data_name_the_cause(tmp_path, tokenizer):
    silent = small(tmp_path / "a", Trajectory("?", (), "unparseable"))
    with pytest.raises(ClvrError, match="no training example in 1 trajectories"):
        GenerationExamples(silent, tokenizer)
    trajectory = rolled_back_once()
    mixed = replace(
        trajectory, steps=(trajectory.steps[0], replace(trajectory.steps[2], image=gray(1, 32)), trajectory.steps[4])
    )
    mixed = replace(mixed, steps=(mixed.steps[0], replace(mixed.steps[1], references=(0,)), mixed.steps[2]))
    with pytest.raises(ClvrError, match="trajectory 00000000: images of 32 x 32, 64 x 64 pixels"):
        GenerationExamples(small(tmp_path / "b", mixed), tokenizer)


def test_an_image_that_cannot_be_decoded_stops_the_run_with_one_line(tmp_path, tokenizer, monkeypatch):
    """Truncates an image whose header, which is all that is read for lengths, is intact."""
    monkeypatch.setattr("clvr_jax.data.trajectories.record.encode_png", lambda image: encode_png(image)[:-40])
    examples = GenerationExamples(small(tmp_path, rolled_back_once()), tokenizer)
    with pytest.raises(ClvrError) as stopped:
        next(Batches(BatchLoader(examples, 2)))
    assert str(stopped.value).startswith("trajectory 00000000, record 0: broken image (")
    assert "\n" not in str(stopped.value)

import json
import pickle
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from clvr_jax.data.trajectories.dataset import (
    VERIFICATION,
    CorruptRecordError,
    TrajectoryDataset,
    main,
    saved_trajectories,
    write_dataset,
)
from clvr_jax.data.trajectories.record import SCHEMA, ProxyPrompts, TrajectoryRecord, record_to_example
from clvr_jax.errors import ClvrError
from clvr_jax.files.image_io import pixels
from clvr_jax.reasoning import IMAGE_GEN, TERMINATE, Step, Trajectory, Verdict


def noise(seed, height=8, width=8):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def trajectory(seed=0, num_images=2, side=8):
    steps = [
        Step(
            f"Reply {number}: «draw».",
            IMAGE_GEN,
            tuple(range(number)),
            noise(seed + number, side, side),
            Verdict(("a cat", "b"), "I see."),
            nfe=4,
            seconds=0.1 + number / 3,
            rolled_back=number == 1,
            attempts=2,
            redraw=number,
            seed=2**62 + number,
        )
        for number in range(num_images)
    ]
    stop = Step("Unmet: nothing.", TERMINATE)
    return Trajectory("a cat \udcff", (*steps, stop), "accepted", "toy", seed, {"numpy": "2"}, 1 / 3)


def full_record():
    source = trajectory()
    return TrajectoryRecord(
        "first",
        source,
        {"tag": "complex", "include": [{"class": "star", "count": 2}]},
        ([{"item": "a cat", "met": True}], None, None),
        (ProxyPrompts("a cat"), ProxyPrompts("a cat and a dog", "add a dog", (0,)), None),
    )


def assert_same(ours, theirs):
    assert ours == theirs  # everything but the images
    for one, other in zip(ours.trajectory.steps, theirs.trajectory.steps, strict=True):
        assert (one.image is None) == (other.image is None)
        if one.image is not None:
            np.testing.assert_array_equal(pixels(one.image), pixels(other.image))


def corrupt(directory, png):
    """Damages the record that contains these bytes of an image."""
    (shard,) = directory.glob("*.array_record-*")
    content = bytearray(shard.read_bytes())
    content[content.index(png) + 20] ^= 255
    shard.write_bytes(content)


def image_bytes(directory, number):
    """Returns bytes that occur in record `number` only."""
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(directory).as_data_source("train")[number]["steps"]["image"][0][40:140]


def test_records_round_trip(tmp_path):
    records = [
        full_record(),
        TrajectoryRecord("no reply", Trajectory("?", (), "unparseable", error="no action token")),
        TrajectoryRecord("one image", trajectory(seed=7, num_images=1, side=33)),
    ]
    assert write_dataset(tmp_path / "deep" / "set", records) == 3
    dataset = TrajectoryDataset(tmp_path / "deep" / "set")
    assert len(dataset) == 3
    for number, record in enumerate(records):
        assert_same(record, dataset[number])
        assert_same(record, pickle.loads(pickle.dumps(dataset))[number])
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["set"]
    with pytest.raises(IndexError):
        dataset[3]


def test_tfds_reads_the_directory_and_nothing_imports_tensorflow(tmp_path):
    script = """if True:
        import sys
        from pathlib import Path
        from tests.data.trajectories.test_dataset import full_record, trajectory
        from clvr_jax.data.trajectories.dataset import TrajectoryDataset, write_dataset
        directory = Path(sys.argv[1])
        write_dataset(directory, [full_record(), trajectory(5)])
        import tensorflow_datasets as tfds
        builder = tfds.builder_from_directory(directory)
        assert str(builder.info.full_name) == "trajectories/1.1.0", builder.info.full_name
        assert builder.info.splits["train"].num_examples == 2
        example = builder.as_data_source("train")[0]
        assert example["prompt"].startswith(b"a cat")
        assert [image[:4] for image in example["steps"]["image"]] == [b"\\x89PNG", b"\\x89PNG", b""]
        assert len(TrajectoryDataset(directory)) == 2
        assert "tensorflow" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "set")], check=True)


def test_a_dataset_of_the_first_schema_has_no_mistakes(tmp_path, monkeypatch):
    module = "clvr_jax.data.trajectories.dataset"

    def example_of_old(record):
        """As schema 1.0.0 wrote it."""
        example = record_to_example(record)
        for part, name in ((example, "is_verification"), *((step, "is_mistake") for step in example["steps"])):
            run = json.loads(part["run"])
            del run[name]
            part["run"] = json.dumps(run).encode()
        return example

    monkeypatch.setattr(f"{module}.record_to_example", example_of_old)
    monkeypatch.setattr(f"{module}.SCHEMA", "1.0.0")
    write_dataset(tmp_path / "set", [full_record()])
    dataset = TrajectoryDataset(tmp_path / "set")
    assert_same(full_record(), dataset[0])
    assert (dataset[0].mistakes, dataset[0].is_verification, dataset.has_verification) == ((), False, False)
    assert dataset[0].generator_targets == (0,)  # the second image was rolled back
    with pytest.raises(ClvrError, match="no split verification"):
        TrajectoryDataset(tmp_path / "set", VERIFICATION)


def test_mistakes_without_an_image_are_errors():
    with pytest.raises(ClvrError, match="mistakes has step 2, which has no image"):
        replace(full_record(), mistakes=(2,))
    with pytest.raises(ClvrError, match="ends with an image and the verdict on it"):
        replace(full_record(), is_verification=True)


def test_shards_are_written_incrementally(tmp_path):
    seen = []

    def come():
        for number in range(5):
            seen.append(len(list(tmp_path.glob(".set.*/shard-*"))))
            yield trajectory(number)

    write_dataset(tmp_path / "set", come(), shard_bytes=1)
    assert seen == [0, 1, 2, 3, 4]
    dataset = TrajectoryDataset(tmp_path / "set")
    assert [dataset[number].id for number in range(5)] == [f"{number:08d}" for number in range(5)]
    for number in (4, 0, 3):
        np.testing.assert_array_equal(pixels(dataset[number].trajectory.steps[0].image), noise(number))
    assert len(list((tmp_path / "set").glob("trajectories-train.array_record-*-of-00005"))) == 5


def test_a_failed_write_leaves_nothing(tmp_path):
    def breaks():
        yield trajectory()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "set", breaks())
    with pytest.raises(ClvrError, match="no trajectories to write"):
        write_dataset(tmp_path / "set", [])
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    script = """if True:
        import resource, sys
        from pathlib import Path
        from tests.data.trajectories.test_dataset import trajectory
        from clvr_jax.data.trajectories.dataset import write_dataset
        from clvr_jax.errors import ClvrError
        import tensorflow_datasets
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            write_dataset(Path(sys.argv[1]), (trajectory(seed, side=128) for seed in range(20)))
        except ClvrError as error:
            print(error)
    """
    directory = tmp_path / "set"
    done = subprocess.run([sys.executable, "-c", script, str(directory)], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"{directory}: cannot be written (write() failed: File too large)"]
    assert not list(tmp_path.iterdir())


def test_an_existing_directory_is_not_overwritten(tmp_path):
    (tmp_path / "set").mkdir()
    write_dataset(tmp_path / "set", [trajectory()])
    with pytest.raises(ClvrError, match="already exists"):
        write_dataset(tmp_path / "set", [trajectory(), trajectory()])
    assert len(TrajectoryDataset(tmp_path / "set")) == 1


def test_saved_trajectories_become_a_dataset(tmp_path, capsys):
    for name in ("b", "a"):
        replace(trajectory(ord(name)), prompt=f"prompt {name}").save(tmp_path / "saved" / name)
    main(tmp_path / "saved", tmp_path / "set")
    assert "2 trajectories" in capsys.readouterr().out
    dataset = TrajectoryDataset(tmp_path / "set")
    assert [dataset[number].id for number in range(2)] == ["a", "b"]
    for ours, theirs in zip(saved_trajectories(tmp_path / "saved"), dataset, strict=True):
        assert_same(ours, theirs)
    with pytest.raises(ClvrError, match="no saved trajectories"):
        main(tmp_path / "set", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_errors_of_other_directories_are_one_line(tmp_path):
    directory = tmp_path / "set"
    with pytest.raises(ClvrError, match="no trajectory dataset here; make one") as missing:
        TrajectoryDataset(directory)
    assert "\n" not in str(missing.value)
    write_dataset(directory, [trajectory(number) for number in range(3)], shard_bytes=1)
    description = directory / "dataset_info.json"
    info = json.loads(description.read_text())
    assert info["version"] == SCHEMA
    (directory / "trajectories-train.array_record-00001-of-00003").rename(tmp_path / "elsewhere")
    with pytest.raises(ClvrError, match="00001-of-00003: this shard of the dataset is missing"):
        TrajectoryDataset(directory)
    for change, complaint in (
        ({"version": "0.9.0"}, "its schema is 0.9.0, this clvr-jax reads"),
        ({"name": "mnist"}, "'mnist', not of 'trajectories'"),
        ({"splits": []}, "the dataset is empty"),
    ):
        description.write_text(json.dumps({**info, **change}))
        with pytest.raises(ClvrError, match=complaint):
            TrajectoryDataset(directory)
    description.write_text("{")
    with pytest.raises(ClvrError, match="not JSON"):
        TrajectoryDataset(directory)


def test_corrupt_records_are_skipped_counted_and_limited(tmp_path, capsys):
    directory = tmp_path / "set"
    write_dataset(directory, [trajectory(10 * number, side=64) for number in range(5)])
    for number in (1, 3):
        corrupt(directory, image_bytes(directory, number))
    dataset = TrajectoryDataset(directory)
    with pytest.raises(CorruptRecordError, match="record 3 cannot be read") as broken:
        dataset[3]
    assert "\n" not in str(broken.value)
    assert [number for number, _ in dataset.scan()] == [0, 2, 4]
    assert "2 of 5 records left out (first: " in capsys.readouterr().err
    with pytest.raises(ClvrError, match="2 of the first 4 records are corrupt, more than 1;"):
        list(dataset.scan(max_corrupt=1))


def test_records_are_validated():
    source = trajectory()
    with pytest.raises(ClvrError, match="3 steps but 1 checklists"):
        TrajectoryRecord("x", source, checklists=(None,))
    with pytest.raises(ClvrError, match="i_ref of step 1 is 1, which is no earlier image"):
        TrajectoryRecord("x", source, proxies=(None, ProxyPrompts("a", "b", (1,)), None))
    with pytest.raises(ClvrError, match="p_i2i and i_ref go together"):
        ProxyPrompts("a", "b")


def test_a_description_imports_no_module_that_it_names(tmp_path, monkeypatch):
    """TFDS imports the module of a class that it does not know."""
    directory = tmp_path / "set"
    write_dataset(directory, [Trajectory("p", (), "unparseable", error="e")])
    (tmp_path / "hostile.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    features = directory / "features.json"
    known = "tensorflow_datasets.core.features.text_feature.Text"
    assert known in features.read_text()
    features.write_text(features.read_text().replace(known, "hostile.Text", 1))
    with pytest.raises(ClvrError, match=r"features\.json: pythonClassName is 'hostile\.Text'; only classes of"):
        TrajectoryDataset(directory)
    assert not (tmp_path / "ran").exists()

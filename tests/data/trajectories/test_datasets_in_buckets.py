"""A dataset of trajectories in a bucket is that on a disk."""

import dataclasses
from pathlib import Path

import pytest

from clvr_jax.arguments import StoragePath
from clvr_jax.cli import main, parse
from clvr_jax.data.trajectories.dataset import TrajectoryDataset
from clvr_jax.errors import ClvrError
from clvr_jax.files import bucket_copies
from clvr_jax.files.buckets import objects
from clvr_jax.files.buckets.paths import is_bucket, storage_path
from clvr_jax.files.recipe_files import config_from_json, config_to_json
from tests.commands.command_line import complaint

DATA = storage_path("gs://runs/data")


@dataclasses.dataclass(frozen=True)
class Config:
    """Paths of both kinds."""

    dataset: StoragePath = Path("data")
    other: StoragePath | None = None
    images: Path = Path("images")


@pytest.fixture(autouse=True)
def copies(tmp_path, monkeypatch):
    monkeypatch.setenv("CLVR_COPIES", str(tmp_path / "copies"))
    monkeypatch.setattr(bucket_copies, "copied", bucket_copies.copied.__wrapped__)


@pytest.mark.slow
def test_records_of_a_dataset_in_a_bucket_are_those_on_a_disk(bucket, tmp_path):
    from tests.rl.pprl_toy import make_dataset

    expected = TrajectoryDataset(make_dataset(tmp_path / "data"))
    for path in (path for path in expected.directory.rglob("*") if path.is_file()):
        objects.write(DATA / path.relative_to(expected.directory).as_posix(), path.read_bytes())
    found = TrajectoryDataset("gs://runs/data")
    assert len(found) == len(expected) == 12
    records = [[record for _, record in dataset.scan()] for dataset in (found, expected)]
    assert [record.trajectory.prompt for record in records[0]] == [record.trajectory.prompt for record in records[1]]
    assert [path.read_bytes() for path in sorted(found.directory.glob("*array_record*"))] == [
        path.read_bytes() for path in sorted(expected.directory.glob("*array_record*"))
    ]


def test_a_dataset_that_is_not_there_is_one_line(bucket):
    with pytest.raises(ClvrError, match=r"^gs://runs/data: nothing is stored there"):
        TrajectoryDataset(DATA)
    objects.write(DATA / "x", b"")
    with pytest.raises(ClvrError, match="no trajectory dataset here"):
        TrajectoryDataset(DATA)


def test_the_option_takes_both_and_the_recipe_of_a_run_keeps_it():
    train = parse(["train", "flux2_sft", "--dataset", str(DATA)])
    assert is_bucket(train.config_with_overrides.dataset)
    assert parse(["train", "flux2_sft", "--dataset", "a/b"]).config_with_overrides.dataset == Path("a/b")
    config = Config(DATA, DATA / "other")
    stored = config_to_json(config)
    assert stored == {"dataset": "gs://runs/data", "other": "gs://runs/data/other", "images": "images"}
    assert config_from_json(Config(), stored) == config
    with pytest.raises(ClvrError, match="gs://runs/images: a URL, not a file or directory of this machine"):
        config_from_json(Config(), {**stored, "images": "gs://runs/images"})


@pytest.mark.parametrize("url", ["s3://bucket/data", "gs://B/data", "gs://bucket/../data"])
def test_another_address_is_refused_in_one_line(url, capsys):
    assert main(["train", "flux2_sft", "--dataset", url]) == 2
    complaint(capsys)

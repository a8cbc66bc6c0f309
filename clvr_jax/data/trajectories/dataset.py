"""Trajectory datasets in TFDS format: a directory of array_record shards with TFDS metadata, without TensorFlow.

    python -m clvr_jax.data.trajectories.dataset --source runs/shapes_rollouts --out data/trajectories

`tfds.builder_from_directory(directory).as_data_source("train")` reads the same directory. The split "train" has the
trajectories; the split "verification", if there is one, has histories with a verdict on their latest image.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from clvr_jax.arguments import run_script
from clvr_jax.data.trajectories.record import (
    READABLE_SCHEMAS,
    SCHEMA,
    TrajectoryRecord,
    record_features,
    record_from_example,
    record_to_example,
)
from clvr_jax.display.console import console, progress
from clvr_jax.errors import ClvrError
from clvr_jax.files.atomic_io import atomic_directory
from clvr_jax.files.bucket_copies import on_disk
from clvr_jax.files.buckets.paths import storage_path
from clvr_jax.files.json_input import JSON, JsonObject, read_object, shown
from clvr_jax.reasoning.trajectories.trajectory import Trajectory
from clvr_jax.training_packages import training_package

NAME = "trajectories"
SPLIT, VERIFICATION = "train", "verification"
_FEATURES = "tensorflow_datasets.core.features."
"""Beginning of the names of the classes that a description of features may name."""


def write_dataset(
    directory: Path,
    trajectories: Iterable[Trajectory | TrajectoryRecord],
    *,
    shard_bytes: int = 2**28,
    overwrite: bool = False,
) -> int:
    """Writes a dataset completely or not at all, one trajectory at a time.

    Args:
      directory: output directory. It must not exist or be empty, unless `overwrite` is set.
      trajectories: records, or trajectories, whose ids are their indices. Verification examples are written to a split
        of their own.
      shard_bytes: size in bytes at which a shard is closed.
      overwrite: replace an existing directory once the new dataset is complete.
    Returns: the number of trajectories, without verification examples.
    Raises: ClvrError, one line, if there is no trajectory, the directory exists, or the disk is full. After an error,
      also of the iterable, nothing is left on disk.
    """
    if not overwrite and directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ClvrError(f"{directory}: already exists; choose another directory or remove it")
    tfds = training_package("tensorflow_datasets")

    features = record_features()
    serializer = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info())
    with atomic_directory(directory) as temporary:
        splits = {split: _Shards(directory, temporary, split, shard_bytes) for split in (SPLIT, VERIFICATION)}
        for number, given in enumerate(trajectories):
            record = TrajectoryRecord(f"{number:08d}", given) if isinstance(given, Trajectory) else given
            shards = splits[VERIFICATION if record.is_verification else SPLIT]
            shards.write(serializer.serialize_example(features.encode_example(record_to_example(record))))
        for shards in splits.values():
            shards.close()
        if not splits[SPLIT].lengths:
            raise ClvrError(f"{directory}: there are no trajectories to write")
        tfds.folder_dataset.write_metadata(
            data_dir=temporary,
            features=features,
            split_infos=[shards.finalize() for shards in splits.values() if shards.lengths],
            version=SCHEMA,
            description="Trajectories of closed-loop verified reasoning, written by clvr-jax.",
            check_data=False,  # the check needs TensorFlow
        )
    return sum(splits[SPLIT].lengths)


class _RecordWriter(Protocol):
    """A writer of array_record files."""

    def write(self, record: bytes, /) -> object: ...

    def close(self) -> None: ...


class _DataSource(Protocol):
    """The records of a split, as TFDS decodes them."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Mapping[str, object]: ...


class _Shards:
    """A writer of the serialized records of a split to files of limited size.

    Final names contain the number of shards, so that shards are renamed at the end.
    """

    def __init__(self, directory: Path, temporary: Path, split: str, shard_bytes: int):
        self._directory, self._temporary, self._split, self._shard_bytes = directory, temporary, split, shard_bytes
        self._writer: _RecordWriter | None = None
        self._written = 0
        self.lengths: list[int] = []
        self.num_bytes = 0

    def path(self, number: int) -> Path:
        return self._temporary / f"shard-{self._split}-{number}"

    def write(self, record: bytes) -> None:
        array_record = training_package("array_record.python.array_record_module")

        try:
            if self._writer is None:
                # One record per group: random access would otherwise decompress neighboring records, too.
                self._writer = array_record.ArrayRecordWriter(str(self.path(len(self.lengths))), "group_size:1")
                self.lengths.append(0)
            self._writer.write(record)
        except RuntimeError as error:
            raise self._unwritable(error) from error
        self.lengths[-1] += 1
        self._written += len(record)
        self.num_bytes += len(record)
        if self._written >= self._shard_bytes:
            self.close()

    def close(self) -> None:
        """Closes the current shard, if there is one."""
        writer, self._writer, self._written = self._writer, None, 0
        try:
            if writer is not None:
                writer.close()
        except RuntimeError as error:
            raise self._unwritable(error) from error

    def finalize(self) -> object:
        """Renames the closed shards to their final names and returns the split info for TFDS."""
        tfds = training_package("tensorflow_datasets")

        names = tfds.core.ShardedFileTemplate(
            data_dir=self._temporary, dataset_name=NAME, split=self._split, filetype_suffix="array_record"
        )
        for number in range(len(self.lengths)):
            name = names.sharded_filepath(shard_index=number, num_shards=len(self.lengths))
            self.path(number).rename(name)
        return tfds.core.SplitInfo(
            name=self._split, shard_lengths=self.lengths, num_bytes=self.num_bytes, filename_template=names
        )

    def _unwritable(self, error: RuntimeError) -> ClvrError:
        return ClvrError(f"{self._directory}: cannot be written ({str(error).partition(';')[0]})")


class CorruptRecordError(ClvrError):
    """A record cannot be read; the message has its index and the reason."""


class TrajectoryDataset:
    """A trajectory dataset with random access, `len(dataset)` and `dataset[number]`, for several threads or processes.

    Attributes:
      directory: directory of the dataset.
      split: name of the split.
      has_verification: whether the dataset has verification examples.

    Args:
      directory: directory of a dataset that `write_dataset` or TFDS wrote with a readable schema.
      split: "train" or "verification".
    Raises: ClvrError, one line, if there is no dataset, it is another kind of dataset, has another schema, is empty, or
      a shard is missing.
    """

    def __init__(self, directory: Path, split: str = SPLIT):
        directory = on_disk(storage_path(directory))
        self.directory, self.split = directory, split
        description = directory / "dataset_info.json"
        if not description.exists():
            raise ClvrError(
                f"{directory}: no trajectory dataset here; make one of saved trajectories with "
                f"python -m clvr_jax.data.trajectories.dataset --source DIR --out {directory}"
            )
        info = read_object(description)
        name, version = (info.content.get(key) for key in ("name", "version"))
        if name != NAME:
            raise ClvrError(f"{directory}: a dataset of {shown(name)}, not of {NAME!r}")
        if not isinstance(version, str) or version not in READABLE_SCHEMAS:
            raise ClvrError(
                f"{directory}: its schema is {version!s:.40}, this clvr-jax reads {' and '.join(READABLE_SCHEMAS)}; "
                "write the dataset again with this version, or read it with the one that wrote it"
            )
        splits = info.objects("splits") if "splits" in info.content else []
        lengths = {entry.text("name"): _length(entry) for entry in splits}
        if not lengths.get(split):
            raise ClvrError(
                f"{directory}: the dataset is empty" + ("" if split == SPLIT else f", it has no split {split}")
            )
        self.has_verification = lengths.get(VERIFICATION, 0) > 0
        _check_features(directory / "features.json")
        self._source = self._open()

    def _open(self) -> _DataSource:
        tfds = training_package("tensorflow_datasets")

        try:
            builder = tfds.builder_from_directory(self.directory)
            paths = [Path(path) for path in builder.info.splits[self.split].filepaths]
            # array_record takes a file that is missing for an empty one.
            absent = [path for path in paths if not path.exists()]
            outside = [path for path in paths if path.parent.resolve() != self.directory.resolve()]
            source: _DataSource | None = None if absent or outside else builder.as_data_source(self.split)
        # A damaged description ends in whatever exception the place raises at which TFDS notices it.
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
            raise ClvrError(f"{self.directory}: not a dataset that TFDS can read ({reason})") from error
        if outside:
            raise ClvrError(f"{self.directory}: its description names shards elsewhere ({shown(str(outside[0]))})")
        if absent:
            raise ClvrError(f"{absent[0]}: this shard of the dataset is missing; copy or write the dataset again")
        assert source is not None
        return source

    def __reduce__(self) -> tuple[type["TrajectoryDataset"], tuple[Path, str]]:
        return TrajectoryDataset, (self.directory, self.split)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, number: int) -> TrajectoryRecord:
        """Returns record `number`, from 0. Raises: IndexError past the end; CorruptRecordError if it cannot be read."""
        if not 0 <= number < len(self):
            raise IndexError(f"{self.directory}: record {number} of {len(self)}")
        try:
            return record_from_example(self._source[number])
        # The features of a dataset may be other ones than ours, whatever its name is.
        except Exception as error:
            reason = str(error).partition(";")[0].partition("\n")[0]
            raise CorruptRecordError(f"{self.directory}: record {number} cannot be read ({reason})") from error

    def scan(self, max_corrupt: int = 16) -> Iterator[tuple[int, TrajectoryRecord]]:
        """Yields all readable records with their indices, in order, and reports the number of corrupt ones on stderr.

        Raises: ClvrError after more than `max_corrupt` corrupt records.
        """
        corrupt: list[CorruptRecordError] = []
        with progress("reading trajectories", len(self)) as advance:
            for number in range(len(self)):
                try:
                    yield number, self[number]
                except CorruptRecordError as error:
                    corrupt.append(error)
                    if len(corrupt) > max_corrupt:
                        raise ClvrError(
                            f"{self.directory}: {len(corrupt)} of the first {number + 1} records are corrupt, more "
                            f"than {max_corrupt}; write the dataset again (first: {corrupt[0]})"
                        ) from error
                advance(number + 1)
        if corrupt:
            console.print(f"{self.directory}: {len(corrupt)} of {len(self)} records left out (first: {corrupt[0]})")


def _check_features(path: Path) -> None:
    """Raises ClvrError if the description names a Python class that is not of TFDS, which would import its module."""
    entries: list[JSON] = [read_object(path).content]
    while entries:
        entry = entries.pop()
        if isinstance(entry, dict):
            name = entry.get("pythonClassName", _FEATURES)
            if not (isinstance(name, str) and name.startswith(_FEATURES)):
                raise ClvrError(
                    f"{path}: pythonClassName is {shown(name)}; only classes of {_FEATURES[:-1]} are loaded"
                )
            entries += entry.values()
        elif isinstance(entry, list):
            entries += entry


def _length(split: JsonObject) -> int:
    """Returns the number of records of a split, whose shards have their lengths as texts."""
    lengths = split.texts("shardLengths") if "shardLengths" in split.content else ()
    if wrong := [each for each in lengths if not re.fullmatch(r"\d{1,15}", each, re.ASCII)]:
        raise ClvrError(f"{split.where}: shardLengths must be numbers of records, got {shown(wrong[0])}")
    return sum(map(int, lengths))


def saved_trajectories(directory: Path) -> Iterator[TrajectoryRecord]:
    """Yields the trajectories that are saved in subdirectories, sorted by name. Raises: ClvrError if there is none."""
    paths = sorted(directory.glob("*/trajectory.json"))
    if not paths:
        raise ClvrError(f"{directory}: no saved trajectories in its subdirectories")
    for path in paths:
        yield TrajectoryRecord(path.parent.name, Trajectory.load(path.parent))


def main(source: Path, out: Path) -> None:
    """Packs saved trajectories into a dataset.

    Args:
      source: Directory that contains the saved trajectories.
      out: Write the dataset to this directory.
    """
    print(f"{out}: {write_dataset(out, saved_trajectories(source)):,} trajectories")


if __name__ == "__main__":
    run_script(main)

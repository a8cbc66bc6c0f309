"""A run of RL in a bucket has the files of one on a disk."""

import json

import numpy as np
import pytest

from clvr_jax.rl import fit
from tests.rl.pprl_toy import changed, make_task

pytestmark = pytest.mark.slow


def rows(content):
    """Metrics without what a clock says."""
    found = [json.loads(line) for line in content.decode().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("seconds")} for row in found]


def test_a_run_that_is_stopped_and_resumed_in_a_bucket_equals_one_on_a_disk(bucket, dataset, tmp_path):
    config = changed(epochs=2, grid_every=1)
    fit(make_task(dataset, config), config, tmp_path)
    fit(make_task(dataset, config), config, "gs://runs/rl", stop_after=1)
    fit(make_task(dataset, config), config, "gs://runs/rl", resume=True)
    found = {name.removeprefix("rl/"): content for name, content in bucket.objects("rl/").items()}
    expected = {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    same = [name for name in expected if name.startswith("samples/") or name == "begun.json"]
    assert len(same) == 3
    assert [found[name] for name in same] == [expected[name] for name in same]
    assert rows(found["metrics.jsonl"]) == rows(expected["metrics.jsonl"])
    (tmp_path / "found.npz").write_bytes(found["export/weights.npz"])
    weights = [np.load(tmp_path / name) for name in ("found.npz", "export/weights.npz")]
    for name in weights[1]:
        assert np.array_equal(weights[0][name], weights[1][name])
    assert "export/commit_success.txt" in found

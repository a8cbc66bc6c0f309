"""The journal of a directory that is created tensor by tensor."""

import json

from clvr_jax.checkpoint_io.journal import Journal


def test_a_record_that_was_cut_is_dropped_and_the_next_one_is_not_added_to_it(tmp_path):
    path = tmp_path / "journal"
    Journal(path, "conversion", "identity").add("a", 1)
    with path.open("a") as file:
        file.write('["b", ')  # the power was cut during the write
    resumed = Journal(path, "conversion", "identity")
    assert resumed.done == {"a": 1}
    resumed.add("c", [2])
    assert Journal(path, "conversion", "identity").done == {"a": 1, "c": [2]}
    assert [json.loads(line) for line in path.read_text().splitlines()[1:]] == [["a", 1], ["c", [2]]]

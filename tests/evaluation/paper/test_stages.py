import pytest

from clvr_jax.evaluation.paper.stages import Stages, digest


def writes(text, times):
    def make(folder):
        folder.mkdir(exist_ok=True)
        (folder / "result.txt").write_text(text)
        times.append(text)

    return make


def test_a_stage_is_made_once_for_the_same_inputs_also_by_another_run(tmp_path):
    times = []
    first = Stages(tmp_path).directory("draw", {"seed": 0, "sizes": (1, 2)}, writes("a", times))
    again = Stages(tmp_path).directory("draw", {"sizes": [1, 2], "seed": 0}, writes("b", times))
    assert first == again
    assert (first / "result.txt").read_text() == "a"
    other = Stages(tmp_path).directory("draw", {"seed": 1, "sizes": (1, 2)}, writes("c", times))
    assert other != first
    assert times == ["a", "c"]


def test_a_stage_that_failed_or_whose_folder_is_gone_is_made_again(tmp_path):
    stages, times = Stages(tmp_path), []

    def fail(folder):
        folder.mkdir()
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        stages.directory("draw", {}, fail)
    assert "draw" not in stages.seconds
    folder = stages.directory("draw", {}, writes("a", times))  # and meets what was left
    (folder / "result.txt").unlink()
    folder.rmdir()
    stages.directory("draw", {}, writes("b", times))
    assert times == ["a", "b"]
    assert stages.seconds["draw"] >= 0


def test_a_digest_is_of_names_and_bytes_but_not_of_the_card(tmp_path):
    (tmp_path / "vae").mkdir()
    weights = tmp_path / "vae" / "w"
    weights.write_bytes(b"12")
    (tmp_path / "README.md").write_text("a")
    before = digest(tmp_path)
    (tmp_path / "README.md").write_text("b")
    assert digest(tmp_path) == before
    weights.write_bytes(b"13")
    assert digest(tmp_path) != before
    weights.write_bytes(b"12")
    weights.rename(tmp_path / "vae" / "v")
    assert digest(tmp_path) != before

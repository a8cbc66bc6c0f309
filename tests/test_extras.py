"""Sampling needs no package of the extra `train`, and a run that needs one says so in one line."""

import subprocess
import sys

import pytest

from clvr_jax.errors import ClvrError
from clvr_jax.training_packages import training_package

TRAINING_PACKAGES = ("grain", "tensorflow_datasets", "array_record")
SAMPLING = """
import sys

sys.modules.update(dict.fromkeys({packages}))  # as if they were not installed
import clvr_jax
from clvr_jax.cli import main

for name in clvr_jax.__all__:
    getattr(clvr_jax, name)
import clvr_jax.pipelines.loading

try:
    main(["generate", "--help"])
except SystemExit:
    pass
"""


@pytest.mark.slow
def test_the_public_names_and_clvr_generate_need_no_training_package():
    done = subprocess.run(
        [sys.executable, "-c", SAMPLING.format(packages=TRAINING_PACKAGES)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "--prompts" in done.stdout


@pytest.mark.parametrize("name", ["grain", "tensorflow_datasets", "array_record.python.array_record_module"])
def test_a_missing_package_is_named_with_the_extra(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, name.partition(".")[0], None)
    with pytest.raises(ClvrError, match=rf"need {name.partition('.')[0]}: pip install 'clvr-jax\[train\]'"):
        training_package(name)


def test_a_package_that_is_installed_but_lacks_another_is_not_reported_as_missing(tmp_path, monkeypatch):
    (tmp_path / "half_installed.py").write_text("import a_package_that_is_absent")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_absent"):
        training_package("half_installed")

"""Packages of the extra `train`, imported on first use: sampling does not need them, and they are slow to import."""

import importlib
from types import ModuleType

from clvr_jax.errors import ClvrError


def training_package(name: str) -> ModuleType:
    """Imports a module of Grain, TensorFlow Datasets or array_record.

    Raises: ClvrError if it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        if error.name is None or package != error.name.partition(".")[0]:
            raise  # the package is installed, but not one that it needs
        raise ClvrError(f"datasets of trajectories need {package}: pip install 'clvr-jax[train]'") from error

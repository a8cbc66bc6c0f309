"""The recipe of `line_recipe`, whose run stops, with a checkpoint, after the step that the environment names."""

import functools
import os

from clvr_jax.training import trainer
from tests.training.line_recipe import CONFIG, task  # noqa: F401

fit = functools.partial(trainer.fit, stop_after=int(os.environ["STOP_AFTER"]))

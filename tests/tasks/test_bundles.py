"""A task is the same program with loaded models and with shapes: what `clvr plan` compiles is what trains."""

import dataclasses

import jax
import pytest

from clvr_jax.convert.architectures import QWEN3_VL
from clvr_jax.pipelines.flux2 import KLEIN
from clvr_jax.pipelines.qwen3_vl import Qwen3VLPipeline
from clvr_jax.pipelines.registry import SHIPPED
from clvr_jax.tasks import flux2, qwen3_vl
from clvr_jax.tasks.bundles import ModelBundle, no_export
from clvr_jax.tasks.flux2 import models as flux2_models
from clvr_jax.training.trainer import TrainConfig
from tests.helpers.models import small_flux2

TRAIN = TrainConfig(compute_dtype="float32")


def shapes(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def program(task):
    """The loss and its gradient as StableHLO, and the FLOPs and tokens of a batch."""
    batch = task.batches(0)
    step = jax.jit(jax.value_and_grad(task.loss, has_aux=True))
    text = step.lower(shapes(task.params), shapes(task.frozen), batch, jax.random.key(0)).as_text()
    return text, task.flops(batch), task.hardware_flops(batch), task.tokens(batch)


def flux2_tasks(monkeypatch):
    pipe = small_flux2("shapes-tiny-sft")
    monkeypatch.setitem(KLEIN, "klein-4b", (pipe.transformer.config, pipe.text_encoder.config))
    monkeypatch.setattr(flux2_models, "AutoencoderKLFlux2Config", lambda: pipe.vae.config)
    monkeypatch.setattr(flux2_models, "Flux2Settings", lambda: pipe.settings)
    bundles = flux2.Flux2Models.of(pipe), flux2.Flux2Models.abstract("klein-4b", "float32")
    batches = bundles[1].abstract_batches(2, 64, 1)
    return [flux2.sft_task(models, flux2.FlowMatchingConfig(), TRAIN, batches, no_export) for models in bundles]


def qwen3_vl_tasks(monkeypatch):
    pipe = Qwen3VLPipeline.from_pretrained(SHIPPED / "shapes-tiny" / "controller", "float32")
    sizes = pipe.model.config
    config = qwen3_vl.ConversationConfig(batch_size=2, text=32, learned=8, images=1, size=64)
    batches = qwen3_vl.abstract_conversations(sizes, config)
    bundles = ModelBundle.of(pipe.model), ModelBundle.abstract(QWEN3_VL, sizes, "float32")
    return [qwen3_vl.sft_task(model, config, TRAIN, batches) for model in bundles]


@pytest.mark.slow
@pytest.mark.parametrize("make_tasks", [flux2_tasks, qwen3_vl_tasks])
def test_loaded_models_and_shapes_give_one_program(monkeypatch, make_tasks):
    loaded, abstract = make_tasks(monkeypatch)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves((loaded.params, loaded.frozen)))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves((abstract.params, abstract.frozen)))
    assert shapes(loaded.params) == shapes(abstract.params)
    assert program(loaded) == program(abstract)


@pytest.mark.slow
def test_other_options_give_another_program(monkeypatch):
    """The control: the comparison sees an option that changes the program and not its shapes."""
    _, task = flux2_tasks(monkeypatch)
    changed = flux2.sft_task(
        flux2.Flux2Models.abstract("klein-4b", "float32"),
        dataclasses.replace(flux2.FlowMatchingConfig(), shift=1.0),
        TRAIN,
        task.batches,
        no_export,
    )
    assert program(changed)[0] != program(task)[0]

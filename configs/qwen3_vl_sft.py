"""Full-parameter fine-tuning of the controller, Qwen3-VL, on verified trajectories: it learns the replies of the
assistant.

clvr train configs/qwen3_vl_sft.py --model Qwen/Qwen3-VL-8B-Instruct --dataset data/trajectories

A trajectory is one conversation with all its images; the verdicts on wrong images and the corrections are learned, too.
If the dataset has verification examples (`clvr synth` makes them), the verdict of each is learned as well. The paper
does not give the controller's learning rate; 1e-5 is usual for models of this size. The vision tower is frozen unless
`train_vision` is set.

Never run on the real weights: there was no accelerator. The tests run it on the controller of `shapes-tiny`, a model of
the same class, and trace the step of the full sizes.
"""

import dataclasses
from pathlib import Path

from clvr_jax.arguments import StoragePath
from clvr_jax.convert.architectures import QWEN3_VL
from clvr_jax.sharding import MeshConfig
from clvr_jax.tasks import qwen3_vl
from clvr_jax.tasks.bundles import ModelBundle, check_model_given
from clvr_jax.training.checkpoint import CheckpointConfig
from clvr_jax.training.trainer import Task, TrainConfig


@dataclasses.dataclass(frozen=True)
class Config(qwen3_vl.ConversationConfig):
    """Configuration of the run, and of what `clvr plan` compiles."""

    train: TrainConfig = TrainConfig(
        steps=2000,
        learning_rate=1e-5,
        b2=0.999,
        warmup=0.05,
        ema_decay=0.99,
        compute_dtype="bfloat16",
        mesh=MeshConfig(fsdp=-1),
        checkpoint=CheckpointConfig(save_interval_minutes=20),
    )
    """Configuration of the training."""
    dataset: StoragePath = Path("data/trajectories")
    """Train on this dataset of trajectories, a directory that `clvr synth` wrote, also in a bucket."""
    verification: bool = True
    """Train on the verification examples of the dataset as well, if it has any."""


CONFIG = Config()


def task(config: Config) -> Task:
    """Returns the task for the trainer."""
    check_model_given("qwen3_vl_sft", config.model, "Qwen3-VL")
    pipe = qwen3_vl.load_controller(config.model)
    batches = qwen3_vl.conversation_batches(
        pipe, config.dataset, config.batch_size, config.train.seed, verification=config.verification
    )
    return qwen3_vl.sft_task(ModelBundle.of(pipe.model), config, config.train, batches, pipe)


def abstract_task(config: Config) -> Task:
    """Returns the same task with shapes in place of arrays, to trace, compile and plan its step."""
    model_config = qwen3_vl.PRESETS[config.preset]
    batches = qwen3_vl.abstract_conversations(model_config, config)
    model = ModelBundle.abstract(QWEN3_VL, model_config, "float32")
    return qwen3_vl.sft_task(model, config, config.train, batches)

"""PPRL of a policy that is one matrix, on real trajectory steps: everything of the loop, at no cost."""

import dataclasses
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from clvr_jax.data.engine.engine import synthesize
from clvr_jax.data.engine.roles.shapes import make_shapes_roles
from clvr_jax.data.trajectories.dataset import TrajectoryDataset, write_dataset
from clvr_jax.data.trajectories.proxy_steps import ProxySteps
from clvr_jax.diffusion import FlowProcess, euler_solve
from clvr_jax.models.common.lora import LoRAConfig
from clvr_jax.pipelines.qwen3_vl import Qwen3VLPipeline
from clvr_jax.providers.local import MeshChatModel
from clvr_jax.rewards import MeshReward, Reward, Score, Scores, UnifiedReward, UnifiedRewardEdit
from clvr_jax.rl import DiffusionPolicy, PPRLConfig, PPRLTask
from clvr_jax.sharding import MeshConfig
from clvr_jax.training.checkpoint import CheckpointConfig
from clvr_jax.training.optimization.optimizer import AdamWConfig
from tests.data.engine.test_engine import ExactGenerator, item

TOKENS, CHANNELS, SIDE = 4, 6, 4
SIGMAS = np.array([1.0, 0.8, 0.5, 0.2, 0.0], np.float32)

CONFIG = PPRLConfig(
    epochs=4,
    prompts_per_epoch=6,
    group_size=8,
    updates_per_epoch=2,
    timesteps_per_sample=2,
    optimizer=AdamWConfig(learning_rate=3e-3),
    lora=LoRAConfig(rank=3, alpha=3.0),
    grid_every=2,
    checkpoint=CheckpointConfig(save_interval_minutes=100.0),
    mesh=MeshConfig(devices=1),
)


def make_dataset(folder, count=12):
    """Trajectories of the data engine, with proxy prompts."""
    made = (
        synthesize(item(n), make_shapes_roles(item(n), judges=0), ExactGenerator(), seed=n).record for n in range(count)
    )
    write_dataset(folder, made)
    return folder


class Brightness(Reward):
    """Likes bright pictures; some are spoiled by their place among all that were ever judged."""

    def __init__(self, spoil=lambda case, value: value):
        self.spoil, self.cases = spoil, []

    def scores(self, cases):
        self.cases += cases
        values = np.array([self.spoil(case, float(np.mean(case.image)) / 255) for case in cases])
        return Scores(values, {"brightness": values})


def _weighed(judge_prompt):
    """A mark for whatever is said: a model that knows nothing says nothing that UnifiedReward would read."""

    def read(answers):
        return Score(sum(zlib.crc32(answer.encode()) for answer in answers) % 1000 / 1000)

    return dataclasses.replace(judge_prompt, read=read)


class _Pictures(UnifiedReward):
    def judge_prompt(self, *given):
        return _weighed(super().judge_prompt(*given))


class _Edits(UnifiedRewardEdit):
    def judge_prompt(self, *given):
        return _weighed(super().judge_prompt(*given))


def judged_on_the_mesh(folder):
    """Both judges are a Qwen3-VL of a folder, on the active layout."""
    model = MeshChatModel(Qwen3VLPipeline.from_pretrained(folder), "judge", batch=8)
    return MeshReward(_Pictures(model, max_tokens=4), _Edits(model, max_tokens=4))


def toy_policy():
    """Velocity = tokens @ (kernel of the input and of the step's condition)."""

    def encode_conditions(frozen, data):
        return {"c": data["c"] * frozen["scale"]}

    def predictor(weights, conditions):
        def velocity(x, t_b):
            at = jnp.tanh(t_b)[:, None, None] + conditions["c"][:, None, :]
            return x @ weights["inner"]["kernel"] + at @ weights["outer"]["kernel"]

        return velocity

    def solve(predictor, noise):
        return euler_solve(lambda x, sigma: predictor(x, jnp.full(len(x), sigma)), noise, jnp.asarray(SIGMAS))

    def decode(frozen, latents):
        grey = jax.nn.sigmoid(latents.mean(-1)).reshape(-1, 2, 2, 1)
        return jnp.tile(jnp.repeat(jnp.repeat(grey, 2, 1), 2, 2), (1, 1, 1, 3))

    return DiffusionPolicy(encode_conditions, predictor, solve, decode, (TOKENS, CHANNELS), SIGMAS[:-1], FlowProcess())


def make_task(dataset, config=CONFIG, reward=None):
    """The task; its buckets are the numbers of references, as those of a real one."""
    rng = np.random.default_rng(0)
    base = {
        name: {"kernel": jnp.asarray(0.3 * rng.normal(size=(CHANNELS, CHANNELS)), jnp.float32)}
        for name in ("inner", "outer")
    }

    def data(steps):
        return {"c": np.stack([np.random.default_rng(s.number).normal(size=CHANNELS) for s in steps]).astype("f")}

    def save(weights, trained, folder):
        folder.mkdir(parents=True)
        np.savez(folder / "weights.npz", **{name: leaf["kernel"] for name, leaf in weights.items()})

    steps = ProxySteps(TrajectoryDataset(dataset), SIDE)
    return PPRLTask(
        name="toy",
        config=config,
        base=base,
        frozen={"scale": jnp.float32(0.5)},
        policy=toy_policy(),
        steps=steps,
        data=data,
        bucket=lambda step: len(step.history),
        reward=reward or Brightness(),
        save=save,
    )


def changed(**options):
    """The configuration with changes; a dictionary changes fields of a configuration that it contains."""
    inner = {
        name: dataclasses.replace(getattr(CONFIG, name), **value)
        for name, value in options.items()
        if isinstance(value, dict)
    }
    return dataclasses.replace(CONFIG, **options | inner)

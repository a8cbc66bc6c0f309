"""The recipes of the shapes world: their batches are functions of the step, and their losses can be learned from."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from clvr_jax.configs import shapes_base, shapes_controller, shapes_sft, shapes_text_encoder
from clvr_jax.data.preprocessing.text import load_tokenizer
from clvr_jax.data.shapes import planned_example, simulate_trajectory
from clvr_jax.data.trajectories.dataset import write_dataset
from clvr_jax.data.trajectories.record import TrajectoryRecord
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.pipelines.flux2 import Flux2Pipeline
from clvr_jax.pipelines.qwen3_vl import Qwen3VLPipeline
from clvr_jax.pipelines.registry import SHIPPED
from clvr_jax.reasoning.conversation.context import chat_messages, conditioning_text
from clvr_jax.reasoning.trajectories.trajectory import Step, Trajectory
from clvr_jax.scripts import shapes_assemble, shapes_rollouts
from clvr_jax.sharding import MeshConfig
from clvr_jax.tasks.shapes import SETTINGS, Kind, recorded_examples, recorded_kinds
from clvr_jax.tasks.shapes.controller import clarity_loss
from clvr_jax.tasks.shapes.controller_batches import KINDS, ControllerBatches, labeled_images
from clvr_jax.tasks.shapes.sft import STEPS, step_example
from clvr_jax.tasks.shapes.text_encoder import contents, text_batch
from clvr_jax.training.trainer import TrainConfig, TrainState, fit, make_train_step
from clvr_jax.worlds.shapes.detect import detect
from clvr_jax.worlds.shapes.prompts import train_prompt
from clvr_jax.worlds.shapes.render import render
from clvr_jax.worlds.shapes.requirements import describe
from clvr_jax.worlds.shapes.scene import COLORS, Scene, place

ONE_DEVICE = MeshConfig(devices=1)
SOME_OPTIMIZATIONS = {"xla_backend_optimization_level": 1}

PARTS = {"vae": SHIPPED / "shapes-tiny" / "vae", "tokenizer": SHIPPED / "shapes-tiny" / "tokenizer"}
# One optimizer step is enough to go through everything a recipe does.
ONE = TrainConfig(steps=1, log_every=1, mesh=ONE_DEVICE)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The export of a base run of one step."""
    text, out = tmp_path_factory.mktemp("text_encoder"), tmp_path_factory.mktemp("base")
    config = dataclasses.replace(shapes_text_encoder.CONFIG, train=ONE, tokenizer=PARTS["tokenizer"])
    fit(shapes_text_encoder.task(config), ONE, text)
    begun = text / "export" / "text_encoder"
    config = dataclasses.replace(shapes_base.CONFIG, train=ONE, text_encoder=begun, **PARTS)
    fit(shapes_base.task(config), ONE, out)
    return out / "export"


@pytest.mark.slow
def test_the_text_encoder_learns_to_read_what_a_text_asks_for():
    train = TrainConfig(steps=140, learning_rate=2.5e-3, b2=0.98, warmup=0.1, mesh=ONE_DEVICE)
    config = dataclasses.replace(shapes_text_encoder.CONFIG, train=train, tokenizer=PARTS["tokenizer"])
    task = shapes_text_encoder.task(config)
    kinds = (Kind(1.0, 16, planned_example),)
    tokenizer = load_tokenizer(PARTS["tokenizer"])
    optimizer = train.optimizer()
    state = TrainState.create(task.params, optimizer)
    train_step = make_train_step(task.loss, optimizer, train)
    # Some ninety steps: all optimizations would cost more than they save.
    train_step = train_step.lower(state, task.frozen, text_batch(0, 0, tokenizer, kinds)).compile(SOME_OPTIMIZATIONS)
    accuracies: list[float] = []
    # Of two or three objects with the right colors and shapes, a guess of who is where names half at best.
    while not np.mean(accuracies[-5:] or 0) > 0.6:
        assert len(accuracies) < train.steps, accuracies
        state, metrics = train_step(state, task.frozen, text_batch(len(accuracies), 0, tokenizer, kinds))
        accuracies.append(float(metrics["object_accuracy"]))


def test_the_contents_of_a_picture_are_those_of_its_scene():
    scene = Scene((place("red", "star", "top", np.random.default_rng(0)),))
    expected = np.zeros((9, 2), np.int32)
    expected[1] = 1, 4  # the first color, the fourth shape
    assert np.array_equal(contents(render(scene)), expected)


@pytest.mark.slow
def test_sft_changes_the_transformer_and_nothing_else(base, tmp_path):
    fit(shapes_sft.task(dataclasses.replace(shapes_sft.CONFIG, train=ONE, base=str(base))), ONE, tmp_path / "run")
    before, after = (Flux2Pipeline.from_pretrained(str(folder)) for folder in (base, tmp_path / "run" / "export"))
    assert after.settings == before.settings == SETTINGS
    for part in ("vae/diffusion_pytorch_model", "text_encoder/model"):
        file = f"{part}.safetensors"
        assert (base / file).read_bytes() == (tmp_path / "run" / "export" / file).read_bytes()
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (base / weights).read_bytes() != (tmp_path / "run" / "export" / weights).read_bytes()


@pytest.fixture(scope="module")
def generated_images(tmp_path_factory):
    """A file of images as `shapes_images` writes it: right ones, and one with a pair that training must not see."""
    path = tmp_path_factory.mktemp("images") / "images.npz"
    rng = np.random.default_rng(0)
    scenes = [Scene((place(color, "star", "top", rng),)) for color in ("red", "blue", "purple")]
    np.savez_compressed(path, one_shot=np.stack([render(scene) for scene in scenes]))
    return path


SMALL = {"image_batch": 2, "comparison_batch": 2, "prompt_batch": 2, "conversation_batch": 2}


@pytest.mark.slow
def test_the_controller_learns_and_its_folder_chats(tmp_path, generated_images):
    train = dataclasses.replace(ONE, steps=8, learning_rate=3e-3)
    config = dataclasses.replace(shapes_controller.CONFIG, train=train, images=generated_images, **SMALL, **PARTS)
    task = shapes_controller.task(config)
    batch = task.batches(KINDS.index("conversation"))
    fit(dataclasses.replace(task, batches=lambda step: batch), train, tmp_path)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").open()]
    assert losses[-1] < 0.7 * losses[0]  # the same batch eight times
    assert json.loads((tmp_path / "export" / "clvr.json").read_text()) == {"contract": "loop"}
    chat = Qwen3VLPipeline.from_pretrained(tmp_path / "export")
    reply = chat.chat(chat_messages("a red circle", ["Plan: x.<|image_gen|>"], 1), [np.zeros((64, 64, 3), np.uint8)], 4)
    assert len(chat.tokenizer(reply)["input_ids"]) <= 4
    config = tmp_path / "export" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "image_token_id": 5}))
    with pytest.raises(ClvrError, match="belong to different checkpoints"):
        Qwen3VLPipeline.from_pretrained(tmp_path / "export")


@pytest.mark.slow
def test_a_deepened_vision_tower_learns_alone(tmp_path, generated_images):
    controller = SHIPPED / "shapes-tiny" / "controller"
    config = dataclasses.replace(
        shapes_controller.CONFIG,
        train=dataclasses.replace(ONE, steps=2),
        images=generated_images,
        start=controller,
        trained="vision",
        deepen_vision=True,
        kinds=("image",),
        **SMALL,
        **PARTS,
    )
    fit(shapes_controller.task(config), config.train, tmp_path)
    before, after = (load_file(path / "model.safetensors") for path in (controller, tmp_path / "export"))
    blocks = {int(name.split(".")[3]) for name in after if name.startswith("model.visual.blocks.")}
    assert blocks == set(range(2 * json.loads((controller / "config.json").read_text())["vision_config"]["depth"]))
    fixed = {name for name in before if not name.startswith("model.visual.")}
    assert fixed
    for name in fixed:
        np.testing.assert_array_equal(after[name], before[name])
    assert not np.array_equal(
        after["model.visual.patch_embed.proj.weight"], before["model.visual.patch_embed.proj.weight"]
    )


@pytest.mark.slow
def test_the_vision_tower_learns_how_clear_objects_are(tmp_path, generated_images):
    train = dataclasses.replace(ONE, steps=8, learning_rate=3e-3)
    config = dataclasses.replace(
        shapes_controller.CONFIG,
        train=train,
        images=generated_images,
        start=SHIPPED / "shapes-tiny" / "controller",
        trained="vision",
        kinds=("clarity",),
        clarity_batch=4,
        **SMALL,
        **PARTS,
    )
    task = shapes_controller.task(config)
    batch = task.batches(0)
    fit(dataclasses.replace(task, batches=lambda step: batch), train, tmp_path)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").open()]
    assert losses[-1] < 0.7 * losses[0]  # the same batch eight times


@pytest.mark.slow
def test_the_loss_of_clarity_is_of_present_objects_and_its_metric_of_their_border():
    wanted = jnp.asarray([[[1.0, 2.0, 0.5], [1.0, 2.0, -0.5], [0.0, 0.0, 0.0]]])
    right = jnp.asarray([[[20.0, 2.0, 0.5], [20.0, 2.0, -0.5], [-20.0, 3.0, 3.0]]])
    loss, metrics = clarity_loss(right, wanted)
    assert loss < 1e-6  # nothing is asked of the margins of an empty cell
    assert metrics["clarity_accuracy"] == 1
    swapped, metrics = clarity_loss(right[:, jnp.asarray([1, 0, 2])], wanted)
    assert swapped > 0.4
    assert metrics["clarity_accuracy"] == 0
    unknown, _ = clarity_loss(right.at[..., 1].add(2), wanted.at[..., 1].set(jnp.nan))
    assert unknown < 1e-6  # nothing is asked of margins that are not known


@pytest.mark.parametrize(
    ("trained", "kinds", "said"),
    [
        ("vision", KINDS, "batches of comparison and prompt have no images"),
        ("language", ("prompt", "clarity"), "batches of clarity teach the vision tower alone"),
    ],
)
def test_batches_that_would_teach_nothing_are_refused(trained, kinds, said):
    config = dataclasses.replace(shapes_controller.CONFIG, trained=trained, kinds=kinds, **PARTS)
    with pytest.raises(UsageError, match=said):
        shapes_controller.task(config)


def test_vision_and_language_are_two_parts_of_all_weights():
    start = SHIPPED / "shapes-tiny" / "controller"
    config = dataclasses.replace(shapes_controller.CONFIG, kinds=("image",), start=start, **PARTS)
    names = {
        trained: {
            jax.tree_util.keystr(path)
            for path, _ in jax.tree.leaves_with_path(
                shapes_controller.task(dataclasses.replace(config, trained=trained)).params["model"]
            )
        }
        for trained in ("all", "vision", "language")
    }
    assert names["vision"]
    assert names["language"]
    assert not names["vision"] & names["language"]
    assert names["vision"] | names["language"] == names["all"]


def controller_batches(**changes):
    config = dataclasses.replace(shapes_controller.CONFIG, vae_share=0.0, **{**SMALL, **changes})
    tokenizer = load_tokenizer(PARTS["tokenizer"])
    return ControllerBatches(config, config.train.seed, tokenizer, lambda images, seed: images), tokenizer


def test_a_controller_batch_follows_from_its_step(generated_images):
    ahead, _ = controller_batches(images=generated_images)
    _ = ahead(0)
    for step, kind in enumerate(KINDS):
        batches, _ = controller_batches(images=generated_images)
        first, again, other = batches(step), ahead(step), ahead(step + len(KINDS))
        assert jax.tree.all(jax.tree.map(np.array_equal, first, again)), kind
        width = min(first["input_ids_bt"].shape[1], other["input_ids_bt"].shape[1])
        assert not np.array_equal(first["input_ids_bt"][:, :width], other["input_ids_bt"][:, :width]), kind


def test_only_color_words_of_descriptions_are_corrupted_and_never_the_targets(generated_images):
    batches, tokenizer = controller_batches(images=generated_images, image_batch=64)
    colors = {tokenizer.encode(f" {color}")[0] for color in COLORS}
    changed = 0
    for step, kind in enumerate(KINDS):
        batch = batches(step)
        differs = batch["input_ids_bt"] != batch["target_ids_bt"]
        assert kind == "image" or not differs.any()
        assert set(batch["target_ids_bt"][differs]) <= colors
        assert (batch["weights_bt"][differs] == 1).all()
        changed += differs.sum()
    assert changed


def test_images_of_held_out_pairs_are_never_learned(generated_images):
    images, readings = labeled_images(generated_images)
    assert len(images) == 2
    assert {item.color for reading in readings for item in reading.objects} == {"red", "blue"}
    with pytest.raises(ClvrError, match=r"no generated images .*; run python -m clvr_jax.scripts.shapes_images"):
        labeled_images(generated_images.parent / "none.npz")


@pytest.mark.parametrize("step", [0, 1, 3])
def test_a_step_has_all_earlier_pictures_as_references(step):
    example = step_example(np.random.default_rng(step), step)
    assert len(example.references) == step
    assert [f"<IMG_GEN_{number}>" in example.text for number in range(1, 9)] == [n < step for n in range(8)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Trajectories of one and of two drawings."""
    pictures = [np.full((64, 64, 3), value, np.uint8) for value in (10, 20)]
    generated = [Step(f"Draw {n}. ", "<|image_gen|>", tuple(range(n)), picture) for n, picture in enumerate(pictures)]
    stop = Step("Unmet: nothing. ", "<|terminate|>")
    told = [Trajectory(f"prompt {n}", (*generated[:n], stop), "accepted", "m", 0, {}, 0.0) for n in (1, 2)]
    folder = tmp_path_factory.mktemp("data") / "dataset"
    write_dataset(folder, told)
    return folder


def test_the_drawer_learns_the_drawings_of_a_dataset_each_from_trajectories_that_have_it(dataset):
    tokenizer = load_tokenizer(SHIPPED / "shapes-tiny" / "tokenizer")
    first, second = recorded_kinds(recorded_examples(dataset, tokenizer))[1:]
    rng = np.random.default_rng(0)
    assert {first.example(rng).text for _ in range(20)} == {
        conditioning_text(f"prompt {n}", ["Draw 0. <|image_gen|>"]) for n in (1, 2)
    }
    example = second.example(rng)
    assert example.text == conditioning_text("prompt 2", ["Draw 0. <|image_gen|>", "Draw 1. <|image_gen|>"])
    assert [int(picture.mean()) for picture in (*example.references, example.target)] == [10, 20]
    assert [kind.share for kind in (first, second)] == [share for share, _ in STEPS[:2]]


def test_the_controller_learns_the_conversations_of_a_dataset(tmp_path):
    rng = np.random.default_rng(0)
    metadata = train_prompt(rng, {"complex": 1.0})
    told = simulate_trajectory(rng, metadata, error_rate=1.0, max_steps=2)
    steps = [
        Step(reply.removesuffix("<|image_gen|>"), "<|image_gen|>", tuple(range(number)), image)
        for number, (reply, image) in enumerate(zip(told.replies, told.canvases, strict=False))
    ]
    trajectory = Trajectory(metadata["prompt"], tuple(steps), "step limit", "m", 0, {}, 0.0)
    write_dataset(tmp_path / "dataset", [TrajectoryRecord("a", trajectory, metadata)])
    batches, tokenizer = controller_batches(dataset=tmp_path / "dataset")
    batch = batches(KINDS.index("conversation"))
    said = tokenizer.decode(batch["target_ids_bt"][0][batch["weights_bt"][0] > 0])
    assert said == f"{told.replies[1]}<|im_end|>"
    read = tokenizer.decode(batch["target_ids_bt"][0])
    assert describe(detect(told.canvases[0])) + " Unmet: " in read


def test_assembling_names_what_is_missing(tmp_path):
    with pytest.raises(ClvrError, match="no such directory; train it first"):
        shapes_assemble.main(tmp_path / "out", *(tmp_path / name for name in ("merged", "base", "sft", "controller")))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_assembled_folder_holds_three_transformers_each_with_its_settings(tmp_path):
    pipe = Flux2Pipeline.from_pretrained("shapes-tiny-base")
    ways = {"merged": (True, 4, 1.0, "loop"), "base": (False, 20, 2.0, "none"), "sft": (False, 24, 3.0, "loop")}
    weights = jax.tree.map(jnp.copy, nnx.state(pipe.transformer))
    fields = ("is_distilled", "num_inference_steps", "guidance_scale", "reference_cache")
    for number, (name, values) in enumerate(ways.items()):
        pipe.settings = dataclasses.replace(pipe.settings, **dict(zip(fields, values, strict=True)))
        nnx.update(pipe.transformer, jax.tree.map(lambda leaf, number=number: (1 + number) * leaf, weights))
        pipe.save_pretrained(str(tmp_path / name))
    (tmp_path / "controller").mkdir()
    (tmp_path / "controller" / "w").write_text("seen")
    shapes_assemble.main(tmp_path / "out", *(tmp_path / name for name in ("merged", "base", "sft", "controller")))
    assert (tmp_path / "out" / "controller" / "w").read_text() == "seen"
    found = {}
    for number, (name, folder) in enumerate(
        {"merged": "transformer", "base": "transformer_base", "sft": "transformer_sft"}.items()
    ):
        made = Flux2Pipeline.from_pretrained(str(tmp_path / "out"), transformer=folder)
        found[name] = tuple(getattr(made.settings, field) for field in fields)
        for leaf, original in zip(*map(jax.tree.leaves, (nnx.state(made.transformer), weights)), strict=True):
            np.testing.assert_allclose(leaf, (1 + number) * original, rtol=1e-3, atol=1e-6)
    assert found == ways


def test_trajectories_of_two_models_do_not_mix(tmp_path):
    (tmp_path / "rollouts.json").write_text('{"model": "other", "seed": 1}')
    with pytest.raises(UsageError, match="holds trajectories of"):
        shapes_rollouts.main(tmp_path, model="runs/shapes_sft/export")

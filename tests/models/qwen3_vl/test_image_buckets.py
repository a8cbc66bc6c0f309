"""Images of any size have few shapes, and are computed as images of static grids and of the reference are."""

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from clvr_jax.errors import ClvrError
from clvr_jax.models.common import decoding
from clvr_jax.models.common.decoding import generate
from clvr_jax.models.qwen3_vl.image_buckets import bucket_conversations, bucket_images, bucket_of, size_classes
from clvr_jax.models.qwen3_vl.positions import Conversation
from tests.models.parity import TOLERANCE, relative_error
from tests.models.qwen3_vl.reference import SMALL, conversation, make_pair, reference_inputs

MERGE = SMALL.vision.spatial_merge_size
PLACES = {"image_token_id": SMALL.image_token_id, "merge": MERGE}
MIXED = [((1, 8, 8), (1, 2, 4), (1, 6, 10)), (), ((1, 4, 2), (1, 14, 18))]


@pytest.fixture(scope="module")
def pair():
    return make_pair()


def conversations_of(grids, seed=7, text=9):
    rng = np.random.default_rng(seed)
    return [Conversation(*conversation(rng, own, text), own) for own in grids]


@pytest.mark.slow
def test_conversations_with_images_of_any_size_equal_the_reference(pair):
    model, reference = pair
    conversations = conversations_of(MIXED)
    batch = bucket_conversations(conversations, **PLACES)
    # 252 patches; 64 and 60; 8 and 8.
    assert [values.shape[:2] for values in batch["pixel_values"].pixel_values] == [(6, 256), (6, 64), (6, 16)]
    graphdef, state = nnx.split(model)
    logits = jax.jit(lambda state, batch: nnx.merge(graphdef, state)(**batch))(state, batch)
    patches = np.concatenate([own.pixel_values for own in conversations if own.grid_thw])
    inputs = reference_inputs(batch["input_ids_bt"], patches, sum(MIXED, ()), batch["attention_mask_bt"])
    with torch.no_grad():
        expected = reference(**inputs).logits
    real = batch["attention_mask_bt"]
    assert relative_error(logits[real], expected[torch.tensor(real)]) < TOLERANCE


def test_features_are_those_of_static_grids(pair):
    """Block by block features of images that fill their bucket, and of one that does not."""
    model, _ = pair
    grids = ((1, 8, 8), (1, 6, 10))
    (own,) = conversations_of([grids])
    images = bucket_images(np.split(own.pixel_values, [64]), grids, merge=MERGE)
    graphdef, state = nnx.split(model)
    given = jax.jit(lambda state, images: nnx.merge(graphdef, state).encode_images(images))(state, images)
    static = jax.jit(lambda state, patches: nnx.merge(graphdef, state).encode_images(patches, grids))(
        state, own.pixel_values
    )
    assert given.tokens_bnd.shape[1] == 2 * 64 // MERGE**2
    for ours, expected in ((given.tokens_bnd, static.tokens_bnd), (given.deepstack_kbnd, static.deepstack_kbnd)):
        assert relative_error(ours[..., :31, :], expected) < TOLERANCE


@pytest.mark.slow
def test_a_new_image_size_compiles_nothing(pair):
    model, _ = pair

    def decoded(*grids):
        prompts = bucket_conversations(conversations_of([grids], text=20), **PLACES)
        return generate(model, prompts, max_new_tokens=2).tokens_bn

    decoded((1, 8, 8))
    compiled = decoding._generate._cache_size()
    for grid in ((1, 6, 10), (1, 10, 6), (1, 4, 16), (1, 2, 26)):
        decoded(grid)
    assert decoding._generate._cache_size() == compiled
    decoded((1, 16, 16))
    assert decoding._generate._cache_size() == compiled + 1


def test_a_second_image_and_other_sizes_have_the_shapes_of_the_program():
    def shapes(*grids):
        return jax.tree.map(
            np.shape, bucket_conversations(conversations_of([grids], text=12), **PLACES)["pixel_values"]
        )

    assert shapes((1, 8, 8)) == shapes((1, 8, 8), (1, 6, 10)) == shapes((1, 6, 8), (1, 4, 16))
    assert shapes((1, 8, 8)) != shapes((1, 8, 8), (1, 2, 2))


def test_buckets_are_few_and_at_most_an_eighth_too_large():
    numbers = range(1, 20_000)
    buckets = [bucket_of(number, 16) for number in numbers]
    assert all(0 <= bucket - number <= max(number / 8, 15) for number, bucket in zip(numbers, buckets, strict=True))
    assert buckets == sorted(buckets)
    assert all(bucket_of(bucket, 16) == bucket for bucket in buckets)
    assert len(set(buckets)) < 70
    assert [bucket_of(number, 32) for number in (0, 1, 300, 1408, 4096)] == [32, 32, 320, 1408, 4096]


def test_a_class_holds_images_of_at_least_half_its_size():
    grids = ((1, 16, 16), (1, 8, 8), (1, 12, 12), (1, 2, 2), (1, 8, 16))
    assert size_classes(grids, MERGE) == {256: [0, 2, 4], 64: [1], 16: [3]}


def test_images_with_several_frames_are_refused():
    with pytest.raises(ClvrError, match="several frames"):
        bucket_conversations(conversations_of([((2, 4, 4),)]), **PLACES)

"""With a prefix cache a pipeline replies what it replies without, whatever the conversations before were."""

import dataclasses
import math

import numpy as np
import pytest

from clvr_jax.data.shapes import simulate_trajectory
from clvr_jax.errors import UsageError
from clvr_jax.models.qwen3_vl import Qwen3VL
from clvr_jax.models.qwen3_vl.positions import part_of
from clvr_jax.pipelines.closed_loop import VLMController
from clvr_jax.pipelines.qwen3_vl import Qwen3VLPipeline
from clvr_jax.pipelines.qwen3_vl.prefix_cache import PAGE_TOKENS, PrefixCache, prefix_bucket
from clvr_jax.pipelines.registry import SHIPPED
from clvr_jax.reasoning.conversation.protocols import Conversation
from clvr_jax.reasoning.verification.verification import report
from clvr_jax.sharding import MeshConfig
from clvr_jax.worlds.shapes.detect import detect
from clvr_jax.worlds.shapes.requirements import describe
from tests.helpers.models import random_module, save_small_qwen3_vl

NEW = 12
TEXT = "a red circle left of a blue square, above two green triangles and a very small purple star on the right. "


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_small_qwen3_vl(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def plain(directory):
    return Qwen3VLPipeline.from_pretrained(directory)


@pytest.fixture
def cached(plain):
    return Qwen3VLPipeline(plain.model, plain.tokenizer, plain.image_processor, prefix_cache_gib=0.05)


def image(seed, side=64):
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)


def said(text, *, by="user", images=0):
    return {"role": by, "content": [*[{"type": "image"}] * images, {"type": "text", "text": text}]}


def rounds(count):
    """Returns a conversation of `count` replies with an image after each, and its images."""
    messages = [said(TEXT)]
    for number in range(count):
        messages += [said(f"reply {number}: {TEXT}", by="assistant"), said(f"and {number}", images=1)]
    return messages, [image(number) for number in range(count)]


def check(cached, plain, *conversations, **options):
    """Checks that both give the same replies and probabilities; returns how many tokens were not computed."""
    before = reused(cached)
    arguments = [list(each) for each in zip(*conversations, strict=True)]
    found = cached.answer_all(*arguments, NEW, top_logprobs=3, **options)
    expected = plain.answer_all(*arguments, NEW, top_logprobs=3, **options)
    for one, other in zip(found, expected, strict=True):
        assert (one.text, one.input_tokens, one.output_tokens) == (other.text, other.input_tokens, other.output_tokens)
        for token, reference in zip(one.tokens, other.tokens, strict=True):
            assert token.text == reference.text
            assert token.logprob == pytest.approx(reference.logprob, abs=1e-4)
            assert sorted(token.top.values()) == pytest.approx(sorted(reference.top.values()), abs=1e-4)
    return reused(cached) - before


def reused(cached):
    return cached._prefixes.prompt_tokens - cached._prefixes.computed_tokens


def tokens(pipeline, messages, images):
    return len(pipeline.prepare(messages, images).input_ids)


@pytest.mark.slow
def test_a_growing_conversation_and_all_kinds_of_roll_back(cached, plain):
    assert check(cached, plain, rounds(1)) == 0
    shared = tokens(plain, *rounds(1))
    messages, images = rounds(2)
    assert shared - 10 < check(cached, plain, (messages, images)) <= shared
    assert check(cached, plain, (messages, images)) >= tokens(plain, messages, images) - PAGE_TOKENS
    # An image of the same size in place of an earlier one, an earlier message, and an earlier point: from there on
    # nothing is stored.
    assert check(cached, plain, (messages, [image(7), images[1]])) < shared
    changed = [messages[0], said(TEXT.replace("red", "gray"), by="assistant"), *messages[2:]]
    assert check(cached, plain, (changed, images)) < shared
    assert check(cached, plain, rounds(1)) >= shared - PAGE_TOKENS
    assert check(cached, plain, (messages, images)) > shared
    assert check(cached, plain, (messages, images), temperature=0.8, seed=[3]) > shared


@pytest.mark.slow
def test_the_shipped_controller_replies_the_same_in_five_rounds():
    plain = Qwen3VLPipeline.from_pretrained(SHIPPED / "shapes-tiny" / "controller")
    cached = Qwen3VLPipeline(plain.model, plain.tokenizer, plain.image_processor, plain.generation, 0.01)
    rng = np.random.default_rng(0)
    sources = [source for source in (simulate_trajectory(rng) for _ in range(20)) if source.canvases][:4]
    histories = [Conversation(source.prompt) for source in sources]
    for number in range(5):
        replies = VLMController(plain, agreement_retries=0).reply(histories)
        assert VLMController(cached, agreement_retries=0).reply(histories) == replies
        histories = [
            Conversation(
                source.prompt,
                (*history.replies, reply),
                (*history.images, source.canvases[number % len(source.canvases)]),
                report=report(describe(detect(source.canvases[number % len(source.canvases)])), ["a red star"]),
            )
            for source, history, reply in zip(sources, histories, replies, strict=True)
        ]
    assert len({reply for history in histories for reply in history.replies}) > 8
    assert reused(cached) > 0.4 * cached._prefixes.prompt_tokens


@pytest.mark.slow
def test_conversations_of_different_lengths_and_without_a_prefix_share_a_call(cached, plain):
    check(cached, plain, rounds(1), ([said(TEXT * 2)], []))
    longer = [said(TEXT * 2), said("hm", by="assistant"), said(TEXT)]
    assert check(cached, plain, rounds(2), (longer, []), rounds(0)) > tokens(plain, *rounds(1)) - 10


@pytest.mark.slow
def test_questions_about_one_image_share_the_image_in_their_first_call(plain):
    processor = dataclasses.replace(plain.image_processor, max_pixels=192**2)
    plain = Qwen3VLPipeline(plain.model, plain.tokenizer, processor)
    cached = Qwen3VLPipeline(plain.model, plain.tokenizer, processor, prefix_cache_gib=0.05)
    questions = [([said(f"Required: {text}.", images=1)], [image(1, side=192)]) for text in ("red", "blue", "a circle")]
    shared = tokens(plain, *questions[0]) - 20
    assert shared > 100
    assert check(cached, plain, *questions) >= 2 * shared, "it is computed once"
    other = ([said("Required: red.", images=1)], [image(2, side=192)])
    assert check(cached, plain, other) == 0


@pytest.mark.slow
def test_memory_is_bounded_and_what_was_replaced_is_computed_again(plain):
    text = plain.model.config.text
    page_gib = 8 * PAGE_TOKENS * text.num_hidden_layers * text.num_key_value_heads * text.head_dim / 2**30
    cached = Qwen3VLPipeline(plain.model, plain.tokenizer, plain.image_processor, prefix_cache_gib=12.5 * page_gib)
    assert cached._prefixes.page_count == 12
    for conversation in (rounds(1), ([said(TEXT * 2)], []), rounds(2), rounds(1), ([said(TEXT * 2)], [])):
        check(cached, plain, conversation)
        assert cached._prefixes.used_pages <= 12
    assert cached._prefixes.used_pages == 12
    with pytest.raises(UsageError, match="hold a page"):
        PrefixCache(plain.model.config, np.float32, 0.5 * page_gib)
    for size in (-1.0, math.nan, math.inf):
        with pytest.raises(UsageError, match="finite"):
            Qwen3VLPipeline(plain.model, plain.tokenizer, plain.image_processor, prefix_cache_gib=size)


@pytest.mark.slow
def test_other_weights_have_no_prefixes(cached, plain):
    check(cached, plain, rounds(2))
    other = random_module(lambda rngs: Qwen3VL(plain.model.config, rngs=rngs), seed=1)
    reference = Qwen3VLPipeline(other, plain.tokenizer, plain.image_processor)
    cached.model = other
    assert check(cached, reference, rounds(2)) == 0
    assert check(cached, reference, rounds(2)) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"mesh": MeshConfig(tensor=2, fsdp=2, devices=4)}, {"quantize": "int8", "offload": "components"}],
    ids=["mesh", "int8 and offload"],
)
def test_a_mesh_and_stored_weights_make_no_difference(directory, options):
    reference = Qwen3VLPipeline.from_pretrained(directory, **options)
    cached = Qwen3VLPipeline.from_pretrained(directory, **options, prefix_cache_gib=0.01)
    check(cached, reference, rounds(1))
    assert check(cached, reference, rounds(2)) > 0
    if "mesh" in options:
        assert "tensor" in str(cached._prefixes._pages[0].sharding.spec)


def test_a_failure_while_storing_leaves_an_empty_cache(cached, plain):
    check(cached, plain, rounds(1))
    with pytest.raises(AttributeError):
        cached._prefixes.store(None, [(list(range(1000)), [0])])
    assert cached._prefixes.used_pages == 0
    assert check(cached, plain, rounds(1)) == 0
    assert check(cached, plain, rounds(2)) > 0


def test_symbols_tell_images_apart_and_beginnings_end_between_images(cached, plain):
    prefixes = cached._prefixes
    conversation = plain.prepare([said("x", images=2)], [image(0), image(0)])
    symbols = prefixes.symbols(conversation)
    numbers = [symbol for symbol in dict.fromkeys(symbols) if symbol < 0]
    assert len(numbers) == 1, "the same image"
    grid = dataclasses.replace(conversation, pixel_values=conversation.pixel_values + 1e-6)
    assert not {*numbers} & {*prefixes.symbols(grid)}
    first = symbols.index(numbers[0])
    places = {
        "image_token_id": plain.model.config.image_token_id,
        "merge": plain.model.config.vision.spatial_merge_size,
    }
    for end in (first, len(symbols) - 1):
        assert prefixes.symbols(part_of(conversation, 0, end, **places)) == symbols[:end]
    assert [prefix_bucket(tokens) for tokens in (1, 64, 65, 97, 129, 1000)] == [64, 64, 96, 128, 192, 1024]

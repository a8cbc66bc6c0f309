"""Our pipelines as providers: stand-ins show who is drawn with whom, the shipped model shows that it works."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.interfaces import ChatRequest, ChatResponse, ImageRequest, ProviderError, Token
from clvr_jax.providers.local import (
    LocalChatModel,
    LocalImageModel,
    MeshChatModel,
    without_thought,
)
from tests.providers.server import picture


def question(text: str, **fields: Any) -> ChatRequest:
    return ChatRequest([{"role": "user", "content": text}], **fields)


class EchoChat:
    """Answers with the last text and the settings; one token a word. `calls`: conversations of each call."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def tokenizer(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": list(range(len(text.split())))}

    def prepare(self, messages: Any, images: Any) -> Any:
        if "unreadable" in messages[-1]["content"]:
            raise UsageError("no such chat")
        return SimpleNamespace(input_ids=self.tokenizer(messages[-1]["content"])["input_ids"])

    def answer_all(
        self,
        conversations: Any,
        images: Any,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        top_logprobs: int = 0,
    ) -> list[Any]:
        texts = [messages[-1]["content"] for messages in conversations]
        self.calls.append(texts)
        assert all(isinstance(image, np.ndarray) for row in images for image in row)
        if any("unreadable" in text for text in texts):
            raise UsageError("no such chat")
        return [
            SimpleNamespace(
                text=f"{text} {max_new_tokens} {temperature} {seed if temperature else '-'}",
                input_tokens=len(text),
                output_tokens=2,
                tokens=(Token(text, -0.5),) * top_logprobs if top_logprobs else None,
            )
            for text in texts
        ]


@dataclass
class FlatFlux:
    """Draws one grey for each seed. `batches`: prompts of each call; `sizes`: of pictures asked for one by one."""

    batches: list[list[str]] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    sampler: list[Any] = field(default_factory=list)

    def generate_each(self, prompts: Any, references: Any, seeds: Any, **sampler: Any) -> Any:
        self.batches.append(list(prompts))
        self.sampler.append(sampler)
        assert all(isinstance(image, Image.Image) for row in references for image in row)
        images = [self._grey(seed, 4 + len(row), 4) for seed, row in zip(seeds, references, strict=True)]
        return SimpleNamespace(images=images, nfe=12)

    def __call__(self, prompt: str, images: Any = (), *, height: int, width: int, seed: int, **sampler: Any) -> Any:
        if height % 4:
            raise UsageError("size: both sides must be multiples of 4")
        self.sizes.append((height, width))
        return SimpleNamespace(images=[self._grey(seed, height, width)], nfe=6)

    def _grey(self, seed: int, height: int, width: int) -> Image.Image:
        return Image.fromarray(np.full((height, width, 3), seed, np.uint8))


def at_once(chat: Callable[[Any], Any], requests: list[Any]) -> list[Any]:
    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(chat, requests))


def test_greedy_questions_share_a_call():
    chat = EchoChat()
    model = LocalChatModel(chat, "echo", max_batch=8, wait=2)
    answers = at_once(model.chat, [question(f"q{number}", images=[], max_tokens=9) for number in range(8)])
    assert [answer.text for answer in answers] == [f"q{number} 9 0.0 -" for number in range(8)]
    assert [sorted(call) for call in chat.calls] == [[f"q{number}" for number in range(8)]]
    model.close()


def test_sampled_questions_are_asked_alone_with_their_own_seed():
    chat = EchoChat()
    model = LocalChatModel(chat, "echo", max_batch=6, wait=2)
    questions = [question(f"q{number}", temperature=0.5, seed=number) for number in range(3)]
    answers = at_once(model.chat, [*questions, question("g1"), question("g2"), question("g3", max_tokens=7)])
    assert [answer.text for answer in answers[:3]] == [f"q{number} 1024 0.5 {number}" for number in range(3)]
    assert sorted(map(len, chat.calls)) == [1, 1, 1, 1, 2]
    model.close()


def test_tokens_are_counted():
    model = LocalChatModel(EchoChat(), "echo")
    usage = model.chat(question("one two three")).usage
    assert (usage.calls, usage.input_tokens, usage.output_tokens, usage.dollars) == (1, 3, 6, 0)
    assert usage.seconds > 0
    model.close()


def test_probabilities_of_tokens_are_passed_on_where_they_are_asked_for():
    for model in (
        LocalChatModel(EchoChat(), "echo", max_batch=2, wait=2),
        MeshChatModel(EchoChat(), "echo", batch=2),
    ):
        plain, sure = at_once(model.chat, [question("a"), question("b", top_logprobs=3)])
        assert plain.tokens is None
        assert sure.tokens == (Token("b", -0.5),) * 3


def test_our_own_models_reply_behind_their_thoughts_too():
    tokens = tuple(Token(text, -0.5) for text in ("<think>", "no", "</think>", "\n\n", "yes", "."))
    thought = ChatResponse("<think>no</think>\n\nyes.", tokens=tokens)
    assert without_thought(thought) == ChatResponse("yes.", tokens=tokens[-2:])
    assert without_thought(ChatResponse("<think>no")).text == ""
    assert without_thought(ChatResponse("yes", tokens=tokens[4:5])) == ChatResponse("yes", tokens=tokens[4:5])


def test_a_chat_that_cannot_be_read_never_gets_into_a_batch():
    chat = EchoChat()
    model = LocalChatModel(chat, "echo")
    with pytest.raises(ProviderError, match="echo: no such") as caught:
        model.chat(question("unreadable"))
    assert caught.value.fault == "rejected"
    with pytest.raises(ProviderError) as caught:
        model.chat(question("a", images=[np.zeros((2, 2), np.uint8)]))
    assert caught.value.fault == "rejected"
    assert chat.calls == []
    model.close()


def test_tasks_are_drawn_together_each_from_its_own_seed():
    flux = FlatFlux()
    tool = LocalImageModel(flux, "flat", steps=3, guidance=1.5, max_batch=6, wait=2)
    made = at_once(
        tool.generate, [ImageRequest(f"p{number}", [picture(4, 4)] * number, seed=number) for number in range(6)]
    )
    assert [each.image[0, 0, 0] for each in made] == list(range(6))
    assert [each.image.shape for each in made] == [(4 + number, 4, 3) for number in range(6)]
    assert [each.usage.nfe for each in made] == [12] * 6
    assert [each.usage.pictures for each in made] == [1] * 6
    assert [sorted(batch) for batch in flux.batches] == [[f"p{number}" for number in range(6)]]
    assert flux.sampler == [{"num_inference_steps": 3, "guidance_scale": 1.5}]
    tool.close()


def test_a_size_is_asked_for():
    flux = FlatFlux()
    tool = LocalImageModel(flux, "flat", max_batch=2, wait=2)
    sized, free = at_once(tool.generate, [ImageRequest("p", size=(8, 16), seed=1), ImageRequest("p", seed=2)])
    assert sized.image.shape == (8, 16, 3)
    assert free.image.shape == (4, 4, 3)
    assert (sized.usage.nfe, free.usage.nfe) == (6, 12)
    tool.close()


def test_a_task_that_cannot_be_drawn_does_not_take_the_others_along():
    tool = LocalImageModel(FlatFlux(), "flat", max_batch=3, wait=2)

    def generate(task: ImageRequest) -> Any:
        try:
            return tool.generate(task)
        except ProviderError as error:
            return error

    good, bad, fine = at_once(
        generate, [ImageRequest("p", seed=1), ImageRequest("p", size=(9, 8)), ImageRequest("p", seed=3)]
    )
    assert (good.image[0, 0, 0], fine.image[0, 0, 0]) == (1, 3)
    assert bad.fault == "rejected"
    assert "multiples of 4" in str(bad)
    tool.close()


@pytest.mark.parametrize("prompt", ["", "  ", "x" * 50_000])
def test_prompts_that_are_none_are_rejected(prompt):
    flux = FlatFlux()
    tool = LocalImageModel(flux, "flat")
    with pytest.raises(ProviderError) as caught:
        tool.generate(ImageRequest(prompt))
    assert caught.value.fault == "rejected"
    assert flux.batches == []
    tool.close()


def test_a_closed_tool_says_so():
    tool = LocalImageModel(FlatFlux(), "flat")
    tool.close()
    with pytest.raises(ClvrError, match="closed"):
        tool.generate(ImageRequest("p"))


# --- the shipped model ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_shipped_model_draws_for_many_threads_what_it_draws_alone():
    from clvr_jax.pipelines.flux2 import Flux2Pipeline

    pipeline = Flux2Pipeline.from_pretrained("shapes-tiny")
    tool = LocalImageModel(pipeline, "shapes-tiny", steps=2, max_batch=4, wait=0.5)
    prompts = ["a red circle", "two blue squares", "a green star", "a red circle"]
    tasks = [ImageRequest(prompt, seed=number) for number, prompt in enumerate(prompts)]
    drawn = at_once(tool.generate, tasks)
    edits = [ImageRequest("Add a blue cross at the top.", [made.image], seed=9) for made in drawn]
    for task, made in zip(tasks + edits, drawn + at_once(tool.generate, edits), strict=True):
        references = [Image.fromarray(image) for image in task.references]
        alone = pipeline(task.prompt, references, num_inference_steps=2, seed=task.seed)
        # Programs for another batch size round otherwise.
        difference = made.image.astype(int) - np.asarray(alone.images[0])
        assert np.abs(difference).max() <= 1
        assert made.usage.nfe == alone.nfe
    (sized,) = at_once(tool.generate, [ImageRequest("a red circle", size=(32, 64), seed=3)])
    assert sized.image.shape == (32, 64, 3)
    with pytest.raises(ProviderError, match="multiples") as caught:
        tool.generate(ImageRequest("a red circle", size=(33, 64)))
    assert caught.value.fault == "rejected"
    tool.close()


@pytest.mark.slow
def test_the_shipped_controller_answers_many_threads_as_it_answers_alone():
    from clvr_jax.pipelines.qwen3_vl import Qwen3VLPipeline
    from clvr_jax.pipelines.registry import resolve

    pipeline = Qwen3VLPipeline.from_pretrained(resolve("shapes-tiny")[0] / "controller")
    model = LocalChatModel(pipeline, "shapes-tiny", max_batch=4, wait=0.5)
    prompts = ["a red circle", "two blue squares above a green star", "a cyan cross", "a black triangle"]
    questions = [question(prompt, max_tokens=48) for prompt in prompts]
    questions[3] = question(prompts[3], max_tokens=48, temperature=0.7, seed=5)
    for each, answer in zip(questions, at_once(model.chat, questions), strict=True):
        alone = pipeline.chat(each.messages, (), 48, each.temperature, each.seed)
        assert answer.text == alone
        assert answer.text.strip()
        assert answer.usage.input_tokens == len(pipeline.prepare(each.messages, ()).input_ids)
        assert 0 < answer.usage.output_tokens <= 48
    shown = ChatRequest([{"role": "user", "content": [{"type": "image"}]}], [])
    with pytest.raises(ProviderError) as caught:
        model.chat(shown)
    assert caught.value.fault == "rejected"
    model.close()


def test_on_a_mesh_questions_with_as_many_pictures_share_calls_of_one_size() -> None:
    chat, shown = EchoChat(), [picture(4, 4), picture(4, 8)]
    model = MeshChatModel(chat, "judge", batch=2)
    asked = [question(str(n), images=shown[: n % 2], max_tokens=5) for n in range(5)]
    assert [answer.text for answer in model.chat_all(asked)] == [f"{n} 5 0.0 -" for n in range(5)]
    assert chat.calls == [["0", "2"], ["4", "4"], ["1", "3"]]
    assert model.chat(asked[3]).usage.input_tokens == len("3")
    assert model.chat_all([]) == []


def test_on_a_mesh_nothing_is_left_to_chance_and_bad_chats_are_named() -> None:
    model = MeshChatModel(EchoChat(), "judge", batch=2)
    with pytest.raises(ProviderError, match=r"judge: .*greedily"):
        model.chat(question("one", temperature=0.5))
    with pytest.raises(ProviderError, match="judge: no such chat"):
        model.chat_all([question("one"), question("unreadable")])
    with pytest.raises(UsageError, match="batch must be at least 1"):
        MeshChatModel(EchoChat(), "judge", batch=0)

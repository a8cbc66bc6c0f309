"""The pipeline of Qwen3-VL: from a conversation with images to the assistant's next message."""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from PIL import Image

from clvr_jax.compilation import release_programs
from clvr_jax.convert.architectures import QWEN3_VL
from clvr_jax.convert.hub import local_directory
from clvr_jax.convert.model_card import card_of_pipeline
from clvr_jax.convert.models import load_model, save_model
from clvr_jax.data.preprocessing.conversations import END_TOKENS, IMAGE_PAD, Message, read_conversation
from clvr_jax.data.preprocessing.qwen3_vl_images import Qwen3VLImageProcessor, load_processor, processor_to_dict
from clvr_jax.data.preprocessing.text import start_loading_tokenizer
from clvr_jax.errors import UsageError
from clvr_jax.files.atomic_io import atomic_directory, read_json, write_json
from clvr_jax.interfaces import Token
from clvr_jax.interfaces.tokenizer import Tokenizer
from clvr_jax.models.common.decoding import Generation, SplitModel, generate
from clvr_jax.models.common.quantization import Quantization
from clvr_jax.models.qwen3_vl import Qwen3VL
from clvr_jax.models.qwen3_vl.image_buckets import bucket_conversations, bucket_suffixes
from clvr_jax.models.qwen3_vl.positions import Conversation, part_of
from clvr_jax.pipelines.compatibility import check_qwen3_vl
from clvr_jax.pipelines.loading import Mesh, check_heads, computing_on, layout_of, on_mesh, resolve_dtype
from clvr_jax.pipelines.offload import HOST, Offload, Offloader, offloader_of
from clvr_jax.pipelines.qwen3_vl.generation_config import GenerationConfig
from clvr_jax.pipelines.qwen3_vl.prefix_cache import PrefixCache
from clvr_jax.sharding import MeshLayout, process_allgather

T = TypeVar("T")


@dataclass(frozen=True)
class ChatAnswer:
    """The assistant's message.

    input_tokens: number of tokens of the conversation, visual tokens included. output_tokens: number of tokens that
    were generated. tokens: of the text, with probabilities; None unless requested. is_complete: whether the message
    ended with a stop token; if not, it was truncated at the limit of new tokens.
    """

    text: str
    input_tokens: int
    output_tokens: int
    tokens: tuple[Token, ...] | None = None
    is_complete: bool = True


class Qwen3VLPipeline:
    """A vision-language model with its tokenizer and image processor, which are public attributes.

    Args:
      model, tokenizer, image_processor: the parts.
      generation: decoding settings; neutral if None.
      prefix_cache_gib: memory for a `PrefixCache` on each device, in GiB; 0 is without one.
    """

    layout: MeshLayout | None = None
    """The layout that the model is placed on and programs are traced for; None: the active one, else one device."""

    offloader: Offloader | None = None
    """Copies the weights from host memory to the devices while they are used; None: they are on the devices."""

    def __init__(
        self,
        model: Qwen3VL,
        tokenizer: Tokenizer,
        image_processor: Qwen3VLImageProcessor,
        generation: GenerationConfig | None = None,
        prefix_cache_gib: float = 0.0,
    ):
        self.model, self.tokenizer, self.image_processor = model, tokenizer, image_processor
        self.generation = generation or GenerationConfig()
        self._split: tuple[Qwen3VL, SplitModel] | None = None
        check_qwen3_vl(model.config, tokenizer, image_processor)
        dtype = model.model.language_model.norm.dtype or jnp.float32
        self._prefixes = PrefixCache(model.config, dtype, prefix_cache_gib) if prefix_cache_gib else None

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: DTypeLike | None = "float32",
        *,
        mesh: Mesh = None,
        quantize: Quantization | None = None,
        offload: Offload = None,
        prefix_cache_gib: float = 0.0,
    ) -> Self:
        """Loads weights, tokenizer and image processor.

        Args:
          path: a directory in transformers layout, or a Hugging Face id.
          dtype: of weights and computation; None is the checkpoint's own on an accelerator, and float32 on a CPU.
          mesh: shards parameters and computation.
          quantize: "int8" stores the weights as 8-bit integers, see `models.common.quantization`.
          offload: "components", or an `Offloader` shared with other pipelines, holds the weights in host memory, and
            copies them to the devices while they are used; None leaves them on the devices.
          prefix_cache_gib: keeps keys and values of earlier conversations in so much memory of each device, so that a
            conversation is only processed from where it differs from them; 0 keeps none. Replies are the same, apart
            from rounding. Replacing `model` empties it.

        Stop tokens, repetition penalty and, for sampling at a temperature, top-k and top-p are those of
        generation_config.json.
        Raises: ClvrError that names what is missing or does not match.
        """
        directory = local_directory(str(path))
        layout, offloader = layout_of(mesh), offloader_of(offload)
        with computing_on(layout):
            check_heads(layout, qwen3_vl_heads(directory))
            dtype = resolve_dtype(dtype, directory)
            tokenizer = start_loading_tokenizer(directory)
            model = load_model(directory, QWEN3_VL, dtype, quantize=quantize, memory_kind=HOST if offloader else None)
            generation = GenerationConfig.read(directory, model.config.text.vocab_size)
            pipe = cls(model, tokenizer(), load_processor(directory), generation, prefix_cache_gib)
        pipe.layout, pipe.offloader = layout, offloader
        return pipe

    def chat(
        self,
        messages: Sequence[Message],
        images: Sequence[Image.Image | np.ndarray] = (),
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> str:
        """Returns the assistant's next message.

        Args:
          messages: the conversation so far; image k is the k-th {"type": "image"} part.
          images: PIL images or uint8 arrays (h, w, 3).
          max_new_tokens: maximum length of the message; a longer one is truncated.
          temperature: 0 decodes greedily.
          seed: of the sampling, for temperatures above 0.
        """
        return self.chat_all([messages], [images], max_new_tokens, temperature, seed)[0]

    def chat_all(
        self,
        conversations: Sequence[Sequence[Message]],
        images: Sequence[Sequence[Image.Image | np.ndarray]],
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[str]:
        """Returns the next message of several conversations, which may differ in length and number of images."""
        answers = self.answer_all(conversations, images, max_new_tokens, temperature, seed)
        return [answer.text for answer in answers]

    @on_mesh
    def answer_all(
        self,
        conversations: Sequence[Sequence[Message]],
        images: Sequence[Sequence[Image.Image | np.ndarray]],
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int | Sequence[int] = 0,
        top_logprobs: int = 0,
    ) -> list[ChatAnswer]:
        """Returns the next messages with numbers of tokens and, if requested, probabilities of tokens.

        Args:
          conversations, images, max_new_tokens, temperature: as in `chat`, for each conversation.
          seed: one for all conversations, or one for each; with one for each, a batch does not change an answer.
          top_logprobs: number of most probable tokens returned for each position; 0 returns no probabilities.
        """
        if len(conversations) != len(images):
            raise UsageError(f"chat: {len(conversations)} conversations but images for {len(images)}")
        release_programs(interval_seconds=2.0)  # every size of a batch, a text and a set of images has its own
        rows = [self.prepare(messages, own) for messages, own in zip(conversations, images, strict=True)]
        answer = self._decode(
            rows,
            max_new_tokens=max_new_tokens,
            stop_tokens=self.generation.stop_tokens or tuple(self.tokenizer.convert_tokens_to_ids(END_TOKENS)),
            temperature=temperature,
            key=_keys(seed, len(_padded(rows))) if temperature else None,
            top_logprobs=top_logprobs,
            sampling=self.generation.sampling,
        )
        tokens, lengths = np.asarray(answer.tokens_bn), np.asarray(answer.length_b)
        stopped = np.asarray(answer.stopped_b)
        counts = lengths[: len(rows)] - stopped[: len(rows)]  # without the stop token
        texts = [
            self._opened_thought(row.input_ids) + self.tokenizer.decode(own[:count])
            for row, own, count in zip(rows, tokens, counts, strict=False)
        ]
        tokens_of: Sequence[tuple[Token, ...] | None] = [None] * len(rows)
        if top_logprobs:
            tokens_of = self._tokens(answer, counts.tolist())
        return [
            ChatAnswer(texts[row], len(rows[row].input_ids), int(lengths[row]), tokens_of[row], bool(stopped[row]))
            for row in range(len(rows))
        ]

    def _decode(self, rows: Sequence[Conversation], **options: Any) -> Generation:
        """Decodes a reply to each conversation. options: of `generate`. Returns: Generation, padded to more rows."""
        model = self._split_model()
        if self._prefixes is None:
            batch = bucket_conversations(_padded(rows), **self._places, pad_token=self.tokenizer.pad_token_id)
            return process_allgather(generate(model, batch, **options, pad_token=self.tokenizer.pad_token_id))
        symbols = [self._prefixes.symbols(row) for row in rows]
        self._prefixes.count(prompt=sum(map(len, symbols)))
        if shared := self._prefixes.shared(symbols):
            beginnings = [part_of(rows[row], 0, length, **self._places) for row, length in shared]
            # One new token needs no step after the prompt.
            self._decode_after_prefix(
                model, self._prefixes, beginnings, [symbols[row][:length] for row, length in shared], max_new_tokens=1
            )
        return self._decode_after_prefix(model, self._prefixes, rows, symbols, **options)

    def _decode_after_prefix(
        self,
        model: SplitModel,
        prefixes: PrefixCache,
        rows: Sequence[Conversation],
        symbols: Sequence[Sequence[int]],
        **options: Any,
    ) -> Generation:
        """Decodes a reply to each conversation after what is stored of it, and stores conversation and reply."""
        padded = _padded(rows)
        starts, prefix = prefixes.prefix(_padded(symbols), [row.input_ids for row in padded])
        batch = bucket_suffixes(padded, starts, **self._places, pad_token=self.tokenizer.pad_token_id)
        found = generate(
            model,
            {**batch, "prefix": prefix},
            **options,
            pad_token=self.tokenizer.pad_token_id,
            return_cache=True,
        )
        answer = process_allgather(found._replace(cache=None))
        # Slots of the cache: the prefix and padding, the rest of the prompt and padding, the reply.
        prompt = 0 if prefix is None else prefix.key.shape[2]
        reply = prompt + batch["input_ids_bt"].shape[1]
        tokens, lengths = np.asarray(answer.tokens_bn), np.asarray(answer.length_b)
        finished: list[tuple[Sequence[int], Sequence[int]]] = []
        for row, (own, start) in enumerate(zip(symbols, starts, strict=False)):
            said = tokens[row, : lengths[row] - 1].tolist()  # the last token is not in the cache
            slots = [*range(start), *range(prompt, prompt + len(own) - start), *range(reply, reply + len(said))]
            finished.append(([*own, *said], slots))
        prefixes.store(found.cache, finished)
        prefixes.count(computed=sum(len(own) - start for own, start in zip(symbols, starts, strict=False)))
        return answer

    @property
    def _places(self) -> dict[str, int]:
        return {
            "image_token_id": self.tokenizer.convert_tokens_to_ids(IMAGE_PAD),
            "merge": self.model.config.vision.spatial_merge_size,
        }

    def _split_model(self) -> SplitModel:
        """Returns the model, split once, with its weights on the devices."""
        if self._split is None or self._split[0] is not self.model:
            if self._prefixes is not None:
                self._prefixes.clear()
            self._split = self.model, SplitModel(*nnx.split(self.model))
        split = self._split[1]
        return split if self.offloader is None else SplitModel(split.graphdef, self.offloader.on_device(split.state))

    def _opened_thought(self, input_ids: Sequence[int]) -> str:
        """Returns the opening tag of a thought if the chat template already put it into the prompt, else ""."""
        found = re.search(r"<think>\s*\Z", self.tokenizer.decode(input_ids[-4:]))
        return found[0] if found else ""

    def _tokens(self, answer: Generation, counts: Sequence[int]) -> list[tuple[Token, ...]]:
        """Returns the first `counts[row]` tokens of every row, each with the most probable tokens at its position."""
        assert answer.logprobs is not None
        ids, chosen = np.asarray(answer.tokens_bn).tolist(), np.asarray(answer.logprobs.chosen_bn).tolist()
        top_ids = np.asarray(answer.logprobs.top_tokens_bnk).tolist()
        top = np.asarray(answer.logprobs.top_bnk).tolist()
        # Few distinct tokens occur many times, and the tokenizer takes longer for one than a small model for a step.
        text = functools.cache(lambda token: self.tokenizer.decode([token]))
        return [
            tuple(
                Token(
                    text(ids[row][n]),
                    chosen[row][n],
                    {text(token): logprob for token, logprob in zip(top_ids[row][n], top[row][n], strict=True)},
                )
                for n in range(count)
            )
            for row, count in enumerate(counts)
        ]

    def prepare(
        self,
        messages: Sequence[Message],
        images: Sequence[Image.Image | np.ndarray],
        *,
        add_generation_prompt: bool = True,
    ) -> Conversation:
        """Returns the token ids of a conversation, with one placeholder for each visual token, and the image patches.

        Raises: UsageError if the number of image parts in the messages is not that of the images.
        """
        return read_conversation(
            self.tokenizer, self.image_processor, messages, images, add_generation_prompt=add_generation_prompt
        )

    def save_pretrained(self, path: str | Path, dtype: str = "float32") -> None:
        """Writes a directory in transformers layout, which `from_pretrained` and PyTorch's class load.

        Args:
          path: the directory, replaced if it exists; it appears only when it is complete.
          dtype: of the weights, "float32", "float16" or "bfloat16".
        """
        with atomic_directory(Path(path)) as temporary:
            save_model(temporary, self.model, QWEN3_VL, dtype)
            self.tokenizer.save_pretrained(str(temporary))
            write_json(temporary / "preprocessor_config.json", processor_to_dict(self.image_processor))
            self.generation.write(temporary)
            card_of_pipeline(temporary, Path(path).name, "Qwen3VLPipeline.save_pretrained", dtype)


def qwen3_vl_heads(directory: Path, name: str = "controller") -> dict[str, int]:
    """Returns the attention heads of a Qwen3-VL, by part; reads its configuration only.

    Args:
      directory: of the model.
      name: of the model in messages.
    """
    config = QWEN3_VL.config_from_dict(read_json(directory / "config.json"))
    return {name: config.text.num_attention_heads, f"{name}'s vision tower": config.vision.num_heads}


def _padded(rows: Sequence[T]) -> list[T]:
    """Returns the rows of a batch, with copies of the last one: each batch size is compiled, so few sizes are used."""
    return [*rows, *[rows[-1]] * ((1 << (len(rows) - 1).bit_length()) - len(rows))]


def _keys(seeds: int | Sequence[int], rows: int) -> jax.Array:
    """Returns the key of a seed, or (rows,) keys, each that of a single conversation with its seed.

    Rows without a seed repeat the last.
    """
    if isinstance(seeds, int):
        return jax.random.key(seeds)
    filled = [*seeds, *[seeds[-1]] * (rows - len(seeds))]
    return jnp.stack([jax.random.fold_in(jax.random.key(seed), 0) for seed in filled])

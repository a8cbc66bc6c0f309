"""A Qwen3-VL as verifier of images, with the prompts of `reasoning.verification`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

from jax.typing import DTypeLike

from clvr_jax.convert.hub import local_directory
from clvr_jax.errors import ClvrError
from clvr_jax.files.atomic_io import read_json
from clvr_jax.files.file_names import has_entry
from clvr_jax.files.image_io import pixels
from clvr_jax.interfaces import ChatModel, ChatRequest, ChatResponse, Usage
from clvr_jax.models.common.quantization import Quantization
from clvr_jax.pipelines.loading import Mesh
from clvr_jax.pipelines.offload import Offload
from clvr_jax.pipelines.qwen3_vl.pipeline import ChatAnswer, Qwen3VLPipeline
from clvr_jax.pipelines.registry import MODELS, SHIPPED, resolve
from clvr_jax.reasoning.verification.model_verifier import ModelVerifier
from clvr_jax.reasoning.verification.verification import Mode

TRAINED_FOR_LOOP = "loop"
"""Value of "contract" in the clvr.json of a Qwen3-VL that was trained for the loop and needs no system prompts."""
MAX_ROWS = 64
"""Maximum number of conversations in one call; more would need more memory and gain no speed."""
MAX_TRAINED_TOKENS = 96
"""Maximum length of a reply of a model that was trained for the loop; the evidence for nine objects has 75 tokens."""


class PipelineModel(ChatModel):
    """A `Qwen3VLPipeline` as `ChatModel`; requests with the same settings and number of images share calls."""

    def __init__(self, pipeline: Qwen3VLPipeline, name: str):
        self._pipeline, self._name = pipeline, name

    @property
    def name(self) -> str:
        """The name that was given."""
        return self._name

    def chat(self, request: ChatRequest) -> ChatResponse:
        """Returns the response to one request."""
        return self.chat_all([request])[0]

    def chat_all(self, requests: Sequence[ChatRequest]) -> list[ChatResponse]:
        """Returns the responses in the order of the requests; each is sampled with its own seed."""
        groups: dict[tuple[float, ...], list[int]] = {}
        for index, request in enumerate(requests):
            key = (request.max_tokens, request.top_logprobs, len(request.images), request.temperature)
            groups.setdefault(key, []).append(index)
        responses: dict[int, ChatResponse] = {}
        for indices in groups.values():
            for begin in range(0, len(indices), MAX_ROWS):
                part = indices[begin : begin + MAX_ROWS]
                responses.update(zip(part, self._responses([requests[index] for index in part]), strict=True))
        return [responses[index] for index in range(len(requests))]

    def _responses(self, requests: Sequence[ChatRequest]) -> list[ChatResponse]:
        first = requests[0]
        answers = self._pipeline.answer_all(
            [request.messages for request in requests],
            [[pixels(image) for image in request.images] for request in requests],
            first.max_tokens,
            first.temperature,
            [request.seed for request in requests],
            first.top_logprobs,
        )
        return [_response(answer) for answer in answers]


def _response(answer: ChatAnswer) -> ChatResponse:
    usage = Usage(calls=1, input_tokens=answer.input_tokens, output_tokens=answer.output_tokens)
    return ChatResponse(answer.text, usage, answer.tokens)


class Verifier(ModelVerifier):
    """Checks images against prompts with a Qwen3-VL.

    checked = clvr.Verifier.from_pretrained("shapes-tiny").verify(["a red circle"], [image])
    checked[0].accepted, [(each.text, each.met, each.probability) for each in checked[0].requirements]
    """

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        dtype: DTypeLike | None = "float32",
        mode: Mode | None = None,
        *,
        mesh: Mesh = None,
        quantize: Quantization | None = None,
        offload: Offload = None,
        prefix_cache_gib: float = 0.0,
    ) -> Self:
        """Loads a verifier.

        Args:
          model: a shipped name, a directory with `controller/`, or a Qwen3-VL directory or Hugging Face id.
          dtype: of weights and computation; None is the checkpoint's own on an accelerator, and float32 on a CPU.
          mode: "describe" or "ask"; "describe" for models trained for the loop and "ask" for others, if None.
          mesh: shards parameters and computation.
          quantize: "int8" stores the weights as 8-bit integers, see `models.common.quantization`.
          offload, prefix_cache_gib: see `Qwen3VLPipeline.from_pretrained`.
        Raises: ClvrError for a model without a controller.
        """
        _, is_trained = controller_directory(model)
        pipeline = load_controller(model, dtype, mesh, quantize, offload, prefix_cache_gib)
        return cls.of_pipeline(pipeline, model, is_trained, mode)

    @classmethod
    def of_pipeline(cls, pipeline: Qwen3VLPipeline, name: str, is_trained: bool, mode: Mode | None = None) -> Self:
        """Wraps a loaded Qwen3-VL; `is_trained` says whether it was trained for the loop."""
        chosen: Mode = mode or ("describe" if is_trained else "ask")
        return cls(
            PipelineModel(pipeline, name),
            chosen,
            is_instructed=not is_trained,
            max_tokens=MAX_TRAINED_TOKENS if is_trained else 512,
        )


def load_controller(
    model: str,
    dtype: DTypeLike | None = None,
    mesh: Mesh = None,
    quantize: Quantization | None = None,
    offload: Offload = None,
    prefix_cache_gib: float = 0.0,
) -> Qwen3VLPipeline:
    """Loads the Qwen3-VL of a model; see `controller_directory` and `Qwen3VLPipeline.from_pretrained`."""
    path, _ = controller_directory(model)
    return Qwen3VLPipeline.from_pretrained(
        path, dtype, mesh=mesh, quantize=quantize, offload=offload, prefix_cache_gib=prefix_cache_gib
    )


def controller_directory(model: str) -> tuple[Path, bool]:
    """Finds the Qwen3-VL of a model.

    Args:
      model: a shipped name, a pipeline directory with `controller/`, or a Qwen3-VL directory or Hugging Face id.
    Returns: its directory, and whether it was trained for the loop: by "contract" in its clvr.json or, without that
      file, if it is the `controller/` of a pipeline.
    Raises: ClvrError if there is none.
    """
    if model in MODELS:
        path = SHIPPED / MODELS[model].directory / "controller"
    elif "/" not in model and not Path(model).exists():
        raise ClvrError(f"{model}: no such model; give a directory, a Hugging Face id or one of {', '.join(MODELS)}")
    else:
        found = local_directory(model)
        if (found / "model_index.json").exists():
            resolve(model)
            path = found / "controller"
            if not path.is_dir():
                raise ClvrError(
                    f"{found}: the directory has no controller/; name another model, or a Qwen3-VL, as the controller "
                    "(--controller) or the verifier (--verifier)"
                )
        else:
            path = found
    config = path / "config.json"
    if not config.exists():
        raise ClvrError(f"{path}: not a Qwen3-VL directory, config.json is missing")
    kind = read_json(config).get("model_type")
    if kind != "qwen3_vl":
        raise ClvrError(f"{path}: a {kind}, not a qwen3_vl; a controller or verifier must be a Qwen3-VL")
    settings = path / "clvr.json"
    if has_entry(settings):
        given = read_json(settings)
        if given != {"contract": TRAINED_FOR_LOOP}:
            raise ClvrError(
                f'{settings}: contains {str(given)[:80]}; it may only contain {{"contract": "{TRAINED_FOR_LOOP}"}}'
            )
        return path, True
    return path, path.name == "controller"

"""Judges by name: a folder with Qwen3-VL, or a model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import re
from pathlib import Path

from clvr_jax.convert.hub import local_directory
from clvr_jax.errors import ClvrError
from clvr_jax.evaluation.benchmarks.judging import JudgeModel
from clvr_jax.files import read_json
from clvr_jax.providers.endpoint import Endpoint, Prices

_COMMIT = re.compile(r"[0-9a-f]{40}")


def endpoint_judge(
    model: str,
    url: str,
    key_variable: str | None,
    *,
    revision: str | None = None,
    in_flight: int = 64,
    max_tokens: int | None = None,
    prices: Prices | None = None,
    max_seconds: float = 1200.0,
) -> JudgeModel:
    """A model behind an endpoint.

    Args:
      model, url, key_variable, prices, max_seconds: see `Endpoint`.
      revision: of the weights that the server runs, if you know it.
      in_flight, max_tokens: see `JudgeModel`.
    Raises: ClvrError if the key or the openai package is missing.
    """
    from clvr_jax.providers.openai_chat import OpenAIVisionLanguageModel

    endpoint = Endpoint(
        model, url, key_variable, max_in_flight=in_flight, prices=prices or Prices(), max_seconds=max_seconds
    )
    return JudgeModel(OpenAIVisionLanguageModel(endpoint), revision, in_flight, max_tokens)


def check_local(model: str) -> Path:
    """The folder of a judge of our own. Raises: ClvrError if it is no Qwen3-VL."""
    folder = local_directory(model)
    if (found := read_json(folder / "config.json").get("model_type")) != "qwen3_vl":
        raise ClvrError(f"{folder}: holds a {found}; a judge without --judge-url is a qwen3_vl")
    return folder


def local_judge(model: str, *, in_flight: int = 64, max_tokens: int | None = None) -> JudgeModel:
    """Our Qwen3-VL; its revision is the commit on the Hub, or the digest of the folder.

    Args:
      model: folder in transformers layout, or a Hugging Face id.
      in_flight, max_tokens: see `JudgeModel`.
    Raises: ClvrError naming what is missing or does not fit.
    """
    from clvr_jax.merging.digests import Digests
    from clvr_jax.pipelines.vlm import Qwen3VLPipeline
    from clvr_jax.providers.local import LocalVisionLanguageModel

    folder = check_local(model)
    at = folder.resolve().name
    revision = at if _COMMIT.fullmatch(at) else Digests({"judge": folder}).finish()["judge"][:16]
    name = Path(model).name if Path(model).exists() else model
    return JudgeModel(
        LocalVisionLanguageModel(Qwen3VLPipeline.from_pretrained(folder), name), revision, in_flight, max_tokens
    )

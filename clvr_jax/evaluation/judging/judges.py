"""Judge models: a directory with Qwen3-VL, or a model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import re
from pathlib import Path

from clvr_jax.convert.hub import local_directory
from clvr_jax.errors import ClvrError
from clvr_jax.evaluation.judging.questions import JudgeModel
from clvr_jax.files.atomic_io import read_json
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
    """Returns a judge behind an endpoint.

    Args:
      model, url, key_variable, prices, max_seconds: as in `Endpoint`.
      revision: of the weights that the server runs, if known.
      in_flight, max_tokens: as in `JudgeModel`.
    Raises: ClvrError if the key or the openai package is missing.
    """
    from clvr_jax.providers.openai_chat import OpenAIChatModel

    endpoint = Endpoint(
        model, url, key_variable, max_in_flight=in_flight, prices=prices or Prices(), max_seconds=max_seconds
    )
    return JudgeModel(OpenAIChatModel(endpoint), revision, in_flight, max_tokens)


def check_local(model: str) -> Path:
    """Returns the directory of a local judge. Raises: ClvrError if it is not a Qwen3-VL model."""
    directory = local_directory(model)
    if (found := read_json(directory / "config.json").get("model_type")) != "qwen3_vl":
        raise ClvrError(f"{directory}: has a {found} model; a judge without --judge-url must be a qwen3_vl model")
    return directory


def local_judge(model: str, *, in_flight: int = 64, max_tokens: int | None = None) -> JudgeModel:
    """Returns a local Qwen3-VL as a judge; its revision is the commit on the Hub, or the digest of the directory.

    Args:
      model: directory in transformers layout, or a Hugging Face id.
      in_flight, max_tokens: as in `JudgeModel`.
    Raises: ClvrError that names what is missing or does not match.
    """
    from clvr_jax.merging.digests import Digests
    from clvr_jax.pipelines.qwen3_vl import Qwen3VLPipeline
    from clvr_jax.providers.local import LocalChatModel

    directory = check_local(model)
    at = directory.resolve().name
    revision = at if _COMMIT.fullmatch(at) else Digests({"judge": directory}).finish()["judge"][:16]
    name = Path(model).name if Path(model).exists() else model
    return JudgeModel(LocalChatModel(Qwen3VLPipeline.from_pretrained(directory), name), revision, in_flight, max_tokens)

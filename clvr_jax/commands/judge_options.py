"""Options for a model behind an OpenAI-compatible endpoint, or a model of ours, that judges images."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from clvr_jax.arguments import at_least_one
from clvr_jax.commands.common import Count
from clvr_jax.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """Which model judges, and how it is reached."""

    judge: str = ""
    """Who scores: the server's name of a model with --judge-url, else a folder with Qwen3-VL or a Hugging Face id."""
    judge_url: Annotated[str | None, tyro.conf.arg(metavar="URL")] = None
    """An OpenAI-compatible chat API, up to and including the version, e.g. https://api.openai.com/v1."""
    judge_key_variable: str = "OPENAI_API_KEY"
    """Environment variable with its key; "" for servers without keys."""
    judge_revision: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None
    """Revision of the weights that the server runs; recorded in the result."""
    judge_prices: Annotated[tuple[float, ...], tyro.conf.arg(metavar="READ WRITTEN")] = ()
    """Dollars that the server charges for a million tokens read, and written."""
    judge_tokens: Count = None
    """Tokens of a reply at most, for judges that think first; the benchmark's own number if not given."""
    judge_in_flight: int = 64
    """Questions to the judge at a time."""

    def check_judge(self) -> None:
        """Raises UsageError for options that make no sense together."""
        at_least_one("--judge-tokens", self.judge_tokens)
        at_least_one("--judge-in-flight", self.judge_in_flight)
        if len(self.judge_prices) not in (0, 2):
            raise UsageError("--judge-prices are two, of tokens read and written")
        if not self.judge and (self.judge_url or self.judge_revision or self.judge_prices):
            raise UsageError("--judge says which model of the server scores")

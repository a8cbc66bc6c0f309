"""Options for a model behind an OpenAI-compatible endpoint, or a model of ours, that judges images."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from clvr_jax.arguments import at_least_one
from clvr_jax.commands.common import Count
from clvr_jax.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """Options for the model that judges images, and for how it is reached."""

    judge: str = ""
    """Score with this model: with --judge-url the server's name for it, else a directory or Hugging Face id of a
    Qwen3-VL. Nothing is scored if not given."""
    judge_url: Annotated[str | None, tyro.conf.arg(metavar="URL")] = None
    """Reach the judge behind this OpenAI-compatible chat API. Give the URL up to and including the version, such as
    https://api.openai.com/v1; the judge runs on this machine if not given."""
    judge_key_variable: str = "OPENAI_API_KEY"
    """Environment variable with the key of --judge-url; "" for a server without keys."""
    judge_revision: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None
    """Revision of the weights that the server runs, which is recorded in the result."""
    judge_prices: Annotated[tuple[float, ...], tyro.conf.arg(metavar="READ WRITTEN")] = ()
    """Dollars that the server charges for a million input tokens and for a million output tokens; the cost is not
    counted if not given."""
    judge_tokens: Count = None
    """Allow this many tokens in a reply; the benchmark's own number if not given. Judges that think first need more."""
    judge_max_seconds: float = 1200.0
    """Wait this many seconds at most for a whole reply of --judge-url, however slowly it comes."""
    judge_in_flight: int = 64
    """Send at most this many questions to the judge at a time."""

    def check_judge(self) -> None:
        """Raises UsageError for options that contradict each other."""
        at_least_one("--judge-tokens", self.judge_tokens)
        at_least_one("--judge-in-flight", self.judge_in_flight)
        if len(self.judge_prices) not in (0, 2):
            raise UsageError("--judge-prices must be two prices, of input and output tokens")
        if not self.judge and (self.judge_url or self.judge_revision or self.judge_prices):
            raise UsageError("--judge is missing; give the server's name for the model that scores")

"""Statistics of a run of the engine: stages that prompts reached, reasons for discarded ones, time, usage."""

from collections import Counter
from collections.abc import Mapping, Sequence

from clvr_jax.data.engine.engine import STAGES
from clvr_jax.data.engine.outcomes import FailedPrompt, FinishedPrompt
from clvr_jax.files.json_input import JSON

_EXAMPLES = 3
STAGE_NAMES = {
    "drawn": "a correct image",
    "verified": "images correct or corrected",
    "accepted": "result accepted",
    "preferred": "preferred to one-shot",
    "kept": "written as a trajectory",
}


class Statistics:
    """Accumulates outcomes one at a time; the statistics so far are available at any time."""

    def __init__(self, refused: Mapping[str, int] | None = None):
        self._refused = dict(refused or {})
        self._finished = 0
        self._reached: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._examples: dict[str, list[str]] = {}
        self._lengths: Counter[int] = Counter()
        self._corrections: Counter[int] = Counter()
        self._wrong_images = 0
        self._verdicts: Counter[bool] = Counter()
        self._images, self._turns, self._seconds = 0, 0, 0.0
        self._usage: dict[str, Counter[str]] = {}
        self._audited, self._wrong = 0, 0
        self._faults: Counter[str] = Counter()
        self._failed: list[str] = []
        self._adapted: dict[str, set[str]] = {}

    def add_failed(self, id: str, failed: FailedPrompt | None) -> None:
        """Counts a prompt without an outcome; `failed` has the reason, None if the prompt was not reached."""
        self._faults[failed.fault if failed else "not reached"] += 1
        if failed is None:
            return
        self._failed.append(f"{id}: {failed.detail}")
        for role, usage in failed.usage.items():
            self._usage.setdefault(role, Counter()).update(usage)

    @property
    def unfinished_sentence(self) -> str | None:
        """The number of prompts without an outcome, with a reason; None if all have one."""
        if not self._faults:
            return None
        count = self._faults.total()
        why = f" ({self._failed[0]})" if self._failed else ""
        return f"{count:,} prompt{'s have' if count > 1 else ' has'} no outcome yet{why}; run it again to resume"

    def add(self, finished: FinishedPrompt) -> None:
        """Counts one outcome."""
        self._finished += 1
        if finished.stage is not None:
            for stage in STAGES[: STAGES.index(finished.stage) + 1]:
                self._reached[stage] += 1
        if finished.is_kept:
            self._lengths[finished.steps] += 1
        else:
            self._reasons[finished.reason] += 1
            examples = self._examples.setdefault(finished.reason, [])
            if len(examples) < _EXAMPLES:
                examples.append(f"{finished.id}: {finished.detail}")
        self._verdicts.update(finished.verdicts)
        for server, notes in finished.content.get("adapted", {}).items():
            self._adapted.setdefault(server, set()).update(notes)
        self._images += finished.num_images
        self._turns += finished.turns
        self._seconds += finished.seconds
        for role, usage in finished.usage.items():
            self._usage.setdefault(role, Counter()).update(usage)

    def add_corrections(self, wrong_images: int, corrected: int) -> None:
        """Counts the wrong images of one kept trajectory, and those of them that had to be corrected."""
        self._wrong_images += wrong_images
        self._corrections[corrected] += 1

    def add_audit(self, right: Sequence[bool]) -> None:
        """Counts the images of one kept trajectory; `right` has the result of an exact check for each."""
        self._audited += len(right)
        self._wrong += len(right) - sum(right)

    @property
    def finished(self) -> int:
        """Number of prompts with an outcome."""
        return self._finished

    @property
    def kept(self) -> int:
        """Number of kept trajectories."""
        return self._reached["kept"]

    @property
    def summary(self) -> str:
        """A short summary for the progress line."""
        if not self._finished:
            return ""
        worst = "".join(f", {count} {reason}" for reason, count in self._reasons.most_common(2))
        return f"{self.kept} kept ({self.kept / self._finished:.1%}){worst}"

    def to_json(self) -> dict[str, JSON]:
        """Returns all statistics in types of JSON; shares are relative to the finished prompts."""
        total: Counter[str] = Counter()
        for usage in self._usage.values():
            total.update(usage)
        share = 1 / max(self._finished, 1)
        corrections = sum(count * times for count, times in self._corrections.items())
        trajectories = max(self._corrections.total(), 1)
        corrected = sum(times for count, times in self._corrections.items() if count)
        return {
            "prompts": self._finished,
            "refused": self._refused,
            "unfinished": {
                "prompts": self._faults.total(),
                "faults": dict(self._faults),
                "examples": self._failed[:_EXAMPLES],
                "sentence": self.unfinished_sentence,
            },
            "adapted": {server: sorted(notes) for server, notes in sorted(self._adapted.items())},
            "stages": {
                stage: {"prompts": self._reached[stage], "share": self._reached[stage] * share} for stage in STAGES
            },
            "discarded": {
                reason: {"prompts": count, "share": count * share, "examples": self._examples[reason]}
                for reason, count in self._reasons.most_common()
            },
            "steps": {str(length): count for length, count in sorted(self._lengths.items())},
            "corrections": {
                "wrong_images": self._wrong_images,
                "total": corrections,
                "per_trajectory": corrections / trajectories,
                "trajectories": corrected,
                "share": corrected / trajectories,
                "by_number": {str(count): times for count, times in sorted(self._corrections.items())},
            },
            # An example has a right image only if it has a counterpart with a wrong image.
            "verification": {
                "right": self._verdicts[True],
                "wrong": self._verdicts[False],
                "pairs": self._verdicts[True],
            },
            "pictures": self._images,
            "turns": self._turns,
            "usage": {role: dict(usage) for role, usage in sorted(self._usage.items())},
            "total": dict(total),
            "prompt_seconds": self._seconds,
            "model_share": total["seconds"] / self._seconds if self._seconds else 0.0,
            "audit": {"pictures": self._audited, "wrong": self._wrong} if self._audited else None,
        }

"""`clvr eval geneval` and the other published benchmarks: images in the official layout, and their scores."""

import abc
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import tyro
from typing_extensions import override

from clvr_jax.arguments import at_least_one
from clvr_jax.commands.common import Command, Common, Count, Directory, Flags, Result, prepare_jax
from clvr_jax.commands.eval.judge_options import JudgeOptions
from clvr_jax.commands.eval.run_progress import progress_on_first_report
from clvr_jax.commands.eval.system import SystemOptions
from clvr_jax.display.console import console
from clvr_jax.errors import UsageError

if TYPE_CHECKING:
    from clvr_jax.evaluation.harness.benchmark import Benchmark, Item
    from clvr_jax.evaluation.harness.scoring import Scorer
    from clvr_jax.evaluation.judging.questions import JudgeModel


@dataclass(frozen=True)
class _OptionalSystem(SystemOptions):
    """Options for the system of a run that need not generate images."""

    model: str = ""
    """Generate with this model: a shipped name, a directory in diffusers layout, or a Hugging Face id. With --endpoint
    it is the server's name for the model, and with --pictures any name. It is needed unless nothing is generated."""


@dataclass(frozen=True, kw_only=True)
class _EvalBenchmark(abc.ABC):
    """Base of the benchmarks: generates the missing images, and scores all of them."""

    EXAMPLE: ClassVar[str]

    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Write the images in the official layout, their scores and results.json to this directory."""
    system: Annotated[_OptionalSystem, tyro.conf.arg(name="")] = field(default_factory=_OptionalSystem)
    prompts: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Read the prompts from this official file, or from a directory of such files; downloaded if not given and if its
    license allows."""
    limit: Count = None
    """Use at most this many prompts, spread evenly over the set; all of them if not given."""
    samples: Count = None
    """Generate this many images for each prompt; the official number if not given."""
    share: Annotated[str, tyro.conf.arg(metavar="K/N")] = ""
    """Generate share K (from 0) of N shares and do not score, for N processes with one --out; all in one process if not
    given."""
    score_only: bool = False
    """Generate nothing, and score the images in --out."""
    images: Directory = None
    """Generate nothing, and score external images: a directory in the official layout. The results are written to
    --out."""
    common: Flags = field(default_factory=Common)

    def __post_init__(self) -> None:
        at_least_one("--limit", self.limit)
        at_least_one("--samples", self.samples)
        if self.share and not _is_share(self.share):
            raise UsageError(f"--share {self.share}: give K/N with K below N, such as 0/4")
        generates = not (self.score_only or self.images)
        if generates and not self.system.model:
            raise UsageError("--model is missing; or give --score-only or --images DIR, which generate nothing")
        if not generates and self.system != _OptionalSystem():
            raise UsageError("--score-only and --images generate nothing; leave --model and its options out")
        if self.score_only and (self.images or self.prompts or self.limit or self.samples or self.share):
            raise UsageError(
                "--score-only scores all images in --out; leave --images, --prompts, --limit, --samples and --share out"
            )
        if not generates and not self.scorer:
            raise UsageError(f"the scorer is missing; give {self.scorer_option}")

    scorer_option: ClassVar[str]

    @property
    @abc.abstractmethod
    def scorer(self) -> bool:
        """Whether a scorer is given."""

    @abc.abstractmethod
    def benchmark(self) -> "Benchmark":
        """Returns the benchmark."""

    @abc.abstractmethod
    def check_scorer(self) -> None:
        """Raises ClvrError for a scorer that cannot be used, before images are generated."""

    @abc.abstractmethod
    def build_scorer(self) -> "Scorer":
        """Loads the scorer."""

    def run(self) -> Result:
        """Generates and scores the images, and writes results.json."""
        prepare_jax()
        from clvr_jax.files.locks import locked_output
        from clvr_jax.files.output_paths import check_output_directory

        benchmark = self.benchmark()
        check_output_directory(self.out)
        if self.scorer:
            self.check_scorer()
        share = (0, 1) if self.images or self.score_only else self._share()
        with locked_output(self.out, share):
            return self._run(benchmark, share)

    def _run(self, benchmark: "Benchmark", share: tuple[int, int]) -> Result:
        """Generates a share of the images, and scores them unless other processes generate the rest."""
        from clvr_jax.evaluation.harness.images import load_external, load_generated
        from clvr_jax.evaluation.harness.scoring import score_images
        from clvr_jax.evaluation.reporting.run import rich_results

        if self.images:
            samples = self.samples or benchmark.samples
            images = load_external(benchmark, self._items(benchmark), self.images, samples, self.out)
        elif self.score_only or self._generate(benchmark, share):
            images = load_generated(benchmark, self.out)
        else:
            advice = f"not scored; score with {self.scorer_option} --score-only, or with the official scorer"
            return Result({"benchmark": benchmark.name, "out": str(self.out)}, f"{self.out}: generated, {advice}")
        with progress_on_first_report(f"{benchmark.title}, scoring") as on_progress:
            results = score_images(images, self.build_scorer(), on_progress)
        data = {key: value for key, value in results.items() if key != "pictures"}
        return Result({**data, "out": str(self.out)}, rich_results(results, f"{benchmark.title}, {self.out}"))

    def _share(self) -> tuple[int, int]:
        """Returns which share of the images this process generates, and the number of shares."""
        if self.share:
            number, _, count = self.share.partition("/")
            return int(number), int(count)
        import jax

        from clvr_jax.training.distributed import Cluster

        Cluster().initialize()
        return jax.process_index(), jax.process_count()

    def _generate(self, benchmark: "Benchmark", share: tuple[int, int]) -> bool:
        """Generates missing images; returns whether they are scored by this process."""
        from clvr_jax.evaluation.harness.images import generate_images

        samples = self.samples or benchmark.samples
        benchmark.check_samples(samples)
        self.system.check()
        items = self._items(benchmark)
        system = self.system.build()
        with progress_on_first_report(f"{benchmark.title}, {self.system.title}") as on_progress:
            generate_images(
                benchmark,
                items,
                system,
                self.out,
                settings={"prompts": self.prompts.name if self.prompts else "official", "limit": self.limit},
                seed=self.system.seed,
                samples=samples,
                share=share,
                on_progress=on_progress,
            )
        return self.scorer and share[1] == 1

    def _items(self, benchmark: "Benchmark") -> "list[Item]":
        from clvr_jax.evaluation.statistics import spread

        path = self.prompts
        if path is None:
            if benchmark.source is None:
                raise UsageError(f"{benchmark.title}: --prompts PATH is needed: {benchmark.prompts_hint}")
            path = benchmark.source.fetch(benchmark.name)
            console.print(f"[dim]{benchmark.title}: official prompts, license: {benchmark.source.license}[/]")
        return spread(benchmark.read(path), self.limit)


@dataclass(frozen=True, kw_only=True)
class EvalGenEval(_EvalBenchmark):
    """GenEval: 553 prompts, six tags, four images each; scored by a detector and CLIP, whose weights you provide."""

    EXAMPLE: ClassVar = (
        "clvr eval geneval --model DIR --out out/geneval --detector mask2former-swin-small-coco-instance "
        "--clip clip-vit-large-patch14"
    )

    detector: Directory = None
    """Directory of facebook/mask2former-swin-small-coco-instance; nothing is scored if not given. It needs PyTorch, as
    --clip does."""
    clip: Directory = None
    """Directory of openai/clip-vit-large-patch14, which goes with --detector."""
    scorer_option: ClassVar = "--detector DIR --clip DIR"

    def __post_init__(self) -> None:
        if (self.detector is None) != (self.clip is None):
            raise UsageError("--detector and --clip must be given together; give both")
        super().__post_init__()

    @property
    @override
    def scorer(self) -> bool:
        return self.detector is not None

    @override
    def benchmark(self) -> "Benchmark":
        from clvr_jax.evaluation.benchmarks.geneval import GenEval

        return GenEval()

    @override
    def check_scorer(self) -> None:
        from clvr_jax.evaluation.benchmarks.geneval_detector import check_models

        assert self.detector is not None
        assert self.clip is not None
        check_models(self.detector, self.clip)

    @override
    def build_scorer(self) -> "Scorer":
        from clvr_jax.evaluation.benchmarks.geneval import DetectorScorer
        from clvr_jax.evaluation.benchmarks.geneval_detector import TorchDetector

        assert self.detector is not None
        assert self.clip is not None
        return DetectorScorer(TorchDetector(self.detector, self.clip))


@dataclass(frozen=True, kw_only=True)
class _EvalJudged(JudgeOptions, _EvalBenchmark):
    """A benchmark whose images a vision-language model scores."""

    rubric: Literal["ours", "official"] = "ours"
    """Whose words the judge reads. ours: those of this package. official: the prompt of the benchmark's own script,
    which is fetched at a pinned commit, so that published scores of the same judge can be compared."""
    scorer_option: ClassVar = "--judge MODEL"

    def __post_init__(self) -> None:
        self.check_judge()
        super().__post_init__()

    @property
    @override
    def scorer(self) -> bool:
        return bool(self.judge)

    @override
    def check_scorer(self) -> None:
        from clvr_jax.evaluation.judging.benchmark import JudgedBenchmark
        from clvr_jax.evaluation.judging.judges import check_local
        from clvr_jax.evaluation.judging.scorer import official_prompt

        benchmark = self.benchmark()
        if self.rubric == "official" and isinstance(benchmark, JudgedBenchmark):
            official_prompt(benchmark)
        if self.judge_url is None:
            check_local(self.judge)
        else:
            self._judge()

    @override
    def build_scorer(self) -> "Scorer":
        from clvr_jax.evaluation.judging.scorer import JudgeScorer

        return JudgeScorer(self._judge(), self.rubric)

    def _judge(self) -> "JudgeModel":
        from clvr_jax.evaluation.judging.judges import endpoint_judge, local_judge
        from clvr_jax.providers.endpoint import Prices

        if self.judge_url is None:
            return local_judge(self.judge, in_flight=self.judge_in_flight, max_tokens=self.judge_tokens)
        return endpoint_judge(
            self.judge,
            self.judge_url,
            self.judge_key_variable or None,
            revision=self.judge_revision,
            in_flight=self.judge_in_flight,
            max_tokens=self.judge_tokens,
            prices=Prices(*self.judge_prices),
            max_seconds=self.judge_max_seconds,
        )


_JUDGED = "--judge gpt-4.1-2025-04-14 --judge-url https://api.openai.com/v1"


@dataclass(frozen=True, kw_only=True)
class EvalGenEvalPP(_EvalJudged):
    """GenEval++: 280 prompts, seven tags; a judge answers a checklist."""

    EXAMPLE: ClassVar = f"clvr eval genevalpp --model DIR --out out/genevalpp {_JUDGED}"

    @override
    def benchmark(self) -> "Benchmark":
        from clvr_jax.evaluation.benchmarks.genevalpp import GenEvalPP

        return GenEvalPP()


@dataclass(frozen=True, kw_only=True)
class EvalImagineBench(_EvalJudged):
    """ImagineBench: 270 fantastic variants of known things; a judge gives three scores."""

    EXAMPLE: ClassVar = f"clvr eval imaginebench --model DIR --out out/imaginebench {_JUDGED}"

    rules: Literal["official", "fixed"] = "fixed"
    """official: score as the official script does, which drops a group and fails on bold labels. fixed: score without
    these faults."""

    @override
    def benchmark(self) -> "Benchmark":
        from clvr_jax.evaluation.benchmarks.imaginebench import ImagineBench

        return ImagineBench(self.rules)


@dataclass(frozen=True, kw_only=True)
class EvalWise(_EvalJudged):
    """WISE: 1,000 prompts that require world knowledge. Its two editions are two benchmarks."""

    EXAMPLE: ClassVar = (
        "clvr eval wise --edition verified --model DIR --out out/wise --judge Qwen3.5-35B-A3B "
        '--judge-url http://localhost:8000/v1 --judge-key-variable ""'
    )

    edition: Literal["legacy", "verified"]
    """legacy: the edition of 2025, with GPT-4o as judge and three scores. verified: the edition of 2026, with other
    prompts, a Qwen judge, and a score that is right or wrong."""

    @override
    def benchmark(self) -> "Benchmark":
        from clvr_jax.evaluation.benchmarks.wise import WiseLegacy, WiseVerified

        return WiseLegacy() if self.edition == "legacy" else WiseVerified()


@dataclass(frozen=True, kw_only=True)
class EvalPrism(_EvalJudged):
    """PRISM-Bench: seven tracks of 100 prompts, which you provide; a judge scores alignment and aesthetics."""

    EXAMPLE: ClassVar = f"clvr eval prism --prompts captions/en --model DIR --out out/prism {_JUDGED}"

    @override
    def benchmark(self) -> "Benchmark":
        from clvr_jax.evaluation.benchmarks.prism import Prism

        return Prism()


@dataclass(frozen=True, kw_only=True)
class EvalDPG(_EvalJudged):
    """DPG-Bench: 1,065 dense prompts, grids of four images; a judge answers one question at a time."""

    EXAMPLE: ClassVar = f"clvr eval dpg --model DIR --out out/dpg {_JUDGED}"

    rules: Literal["official", "fixed"] = "fixed"
    """official: score as the official script does, which skips the first row of questions. fixed: score with it."""

    @override
    def benchmark(self) -> "Benchmark":
        from clvr_jax.evaluation.benchmarks.dpg import DPG

        return DPG(self.rules)


@dataclass(frozen=True, kw_only=True)
class EvalGenEval2(_EvalJudged):
    """GenEval 2: 800 prompts with 3 to 10 atoms; a judge is asked about each atom, and the probability of the right
    answer is its score."""

    EXAMPLE: ClassVar = "clvr eval geneval2 --model DIR --out out/geneval2 --judge Qwen/Qwen3-VL-8B-Instruct"

    @override
    def benchmark(self) -> "Benchmark":
        from clvr_jax.evaluation.benchmarks.geneval2 import GenEval2

        return GenEval2()


PUBLISHED_BENCHMARKS: dict[str, type[Command]] = {
    "geneval": EvalGenEval,
    "geneval2": EvalGenEval2,
    "genevalpp": EvalGenEvalPP,
    "imaginebench": EvalImagineBench,
    "wise": EvalWise,
    "prism": EvalPrism,
    "dpg": EvalDPG,
}
"""Name in `clvr eval` -> command."""


def _is_share(text: str) -> bool:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    return found is not None and int(found[1]) < int(found[2])

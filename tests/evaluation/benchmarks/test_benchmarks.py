"""Official file formats, and how scores become scores: hand-computed, or by the official script where that is said."""

import json

import pytest

from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.evaluation.benchmarks.dpg import DPG
from clvr_jax.evaluation.benchmarks.geneval import GenEval
from clvr_jax.evaluation.benchmarks.geneval2 import GenEval2
from clvr_jax.evaluation.benchmarks.genevalpp import GenEvalPP, checklist
from clvr_jax.evaluation.benchmarks.imaginebench import AXES, ImagineBench
from clvr_jax.evaluation.benchmarks.prism import TRACKS, Prism
from clvr_jax.evaluation.benchmarks.wise import LEGACY_AXES, WiseLegacy, WiseVerified
from clvr_jax.evaluation.harness.sources import Remote, Source, _download, blob_id, github
from clvr_jax.evaluation.harness.summary import ScoredImage, summarize
from clvr_jax.evaluation.judging.benchmark import rubric
from clvr_jax.evaluation.statistics import spread
from tests.evaluation.benchmarks.samples import DPG as DPG_CSV
from tests.evaluation.benchmarks.samples import GENEVAL, GENEVAL2, GENEVALPP, IMAGINE, WISE, write_lines
from tests.providers.server import Reply, dripping

JUDGED = (GenEval2(), GenEvalPP(), ImagineBench(), WiseLegacy(), WiseVerified(), Prism(), DPG())


def summary(benchmark, items, scores):
    """The summary of one image for each item."""
    pairs = enumerate(zip(items, scores, strict=True))
    return summarize(benchmark, [ScoredImage(index, 0, item, score) for index, (item, score) in pairs])


def test_ids_are_those_of_the_official_file_names(tmp_path):
    def ids(benchmark, path):
        return [item.id for item in benchmark.read(path)]

    assert ids(GenEval(), write_lines(tmp_path / "g.jsonl", GENEVAL)) == ["00000", "00001", "00002"]
    assert ids(GenEvalPP(), write_lines(tmp_path / "gpp.jsonl", GENEVALPP)) == ["1", "2"]
    assert ids(ImagineBench(), write_lines(tmp_path / "i.jsonl", IMAGINE)) == ["1", "2", "3", "4"]
    (tmp_path / "merge.json").write_text(json.dumps(WISE))
    assert ids(WiseVerified(), tmp_path / "merge.json") == ["1", "500", "530", "650", "750", "850", "950"]
    (tmp_path / "dpg.csv").write_text(DPG_CSV.format(dependency="2"))
    assert ids(DPG(), tmp_path / "dpg.csv") == ["a", "b"]
    (tmp_path / "en").mkdir()
    for track in TRACKS:
        write_lines(tmp_path / "en" / f"{track}.jsonl", [{"prompt": "p"}, {"prompt": "q"}])
    assert ids(Prism(), tmp_path / "en")[:3] == ["imagination/0", "imagination/1", "entity/0"]
    assert ids(Prism(), tmp_path / "en" / "style.jsonl") == ["style/0", "style/1"]


def test_the_editions_of_wise_draw_their_categories_apart(tmp_path):
    (tmp_path / "w.json").write_text(json.dumps(WISE))
    legacy, verified = ([item.tag for item in one.read(tmp_path / "w.json")] for one in (WiseLegacy(), WiseVerified()))
    assert legacy == ["CULTURE", "TIME", "TIME", "SPACE", "BIOLOGY", "PHYSICS", "CHEMISTRY"]
    assert verified == ["CULTURE", "TIME", "SPACE", "BIOLOGY", "BIOLOGY", "PHYSICS", "CHEMISTRY"]


@pytest.mark.parametrize(
    ("benchmark", "content", "said"),
    [
        (GenEval(), '{"tag": "colors", "prompt": "p"}', "prompts:1: lacks include"),
        (GenEval(), '{"tag": "colors", "prompt": "p", "include": [{"class": "ox", "count": 1}]}', ":1: class 'ox'"),
        (GenEval(), "", "no prompts"),
        (GenEval(), '{"tag": ', "prompts:1: not JSON"),
        (GenEval(), "3", "prompts:1: lacks tag, include, prompt"),
        (GenEvalPP(), '{"tag": "t", "prompt": "p", "include": [{"count": 1}]}', "prompts:1: a clause lacks 'class'"),
        (ImagineBench(), json.dumps({**IMAGINE[0], "note": ""}), "prompts:1: lacks note"),
        (ImagineBench(), json.dumps({**IMAGINE[0], "type": "SOUND"}), "SOUND"),
        (ImagineBench(), f"{json.dumps(IMAGINE[0])}\n{json.dumps(IMAGINE[0])}", "prompts:2: id 1 is already that of"),
        (WiseLegacy(), json.dumps([WISE[0], {**WISE[0]}]), "entry 2: id 1 is already that of"),
        (WiseLegacy(), json.dumps([{**WISE[0], "prompt_id": 1001}]), "prompt_id must be a number from 1 to 1000"),
        (WiseVerified(), "[", "not JSON"),
        (DPG(), "item_id,text\na,b\n", "lacks the columns proposition_id"),
        (DPG(), DPG_CSV.format(dependency="9"), "question 3 of a depends on a missing question"),
        (DPG(), DPG_CSV.format(dependency="x"), "prompts:4: proposition_id and dependency must be numbers"),
        (DPG(), DPG_CSV.format(dependency="2").replace('a,"a dog on a mat",,2', 'a,"a dog",,2'), "another prompt for"),
        (Prism(), '{"prompt": "p"}', "must have the name of its track"),
    ],
)  # fmt: skip
def test_bad_prompt_files_say_where_and_what(benchmark, content, said, tmp_path):
    (tmp_path / "prompts").write_text(content)
    with pytest.raises(ClvrError, match="(?s)" + said.replace("(", r"\(")) as caught:
        benchmark.read(tmp_path / "prompts")
    assert "\n" not in str(caught.value)


def test_a_folder_of_prompts_says_which_files_are_expected(tmp_path):
    with pytest.raises(ClvrError, match=r"lacks cultural_common_sense\.json, .*; the directory needs"):
        WiseLegacy().read(tmp_path)


def test_rubrics_have_their_fields_and_show_the_prompt(tmp_path):
    (tmp_path / "dpg.csv").write_text(DPG_CSV.format(dependency="2"))
    write_lines(tmp_path / "style.jsonl", [{"prompt": "a {curly} prompt"}])
    (tmp_path / "w.json").write_text(json.dumps(WISE))
    files = {
        "geneval2": write_lines(tmp_path / "g2.jsonl", GENEVAL2),
        "genevalpp": write_lines(tmp_path / "gpp.jsonl", GENEVALPP),
        "imaginebench": write_lines(tmp_path / "i.jsonl", IMAGINE),
        "wise-legacy": tmp_path / "w.json",
        "wise-verified": tmp_path / "w.json",
        "prism": tmp_path / "style.jsonl",
        "dpg": tmp_path / "dpg.csv",
    }
    for benchmark in JUDGED:
        item = benchmark.read(files[benchmark.name])[0]
        questions = benchmark.questions(item)
        assert all(rubric(name) for name in benchmark.rubrics)
        of_one = {
            "dpg": lambda record: record["questions"][0]["text"],
            "geneval2": lambda record: record["vqa_list"][0][0],
        }
        shown = of_one[benchmark.name](item.record) if benchmark.name in of_one else item.prompt
        assert all(shown in asked.text for asked in questions[:1])
        # No field is left open; JSON that is asked for has single braces.
        assert "{prompt}" not in questions[0].text
        assert "{{" not in questions[0].text


def test_the_checklist_of_genevalpp():
    assert checklist(GENEVALPP[0]) == ["- 5 x cup", "- at most 5 x cup in the whole picture"]
    assert checklist(GENEVALPP[1]) == [
        "- 1 x larger dog in the upper part of the picture",
        "- 1 x smaller red cat in the left part of the picture",
    ]


def test_imaginebench_by_both_rules(tmp_path):
    path = write_lines(tmp_path / "i.jsonl", IMAGINE)
    scores = [dict(zip(AXES, each, strict=True)) for each in ((8, 9, 7), (10, 10, 10), (5, 2, 10), (1, 1, 1))]
    fixed, official = ImagineBench("fixed"), ImagineBench("official")
    items = fixed.read(path)
    scores = [fixed.score(item, {"scores": each}) for item, each in zip(items, scores, strict=True)]
    assert [mark.score for mark in scores] == pytest.approx([7.8, 10, 3.6, 1])
    assert summary(fixed, items, scores)["overall"]["score"] == pytest.approx((3 * 7.8 + 2 * 10 + 2 * 3.6 + 2 * 1) / 9)
    assert summary(official, items, scores)["overall"]["score"] == pytest.approx(
        (3 * 7.8 + 2 * 10 + 2 * 3.6) / 7
    )  # without Multi-Object
    assert official.score(items[0], {"scores": dict.fromkeys(AXES, -1.0)}).score == -1
    assert (official.attempts, len(official.faults), fixed.faults) == (1, 3, ())
    assert fixed.scored_as != official.scored_as
    unread = fixed.score(items[0], {"scores": None})
    assert (unread.score, unread.readable) == (0, False)


def test_wise_scores_and_weights(tmp_path):
    (tmp_path / "w.json").write_text(json.dumps(WISE))
    legacy, verified = WiseLegacy(), WiseVerified()
    items = legacy.read(tmp_path / "w.json")
    scores = dict(zip(LEGACY_AXES, (2.0, 1.0, 0.0), strict=True))
    assert legacy.score(items[0], {"scores": scores}).score == pytest.approx((0.7 * 2 + 0.2) / 2)
    scores = [legacy.score(item, {"scores": {**scores, "Consistency": 2 * (item.tag == "TIME")}}) for item in items]
    expected = 0.2 / 2 + 0.167 * 0.7  # realism everywhere, consistency in TIME
    assert summary(legacy, items, scores)["overall"]["score"] == pytest.approx(expected)
    items = verified.read(tmp_path / "w.json")
    scores = [verified.score(item, {"score": float(item.tag in ("CULTURE", "SPACE"))}) for item in items]
    assert summary(verified, items, scores)["overall"]["score"] == pytest.approx(0.4 + 0.12)
    part = summary(verified, items[:2], scores[:2])["overall"]
    assert part == {"score": None, "reason": "no prompt of SPACE, BIOLOGY, PHYSICS, CHEMISTRY"}


def test_prism_is_the_mean_over_all_marks_times_ten(tmp_path):
    benchmark = Prism()
    items = [
        *benchmark.read(write_lines(tmp_path / "style.jsonl", [{"prompt": "p"}] * 3)),
        *benchmark.read(write_lines(tmp_path / "entity.jsonl", [{"prompt": "p"}])),
    ]
    scores = [benchmark.score(item, {"alignment": 8.0, "aesthetic": 4.0}) for item in items[:3]]
    scores.append(benchmark.score(items[3], {"alignment": 10.0, "aesthetic": None}))
    found = summary(benchmark, items, scores)
    assert found["overall"]["score"] == pytest.approx(10 * (3 * (8 + 4) + 10) / 8)
    assert found["tags"]["style"]["score"] == pytest.approx(60)
    assert found["unreadable"] == ["entity/0/0"]


# Answers of four pictures, question by question; the expected scores are those of compute_dpg_bench.py, run on them.
ANSWERS = {
    "a": {"1": "yyyy", "2": "ynyn", "3": "yynn"},
    "b": {"1": "yyny", "2": "nyyy", "3": "yyyn", "4": "yyyn"},
}


def dpg_scores(benchmark, path):
    found = {}
    for item in benchmark.read(path):
        asked = [question.name for question in benchmark.questions(item)]
        scores = [
            benchmark.score(item, {name: ANSWERS[item.id][name][sample] == "y" for name in asked})
            for sample in range(4 if asked else 0)
        ]
        found[item.id] = sum(mark.score for mark in scores) / 4 if asked else None
    return found


def test_dpg_by_both_rules(tmp_path):
    path = tmp_path / "dpg.csv"
    path.write_text(DPG_CSV.format(dependency="2"))
    assert dpg_scores(DPG("official"), path) == {"a": 37.5, "b": 56.25}
    assert dpg_scores(DPG("fixed"), path) == {"a": pytest.approx(100 * (3 + 1 + 2 + 1) / 12), "b": 56.25}
    path.write_text(DPG_CSV.format(dependency="1,2"))
    # The official script fails on the first prompt then, and goes on without it.
    assert dpg_scores(DPG("official"), path) == {"a": None, "b": 56.25}


def test_a_short_run_meets_every_part_of_a_benchmark(tmp_path):
    items = ImagineBench().read(write_lines(tmp_path / "i.jsonl", IMAGINE))
    assert [item.id for item in spread(items, 2)] == ["1", "3"]
    assert spread(items, 9) == spread(items, None) == items


def test_samples_that_a_grid_has_no_place_for():
    DPG().check_samples(1)
    DPG().check_samples(4)
    with pytest.raises(UsageError, match="grid of 4"):
        DPG().check_samples(2)


def test_pinned_files_have_their_official_names():
    for benchmark in (GenEval(), *JUDGED):
        for remote in benchmark.source.files if benchmark.source else ():
            assert remote.url.startswith("https://raw.githubusercontent.com/")
            assert len(remote.blob) == 40
    assert github("a/b", "c" * 40, {"d/Geneval++.jsonl": "e" * 40})[0].name == "Geneval++.jsonl"


def test_prompts_are_fetched_once_and_checked(server, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    content = b"prompts\n"
    assert blob_id(content) == "a7ca217d2ca94811df3ad62a8a4deb34cc6f28d6"  # git hash-object
    server.script = [Reply(content)]
    source = Source((Remote(server.url + "/a.jsonl", blob_id(content)),), license="MIT")
    path = source.fetch("toy")
    assert source.fetch("toy") == path
    assert (path.read_bytes(), path.name, len(server.seen)) == (content, "a.jsonl", 1)
    with pytest.raises(ClvrError, match=r"is not the pinned one.*--prompts PATH"):
        Source((Remote(server.url + "/b.jsonl", "0" * 40),), license="MIT").fetch("toy")
    with pytest.raises(ClvrError, match=r"cannot be fetched.*--prompts PATH"):
        Source((Remote("http://127.0.0.1:9/c.jsonl", "0" * 40),), license="MIT").fetch("toy")


@pytest.mark.parametrize(
    "head",
    [
        b"neither HTTP nor anything else\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX-Header: ",
    ],
)
def test_a_server_of_prompts_that_lies_or_drips_ends_in_one_line(head, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("clvr_jax.evaluation.harness.sources._MOST_SECONDS", 0.3)
    with dripping(head) as url, pytest.raises(ClvrError, match=r"jsonl cannot be fetched") as caught:
        _download(f"{url}/prompts.jsonl", "geneval", "give the file with --prompts PATH")
    assert "\n" not in str(caught.value)

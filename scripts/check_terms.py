"""Checks that the project uses the terms of the field: prints every banned word and fails if there is one.

    python scripts/check_terms.py

The directories of `CLEAN` are checked, comments, docstrings and messages included; add a directory when its language
has been revised. `EXCEPTIONS` holds the only places where a banned word is right.
"""

import re
import sys
from pathlib import Path

BANNED = {
    r"pictures?": "image",
    r"folders?": "directory",
    r"drawings?": "generated image, generation",
    r"drawers?|painters?": "image generator",
    r"roll-outs?": "rollout",
    r"merits": "sample weights",
    r"goes on|go on": "resumes",
    r"made elsewhere": "external",
    r"turned over": "transposed",
    r"told": "say what happens",
    r"stands|lies": "is stored, is located",
    r"how-many(th)?": "index, number",
}
CLEAN = (
    "CONTRIBUTING.md",
    "README.md",
    "clvr_jax",
    "configs",
    "convert",
    "docs",
    "launch",
    "scripts",
    "tests/data",
    "tests/rewards",
    "tests/worlds",
)
EXCEPTIONS = {
    "CONTRIBUTING.md": ("lies",),  # the name of a file
    "clvr_jax/scripts/paper.py": ("drawing",),  # an input of cached results
    "docs/how-to/benchmarks.md": ("drawings",),  # a rule of GenEval++
    "docs/how-to/converting.md": ("folder",),  # an option, and a variable in an example
    "docs/how-to/data-engine.md": ("picture",),  # an option
    "docs/how-to/systems-and-budgets.md": ("picture", "pictures"),  # options
    "docs/how-to/training-on-tpu-pods.md": ("folder",),  # an error message
    "docs/reference/faults.md": ("lies",),  # the name of a module
    "scripts/check_terms.py": None,  # the table itself
    # The texts that judges read: another wording would give other scores.
    "clvr_jax/evaluation/benchmarks/genevalpp.py": ("picture",),
    "clvr_jax/evaluation/benchmarks/prism.py": ("picture",),
    **{
        f"clvr_jax/evaluation/benchmarks/rubrics/{name}.md": None
        for name in (
            "dpg",
            "genevalpp",
            "imaginebench",
            "prism_aesthetic",
            "prism_alignment",
            "wise_legacy",
            "wise_verified",
        )
    },
    # The texts that models read: the grammars of prompts, and a reply of the oracle.
    "clvr_jax/worlds/shapes/language/grammar.py": ("picture", "drawing"),
    "clvr_jax/worlds/shapes/oracle.py": ("picture",),
    "clvr_jax/worlds/shapes/language/second_grammar.py": ("stands", "lies", "drawing"),
    "clvr_jax/worlds/shapes/language/training_words.py": ("picture", "drawing"),
    # The texts that models read: the questions of judges.
    "clvr_jax/rewards/proxy_prompt_generator.py": ("picture",),
    "clvr_jax/rewards/unified_reward.py": ("picture", "pictures"),
    # The templates of prompts.
    **{
        f"clvr_jax/data/engine/roles/templates/{name}.md": None
        for name in ("check", "checklist", "director", "judge", "proxies", "replies", "validate", "verdict")
    },
    "clvr_jax/data/shapes_verification.py": ("picture",),  # prompts of training chats
    # Texts of models, of requests and of errors in tests, and names of the test server.
    "tests/data/engine/cooperative_server.py": ("pictures",),
    "tests/data/engine/exact_generator.py": ("pictures",),
    "tests/data/engine/test_endpoints.py": ("picture", "pictures"),
    "tests/data/engine/test_engine.py": ("picture", "pictures"),
    "tests/data/engine/test_faults.py": ("picture", "pictures"),
    "tests/data/engine/test_intake.py": ("picture",),
    "tests/data/engine/test_prompted_roles.py": ("picture",),
    "tests/data/preprocessing/test_conversations.py": ("painter",),
    "tests/rewards/test_proxy_prompt_generator.py": ("picture", "pictures"),
    "tests/rewards/test_shapes.py": ("picture",),
    "tests/rewards/test_unified_reward.py": ("picture",),
    "tests/worlds/test_second_grammar.py": ("stands", "lies"),
    # The texts that models read: prompts, and the errors that are sent back to them.
    "clvr_jax/data/engine/actions.py": ("picture", "pictures"),
    "clvr_jax/data/engine/roles/prompted.py": ("picture", "pictures", "drawing"),
    "clvr_jax/commands/eval/benchmarks.py": ("pictures",),  # an option
    "clvr_jax/commands/eval/system.py": ("picture", "pictures"),  # options
    "clvr_jax/interfaces/usage.py": ("pictures",),  # a field in results on disk
    # The types of results on disk, whose keys are fields there.
    "clvr_jax/evaluation/comparison/scaling.py": ("folder",),
    "clvr_jax/evaluation/comparison/systems.py": ("folders",),
    "clvr_jax/evaluation/harness/results.py": ("pictures",),
    "clvr_jax/evaluation/judging/questions.py": ("pictures",),
    "clvr_jax/providers/endpoint.py": ("picture", "pictures"),  # an option of recipes, and the same field
    "clvr_jax/providers/local.py": ("pictures",),  # the same field
    "clvr_jax/providers/loop_roles.py": ("picture", "painter"),  # a prompt
    "clvr_jax/reasoning/verification/verification.py": ("stands",),  # a prompt
    "clvr_jax/reasoning/conversation/actions.py": (
        "picture",
        "pictures",
        "painter",
    ),  # a prompt
}
"""File -> the banned words that are right there, such as names in a file format; None for all."""
GENERATED = "docs/reference/generated/"
"""Pages that `make docs` writes from code, which is checked itself."""
IGNORED = re.compile(r"""["'](?:pictures?|folders?|drawings?)["']""")
"""Code that is not checked: keys of file formats, which must stay readable."""


def main() -> int:
    """Prints FILE:LINE, the word and the term to use; returns 1 if any word was found."""
    root, found = Path(__file__).parents[1], 0
    pattern = re.compile("|".join(rf"(?P<g{i}>\b(?:{word})\b)" for i, word in enumerate(BANNED)), re.IGNORECASE)
    terms = list(BANNED.values())
    for path in sorted(file for name in CLEAN for file in (root / name, *(root / name).rglob("*"))):
        name = path.relative_to(root).as_posix()
        if path.suffix not in (".py", ".md", ".sh", ".yaml") or EXCEPTIONS.get(name, ()) is None or GENERATED in name:
            continue
        lines = path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, start=1):
            if path.suffix == ".py":
                line = IGNORED.sub("", line)
            for match in pattern.finditer(line):
                if match[0].lower() not in EXCEPTIONS.get(name, ()):
                    term = next(terms[int(group[1:])] for group, text in match.groupdict().items() if text)
                    print(f"{name}:{number}: {match[0]!r}; use: {term}")
                    found += 1
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())

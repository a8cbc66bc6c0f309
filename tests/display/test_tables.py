"""Tables in Markdown and for the terminal, in which names and texts are text, never markup."""

import io

import pytest
from rich.console import Console

from clvr_jax.display.plots import can_plot, literal, new_figure
from clvr_jax.display.tables import Table, plain


def test_what_a_name_says_is_text():
    assert plain("<script>alert(1)</script>") == "&lt;script&gt;alert(1)&lt;/script&gt;"
    assert plain("a|b\n[c](http://x)") == "a\\|b \\[c\\](http://x)"
    assert plain("\udcff").encode() == b"\\udcff"
    assert plain("closed-loop, 4 steps") == "closed-loop, 4 steps"


def test_a_name_makes_no_new_cell():
    lines = Table(["", "a|b"], [[["x|<b>", "0.5 [0.4 .. 0.6]"]], [["y", "1|2"]]]).markdown()
    assert lines == ["|  | a\\|b |", "| --- | --- |", "| x\\|&lt;b&gt; | 0.5 [0.4 .. 0.6] |", "| y | 1\\|2 |"]
    assert Table(["`a`", "b"], [[["[c](d)", "e"]]], is_markdown=True).markdown()[::2] == [
        "| `a` | b |",
        "| [c](d) | e |",
    ]


def test_totals_name_their_parts():
    table = Table(["", "rate"], [[["images", ".5"], ["noise", ".4"]], [["other", ".1"]]], has_totals=True)
    assert table.markdown()[2:] == ["| **images** | .5 |", "| images: noise | .4 |", "| **other** | .1 |"]


def test_the_terminal_shows_every_text_as_it_is():
    table = Table(["", "[red]score"], [[["[bold]a", "0.5 [0.4, 0.6]"]], [["b", "1"]]], title="[i]t", caption="[/]c")
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table.rich())
    shown = console.export_text()
    for text in ("[i]t", "[/]c", "[red]score", "[bold]a", "0.5 [0.4, 0.6]"):
        assert text in shown


@pytest.mark.skipif(not can_plot(), reason="needs matplotlib")
def test_a_dollar_in_a_name_begins_no_formula():
    figure = new_figure(2, 2)
    figure.add_subplot().plot([0, 1], label=literal("cost $\\frac{$"))
    figure.axes[0].legend()
    figure.savefig(io.BytesIO())  # a formula that cannot be read is a ValueError here

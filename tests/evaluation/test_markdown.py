"""Names and texts in reports are text, never markup."""

import io

import pytest

from clvr_jax.plots import can_plot, literal, new_figure
from clvr_jax.tables import plain, table_lines


def test_what_a_name_says_is_text():
    assert plain("<script>alert(1)</script>") == "&lt;script&gt;alert(1)&lt;/script&gt;"
    assert plain("a|b\n[c](http://x)") == "a\\|b \\[c\\](http://x)"
    assert plain("\udcff").encode() == b"\\udcff"
    assert plain("closed-loop, 4 steps") == "closed-loop, 4 steps"


def test_a_name_makes_no_new_cell():
    lines = table_lines([["", "a|b"], ["x|<b>", "0.5 [0.4 .. 0.6]"]])
    assert lines == ["|  | a\\|b |", "| --- | --- |", "| x\\|&lt;b&gt; | 0.5 [0.4 .. 0.6] |"]


@pytest.mark.skipif(not can_plot(), reason="needs matplotlib")
def test_a_dollar_in_a_name_begins_no_formula():
    figure = new_figure(2, 2)
    figure.add_subplot().plot([0, 1], label=literal("cost $\\frac{$"))
    figure.axes[0].legend()
    figure.savefig(io.BytesIO())  # a formula that cannot be read is a ValueError here

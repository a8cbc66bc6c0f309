"""How the command line ends: what stdout or stderr cannot take, and Ctrl-C that somebody swallows."""

import io
import json
import os
import signal
import sys
from dataclasses import dataclass, field

import pytest
from rich.table import Table

from clvr_jax import cli
from clvr_jax.commands.common import Common, Result
from clvr_jax.display.console import console, print_error, progress
from clvr_jax.interrupts import check_interrupt

WORDS = "naïve 猫 ✓ …"


@dataclass(frozen=True)
class Fake:
    """Stands in for a command."""

    act: object = None
    common: Common = field(default_factory=Common)

    def run(self):
        if self.act:
            self.act()
        table = Table(title=WORDS)
        table.add_column(WORDS)
        table.add_row("✓ é")
        return Result({"prompt": WORDS, "raw": "\udcff"}, table)


@pytest.fixture(autouse=True)
def _heard_interrupts():
    """A shell starts background jobs with SIGINT ignored, and the suite may be one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def run(monkeypatch):
    def start(act=None, as_json=False):
        monkeypatch.setattr(cli, "parse", lambda _: Fake(act, Common(json=as_json)))
        return cli.main(["fake"])

    return start


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
@pytest.mark.parametrize("as_json", [True, False])
def test_any_encoding_of_the_terminal_gets_the_result(encoding, as_json, run, monkeypatch, capsys):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    assert run(as_json=as_json) == 0
    text = written.getvalue().decode(encoding)
    if as_json:
        assert json.loads(text) == {"prompt": WORDS, "raw": "\udcff"}
    else:
        assert ("猫" in text) == (encoding == "utf-8")
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("as_json", [True, False])
def test_a_full_stdout_is_one_line_after_the_work(as_json, run, monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert run(as_json=as_json) == 1
    assert capsys.readouterr().err == (
        "clvr: standard output cannot be written (No space left on device); the command itself was completed\n"
    )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("words", [["--help"], ["verify", "--help"], ["plan", "shapes_vae", "--help"], ["eval"]])
def test_a_help_that_stdout_cannot_take_is_one_line(words, monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        code = cli.main(words)
    (line,) = capsys.readouterr().err.splitlines()
    if "--help" in words:
        assert (code, line) == (1, "clvr: standard output cannot be written (No space left on device)")


def test_a_help_whose_reader_has_gone_ends_well(monkeypatch, capsys):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        with pytest.raises(SystemExit) as ended:
            cli.main(["--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_progress_that_cannot_be_shown_does_not_end_the_work(run, monkeypatch, capsys):
    done = []

    def work():
        with progress("work", 3, seconds_between_lines=0) as advance:
            for number in range(3):
                console.print(f"step {number}")
                advance(number + 1)
                done.append(number)

    for broken in (open("/dev/full", "w", buffering=1), None, io.StringIO()):  # noqa: SIM115
        if isinstance(broken, io.StringIO):
            broken.close()
        monkeypatch.setattr(sys, "stderr", broken)
        assert run(work) == 0
    assert done == [0, 1, 2] * 3


def press_ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def swallowed():
    try:
        press_ctrl_c()
        signal.sigtimedwait([], 1)
    except KeyboardInterrupt:
        pass


def test_a_swallowed_interrupt_ends_the_run_at_the_next_report_of_progress(run, capsys):
    done = []

    def work():
        with progress("work", 3) as advance:
            swallowed()
            done.append("before")
            advance(1)
            done.append("after")

    assert run(work) == 130
    assert done == ["before"]
    assert capsys.readouterr().err.splitlines()[-1] == "clvr: interrupted"


def test_a_swallowed_interrupt_is_never_exit_0_or_another_error(run, capsys):
    def turned():
        swallowed()
        raise ValueError("INTERNAL: CpuCallback error")

    for act in (swallowed, turned):
        assert run(act) == 130
        assert capsys.readouterr().err == "clvr: interrupted\n"
        check_interrupt()  # a program that calls the command is not interrupted again
    assert run() == 0  # the next command knows nothing of it
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    check_interrupt()


def test_an_interrupt_inside_a_callback_of_jax(run, capsys):
    import jax
    import jax.numpy as jnp

    def callback(_):
        press_ctrl_c()

    def work():
        jax.block_until_ready(jax.jit(lambda x: jax.debug.callback(callback, x))(jnp.zeros(())))
        jax.effects_barrier()
        with progress("work", 1) as advance:
            advance(1)

    assert run(work) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "clvr: interrupted"


def test_what_commands_a_terminal_is_shown_and_not_sent(monkeypatch, capsys):
    words = "\x1b]0;title\x07 \x9b2J \u202eabc 猫 tab\tend"
    print_error(words)
    assert capsys.readouterr().err == "clvr: \\x1b]0;title\\x07 \\x9b2J \\u202eabc 猫 tab end\n"
    monkeypatch.setattr(cli, "parse", lambda _: Says(words))
    assert cli.main(["fake"]) == 0
    shown = capsys.readouterr().out
    assert "\\x1b]0;title\\x07" in shown
    assert not any(character in shown for character in "\x1b\x07\x9b\u202e")


def test_a_line_of_error_has_an_end_however_long_a_name_is(capsys):
    print_error(f"{'x' * 100_000} is no name; choose another")
    (line,) = capsys.readouterr().err.splitlines()
    assert len(line) < 2000
    assert line.endswith("is no name; choose another")


@dataclass(frozen=True)
class Says:
    """Stands in for a command whose result is a text."""

    text: str
    common: Common = field(default_factory=Common)

    def run(self):
        return Result({}, self.text)

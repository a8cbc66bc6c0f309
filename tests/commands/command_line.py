"""What tests of commands share: a prompt, and how errors are read."""

PROMPT = "a red circle left of a blue star"


def complaint(capsys) -> str:
    """The one line on stderr; nothing may stand on stdout."""
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("clvr: ")
    return lines[0]

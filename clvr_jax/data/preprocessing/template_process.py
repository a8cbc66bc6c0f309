"""A program that renders chat templates within limits; `chat_templates` starts it.

It reads requests from stdin and writes replies to stdout, one line of JSON each:

    {"template": text, "conversations": [messages, ...], "options": {name: value}}
    {"texts": [text, ...]}  or  {"error": text}

The kernel ends it without a reply when a conversation takes more processor time than its argument, in seconds.
"""

import contextlib
import json
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

MEMORY_BYTES = 1 << 30
"""Memory of the process."""
MAX_CHARACTERS = 16 << 20
"""Maximum length of the text of a conversation."""


def _reply(render: Callable[..., Any], request: dict[str, Any], seconds: float) -> dict[str, Any]:
    texts: list[str] = []
    try:
        for conversation in request["conversations"]:
            signal.setitimer(signal.ITIMER_PROF, seconds)
            texts += render([conversation], chat_template=request["template"], **request["options"])[0]
    except MemoryError:
        return {"error": f"rendering a conversation takes more than {MEMORY_BYTES >> 30} GiB of memory"}
    except RecursionError:
        return {"error": "a macro or a loop calls itself without end"}
    except Exception as error:  # noqa: BLE001 - whatever Jinja or Python raises for a program from outside
        return {"error": f"{error or type(error).__name__}"}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if max(map(len, texts)) > MAX_CHARACTERS:
        return {"error": f"renders a conversation to more than {MAX_CHARACTERS:,} characters"}
    return {"texts": texts}


def main() -> None:
    """Replies to requests until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the other process's; this one ends with its stdin
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    # Not at the top: it takes a second, in which Ctrl-C must not end this process either.
    from transformers.utils.chat_template_utils import render_jinja_template

    with contextlib.suppress(ValueError, OSError):  # a lower limit is set already
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    for line in sys.stdin.buffer:
        reply = _reply(render_jinja_template, json.loads(line), float(sys.argv[1]))
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

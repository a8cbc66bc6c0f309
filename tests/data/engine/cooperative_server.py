"""Replies of an OpenAI-compatible server with which each prompt becomes a trajectory of two images.

Images have one color: edited ones are light, others are dark; the judges prefer light ones.
"""

import base64
import io
import json
import re
from typing import Any

import numpy as np
from PIL import Image

from tests.providers.server import Reply, Seen, completion, pictures, png

DARK, LIGHT = (np.full((8, 8, 3), value, np.uint8) for value in (40, 200))


def answer(seen: Seen) -> Reply:
    """Returns the reply to a request of the loopback server."""
    return reply_to(seen.path, seen.json)


def reply_to(path: str, request: dict[str, Any]) -> Reply:
    """Returns the reply to a request, given by its path and its JSON."""
    if path.endswith("/images/generations"):
        return pictures(png(LIGHT if request.get("image") else DARK))
    parts = request["messages"][0]["content"]
    text = parts if isinstance(parts, str) else parts[-1]["text"]
    urls = [] if isinstance(parts, str) else [part["image_url"]["url"] for part in parts[:-1]]
    return completion(json.dumps(reply_to_template(text, [_is_light(url) for url in urls])))


def reply_to_template(text: str, lights: list[bool]) -> dict:
    """Returns the reply to a filled-in template; `lights` has whether each image is light."""
    if text.startswith("You make an image"):
        return _turn(text, lights)
    if text.startswith("An image tool"):
        return {"questions": ["Is there anything?"]}
    if "Answer each of these questions" in text:
        return {"answers": [{"answer": "yes", "evidence": "a color"}]}
    if "Which one meets" in text:
        return {"reason": "light", "better": "first" if lights[0] else "second"}
    if "Tell it again" in text:
        return {"texts": ["Plan: a color; light. Draw the color.", "I see it dark. Unmet: light. Make it light.",
                          "I see it light. Unmet: nothing."]}  # fmt: skip
    if "write two short texts" in text:
        if len(lights) == 1:
            return {"p_t2i": "a color", "p_i2i": "", "i_ref": []}
        return {"p_t2i": "a light color", "p_i2i": "make it light", "i_ref": [0]}
    return {"accepted": lights[-1], "gaps": [] if lights[-1] else ["light"], "feedback": "", "roll_back_to": None}


def _turn(text: str, lights: list[bool]) -> dict:
    allowed = re.findall(r"^- (\w+):", text, re.MULTILINE)
    if "INITIAL_GENERATION" in allowed:
        action, parameters = "INITIAL_GENERATION", {"prompt": "a color"}
    elif not lights[-1]:
        action, parameters = "IMAGE_EDIT", {"prompt": "make it light", "ref_img_list": [0]}
    else:
        action, parameters = ("END_TRAJECTORY" if "END_TRAJECTORY" in allowed else "RESULT_VALIDATION"), {}
    return {"perceive": "a canvas", "reason": "it is time", "action": action, "parameters": parameters}


def _is_light(url: str) -> bool:
    image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    return bool(np.asarray(image).mean() > 100)

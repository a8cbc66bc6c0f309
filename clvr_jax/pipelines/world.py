"""The world a model was trained for, and the words it never saw."""

from clvr_jax.files import read_json
from clvr_jax.pipelines.registry import resolve
from clvr_jax.worlds.shapes.grammar import vocabulary, words


def unseen_words(model: str, prompt: str) -> list[str]:
    """Words of `prompt` that a small model never saw in training, in order; none for models without a world.

    Args:
      model: shipped name or folder; its clvr.json names the world.
      prompt: what is to be drawn.
    """
    path, _ = resolve(model)
    settings = path / "clvr.json"
    sections = read_json(settings).values() if settings.exists() else ()
    if not any(isinstance(section, dict) and section.get("world") == "shapes" for section in sections):
        return []
    known = vocabulary()
    return [word for word in dict.fromkeys(words(prompt)) if word not in known]

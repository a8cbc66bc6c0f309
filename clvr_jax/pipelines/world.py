"""The vocabulary of small models that were trained for one world."""

from clvr_jax.files.atomic_io import read_json
from clvr_jax.files.file_names import has_entry
from clvr_jax.pipelines.registry import resolve
from clvr_jax.worlds.shapes.language.grammar import vocabulary, words


def unseen_words(model: str, prompt: str) -> list[str]:
    """Returns the words of a prompt that a small model never saw in training, in order; [] for models without a world.

    Args:
      model: shipped name or directory; its clvr.json names the world.
      prompt: describes the image.
    """
    path, _ = resolve(model)
    settings = path / "clvr.json"
    sections = read_json(settings).values() if has_entry(settings) else ()
    if not any(isinstance(section, dict) and section.get("world") == "shapes" for section in sections):
        return []
    known = vocabulary()
    return [word for word in dict.fromkeys(words(prompt)) if word not in known]

"""Names of models that come with the package, and how a name or path becomes a folder."""

import dataclasses
from pathlib import Path

from clvr_jax.errors import ClvrError

SHIPPED = Path(__file__).resolve().parent.parent / "shipped"


@dataclasses.dataclass(frozen=True)
class Shipped:
    """A model in the package: its folder, and the subfolder its transformer is in."""

    folder: str
    transformer: str = "transformer"


MODELS = {
    "shapes-tiny": Shipped("shapes-tiny"),
    # The same pipeline before it learned to follow trajectories; merges start from it.
    "shapes-tiny-base": Shipped("shapes-tiny", transformer="transformer_base"),
}


def resolve(model: str) -> tuple[Path, str]:
    """Model name or folder -> (pipeline folder, subfolder of the transformer).

    Raises: ClvrError for a name that is neither shipped nor a folder, and for a folder without model_index.json.
    """
    if model in MODELS:
        shipped = MODELS[model]
        path, transformer = SHIPPED / shipped.folder, shipped.transformer
    else:
        path, transformer = Path(model).expanduser(), "transformer"
    if not path.is_dir():
        raise ClvrError(f"{model}: no such model; give a folder in diffusers layout or one of {', '.join(MODELS)}")
    if not (path / "model_index.json").exists():
        raise ClvrError(f"{path}: not a pipeline folder, model_index.json is missing")
    return path, transformer

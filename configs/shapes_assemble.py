"""Puts the trained parts of the shapes world together: the folder that ships with the package.

python -m clvr_jax.configs.shapes_assemble --out runs/shapes-tiny
"""

import shutil
from pathlib import Path

from clvr_jax.arguments import run_script
from clvr_jax.errors import ClvrError
from clvr_jax.files import replacing


def main(
    out: Path = Path("runs/shapes-tiny"),
    sft: Path = Path("runs/shapes_sft/export"),
    base: Path = Path("runs/shapes_base/export"),
    controller: Path = Path("runs/shapes_controller/export"),
) -> None:
    """The fine-tuned pipeline, the base's transformer as `transformer_base`, and the controller."""
    parts = {".": sft, "transformer_base": base / "transformer", "controller": controller}
    for part in parts.values():
        if not part.is_dir():
            raise ClvrError(f"{part}: no such folder; train it first, see make reproduce")
    with replacing(out) as temporary:
        for name, part in parts.items():
            shutil.copytree(part, temporary / name, dirs_exist_ok=True)


if __name__ == "__main__":
    run_script(main)

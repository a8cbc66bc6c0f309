"""Runs the tutorials of docs/tutorials/ in new kernels and writes them with their outputs; a cell that fails ends it.

    python scripts/run_notebooks.py --out build/notebooks

Each notebook runs in a directory of its own, so what it writes stays out of the repository. Those about published
weights run with small random models of the same classes: they have a cell with the tag `parameters`, and a cell with
other values follows it here. It needs the extra `notebooks`.
"""

import argparse
import os
import re
import resource
import sys
import tempfile
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).parents[1]
COLOR = r"\x1b\[[0-9;]*m"
TUTORIALS = ROOT / "docs" / "tutorials"
DEVICES = {"klein-lora": 2}
"""Notebook -> number of virtual devices on which it runs; 1 if it is not here."""
PARAMETERS = "parameters"


def main() -> int:
    """Runs the notebooks that are named, or all; returns 1 if a cell failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="Names of tutorials, such as first-image; all if none is given.")
    parser.add_argument("--out", type=Path, default=Path("build/notebooks"), help="Directory for the .ipynb files.")
    options = parser.parse_args()
    known = sorted(path.stem for path in TUTORIALS.glob("*.md") if path.stem != "index")
    unknown = set(options.names) - set(known)
    if unknown:
        parser.error(f"no tutorial {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.names or known:
        notebook = jupytext.read(TUTORIALS / f"{name}.md")
        before = cpu_seconds()
        with tempfile.TemporaryDirectory() as directory:
            environment = dict(os.environ)
            if set_parameters(name, notebook, Path(directory)):
                environment |= compiled_fast(DEVICES.get(name, 1))
            client = NotebookClient(
                notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": directory}}
            )
            try:
                client.execute(env=environment)
            except CellExecutionError as error:
                print(f"{name}: {re.sub(COLOR, '', str(error))}", file=sys.stderr)
                return 1
        nbformat.write(notebook, options.out / f"{name}.ipynb")
        print(f"{name}: {cpu_seconds() - before:.0f} CPU seconds", flush=True)
    return 0


def compiled_fast(devices: int) -> dict[str, str]:
    """Returns an environment with virtual devices for programs that run once or twice, as in `tests/conftest.py`."""
    fast = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {fast} --xla_force_host_platform_device_count={devices}"
    return {"XLA_FLAGS": flags, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def set_parameters(name: str, notebook: nbformat.NotebookNode, directory: Path) -> bool:
    """Adds the values with which a notebook about published weights runs here, behind its own; False for others."""
    cells = notebook.cells
    places = [index for index, cell in enumerate(cells) if PARAMETERS in cell.metadata.get("tags", ())]
    if not places:
        return False
    values = "\n".join(f"{key} = {value!r}" for key, value in parameters(name, directory).items())
    (place,) = places
    cells.insert(
        place + 1, nbformat.v4.new_code_cell(f"# Small random models, in place of the published ones.\n{values}")
    )
    return True


def parameters(name: str, directory: Path) -> dict[str, object]:
    """Saves small random models, and returns the parameters of the notebook that runs with them."""
    sys.path.insert(0, str(ROOT))
    from tests.helpers.models import save_qwen3_vl_that_says, save_small_qwen3_vl, small_flux2

    generator = directory / "models" / "klein"
    small_flux2("shapes-tiny").save_pretrained(str(generator))
    if name == "klein-lora":
        return {"BASE": str(generator), "FAST": str(generator), "SIZE": 64, "STEPS": 4, "BATCH": 2}
    small = save_small_qwen3_vl(directory / "models" / "small")
    # One reply for all questions: as a list of requirements it has two, as a verdict it is none.
    controller = save_qwen3_vl_that_says(
        "Required: a star; Draw it.<|image_gen|><|im_end|>", small, directory / "models" / "controller"
    )
    return {"MODEL": str(generator), "CONTROLLER": str(controller), "SIZE": 64}


def cpu_seconds() -> float:
    """Returns the processor time of this process and of its children that have ended, kernels included."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in usage)


if __name__ == "__main__":
    sys.exit(main())

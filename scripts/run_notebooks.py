"""Runs the tutorials of docs/tutorials/ in new kernels and writes them with their outputs; a cell that fails ends it.

    python scripts/run_notebooks.py --out build/notebooks

Each notebook runs in a directory of its own, so what it writes stays out of the repository. It needs the extra
`notebooks`.
"""

import argparse
import re
import resource
import sys
import tempfile
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

COLOR = r"\x1b\[[0-9;]*m"
TUTORIALS = Path(__file__).parents[1] / "docs" / "tutorials"


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
            client = NotebookClient(
                notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": directory}}
            )
            try:
                client.execute()
            except CellExecutionError as error:
                print(f"{name}: {re.sub(COLOR, '', str(error))}", file=sys.stderr)
                return 1
        nbformat.write(notebook, options.out / f"{name}.ipynb")
        print(f"{name}: {cpu_seconds() - before:.0f} CPU seconds", flush=True)
    return 0


def cpu_seconds() -> float:
    """Returns the processor time of this process and of its children that have ended, kernels included."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in usage)


if __name__ == "__main__":
    sys.exit(main())

"""`clvr launch` from a checkout: trains or generates as one process of several; start it once on every host.

    python launch/train.py configs/shapes_base.py --out /bucket/run
    python launch/train.py --coordinator host0:8476 --processes 2 --process 0 configs/shapes_base.py --out runs/base

`clvr launch --help` explains the options.
"""

import sys

from clvr_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["launch", *sys.argv[1:]]))

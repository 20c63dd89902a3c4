"""Trains as a YAML file says, on every GPU of this machine (or --parallel.virtual-devices N CPU devices).

    python scripts/train.py configs/train/NAME.yaml --optimizer.learning-rate 1e-3 --parallel.tp 4

The same as `jaxtp train`, over several machines with --nnodes and its fellows. A run whose folder has checkpoints goes on
from the last one.
"""

import sys

from jaxtp.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()

"""Up to the clusters.

python jobs/cluster.py configs/digits.yaml [--profile FILE] [--set a.b=c]
"""

import sys
from pathlib import Path

# Under `ray job submit` the package lies beside this folder and is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.core.interrupts import job

if __name__ == "__main__":
    # A signal while the modules below are imported ends in one line too.
    with job():
        from engine.cli import main

        main(until_step="cluster")

"""Verify everything in a storage; with --repair, discard exactly the damaged data.

python jobs/fsck.py [STORAGE] [--profile FILE] [--repair]
"""

import sys
from pathlib import Path

# Under `ray job submit` the package is next to this folder and not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.core.interrupts import job

if __name__ == "__main__":
    # Imported inside the job, so that a signal during the imports also ends in one line.
    with job():
        from engine.cli import main
        from engine.maintenance.commands import run_fsck

        main(run_fsck)

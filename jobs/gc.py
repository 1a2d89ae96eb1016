"""List files that no record of a storage names; with --delete, remove them.

python jobs/gc.py [STORAGE] [--profile FILE] [--older-than DAYS] [--delete]
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
        from engine.maintenance.commands import run_gc

        main(run_gc)

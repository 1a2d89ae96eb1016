"""Check a study's data for problems before anything is trained: one page.

python jobs/audit.py configs/digits.yaml [--profile FILE] [--set a.b=c]
"""

import sys
from pathlib import Path

# Under `ray job submit` the package is next to this folder and not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.core.interrupts import job

if __name__ == "__main__":
    # Imported inside the job, so that a signal during the imports also ends in one line.
    with job():
        from engine.cli import main, run_audit

        main(run_audit)

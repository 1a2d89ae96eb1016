"""Run a study at fractions of its real images: how many real images is a synthetic one worth?

python jobs/exchange_rate.py configs/digits.yaml [--profile FILE] [--set a.b=c]
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
        from engine.exchange import run_exchange_rate

        main(run_exchange_rate)

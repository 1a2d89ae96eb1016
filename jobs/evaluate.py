"""Run a study up to the verdict on test, or score a file of predictions of the test images.

python jobs/evaluate.py configs/digits.yaml [--profile FILE] [--set a.b=c]
python jobs/evaluate.py configs/digits.yaml --predictions FILE --baseline real
"""

import sys
from pathlib import Path

# Under `ray job submit` the package is next to this folder and not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.core.interrupts import job

if __name__ == "__main__":
    # Imported inside the job, so that a signal during the imports also ends in one line.
    with job():
        from engine.cli import main, run_evaluate

        main(run_evaluate)

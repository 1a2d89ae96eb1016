"""Try the settings that a study's section `tune` names, by what they reach on val; write the best
down as a study.

python jobs/tune.py configs/digits.yaml [--profile FILE] [--set a.b=c]
"""

import sys
from pathlib import Path

# Under `ray job submit` the package lies beside this folder and is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.core.interrupts import job

if __name__ == "__main__":
    # A signal while the modules below are imported ends in one line too.
    with job():
        from engine.cli import main_tune

        main_tune()

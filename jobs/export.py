"""Write an arm's images in a form that other tools open.

python jobs/export.py configs/digits.yaml --arm "ddpm x1" --to FOLDER [--format parquet]
"""

import sys
from pathlib import Path

# Under `ray job submit` the package lies beside this folder and is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.core.interrupts import job

if __name__ == "__main__":
    # A signal while the modules below are imported ends in one line too.
    with job():
        from engine.cli import main_export

        main_export()

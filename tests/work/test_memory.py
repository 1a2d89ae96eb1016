import subprocess
import sys

import pytest

# In a process of its own, because the setting is permanent, and in a second thread, whose freed
# memory glibc returns soonest. The arrays are as large as a small network's activations.
_FAULTS = """
import resource, sys, threading
import numpy as np
from engine.work.memory import keep_freed_memory

def work():
    if sys.argv[1] == "keep":
        keep_freed_memory()
    np.ones(2**21, np.float32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        arrays = [np.ones(2**20, np.float32) for _ in range(2)]
        del arrays
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


def page_faults(mode: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", _FAULTS, mode], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
def test_freed_memory_is_reused_without_page_faults():
    assert page_faults("keep") < 0.2 * page_faults("default")

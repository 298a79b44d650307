"""Memory that was freed: kept between members, given back by a process that waits."""

import subprocess
import sys
from pathlib import Path

import pytest

from bids_varaug.machine import keep_freed_memory

CODE = """
import resource, sys, time
import numpy as np
from bids_varaug.machine import keep_freed_memory, release_freed_memory

def held():
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * resource.getpagesize() / 2**20

keep_freed_memory()
before = held()
np.ones(2**25)  # 256 MB
print(held() - before)
release_freed_memory(0.2)
print(held() - before)
if sys.argv[1] == "work":
    keep_freed_memory()
time.sleep(1.5)
print(held() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.skipif(not keep_freed_memory(), reason="needs glibc")
@pytest.mark.parametrize(("then", "kept"), [("wait", False), ("work", True)])
def test_freed_memory_is_kept_until_the_process_waits(then, kept):
    done = subprocess.run([sys.executable, "-c", CODE, then], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    freed, at_once, later = map(float, done.stdout.split())
    assert freed > 250 and at_once > 250
    assert (later > 250) if kept else (later < 20)

"""Damaged images are refused with a message or used; they never crash, hang or eat memory."""

import signal
import time
import tracemalloc
from collections import Counter

import numpy as np

from bids_varaug.errors import ScanError
from bids_varaug.images.conform import prepare_head
from tests.faults.mutations import damaged_file

MAX_SECONDS = 60  # of the processor: the machine may be busy with something else
MAX_BYTES = 4 * 2**30


def test_damaged_images_are_refused_with_a_message_or_used(tmp_path, full):
    def too_slow(*_):
        raise TimeoutError(f"{what}: more than {MAX_SECONDS} s")

    before = signal.signal(signal.SIGPROF, too_slow)
    outcomes, slowest, largest = Counter(), (0.0, ""), (0, "")
    try:
        # The small form leaves out gzip bombs, which take 3 GB.
        for seed in range(200) if full else range(10, 30):
            content, extension, what = damaged_file(seed)
            path = tmp_path / f"sub-{seed:03d}_T1w{extension}"
            path.write_bytes(content)
            tracemalloc.start()
            started = time.process_time()
            signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
            try:
                head, _ = prepare_head(path, 1.0, 32)
                assert np.isfinite(head).all(), what
                outcomes["used"] += 1
            except ScanError as error:
                assert path.name in str(error) and str(error).endswith((".", ").")), what
                outcomes["refused"] += 1
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
                peak = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
            path.unlink()
            slowest = max(slowest, (time.process_time() - started, what))
            largest = max(largest, (peak, what))
    finally:
        signal.signal(signal.SIGPROF, before)
    print(f"{dict(outcomes)}; slowest {slowest[0]:.1f} s ({slowest[1]}); "
          f"most memory {largest[0] / 2**30:.2f} GiB ({largest[1]})")  # fmt: skip
    assert largest[0] < MAX_BYTES, largest
    assert outcomes["refused"] and outcomes["used"]

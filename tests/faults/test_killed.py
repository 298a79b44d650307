"""SIGKILL at random moments, then the same command again."""

import re
import time

import numpy as np

from tests.faults.conftest import digests


def test_killed_at_random_moments_and_resumed_gives_the_same_bits(app, whole, tmp_path, full):
    """Up to five in a row, each in the middle of what resumes the one before; then to the end."""
    kills_wanted = 25 if full else 2
    rng = np.random.default_rng(20261121)
    begun = time.monotonic()
    code, log = app.run(tmp_path / "timed")
    assert code == 0, log
    duration = time.monotonic() - begun
    killed, series, left = 0, 0, 0
    while killed < kills_wanted:
        series += 1
        out = tmp_path / f"series{series}"
        for _ in range(min(5, kills_wanted - killed)):
            process = app.start(out)
            process.join(timeout=rng.uniform(0.1, 1.0) * duration)
            if process.exitcode is None:
                process.kill()
                process.join()
                killed += 1
                left += len(list(out.rglob("*.part")))
        code, log = app.run(out)
        assert code == 0, log
        # Half-written files have names that start with a dot, which readers of BIDS pass over.
        written = digests(out)
        hidden = {name for name in written if re.search(r"/?\.[^/]+\.part$", name)}
        assert {name: digest for name, digest in written.items() if name not in hidden} == whole
    print(f"{killed} kills in {series} series; half-written files seen after a kill: {left}")

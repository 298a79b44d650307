"""Memory does not grow with the number of participants done, who are finished one by one."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from tests.faults.conftest import App, work_of
from tests.workflows.conftest import describe, head, write_t1w

NO_FILES = ("Pss_Anon:", "Pss_Shmem:")
ALLOCATOR_NOISE_MIB = 25
MIB_PER_PARTICIPANT = 0.3


def memory_of(pid: int) -> float:
    """MiB of a process and its descendants; what several share counts once, in parts.

    Not what each has for itself alone: that grows where another one ends, by what both shared. And
    not the libraries' files, which processes outside this tree share: those of other tests.
    """
    total = 0.0
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total += sum(int(line.split()[1]) for line in lines if line.startswith(NO_FILES)) / 1024
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                total += memory_of(int(child))
    except (FileNotFoundError, ProcessLookupError):
        pass  # it ended meanwhile
    return total


def watch(process: subprocess.Popen, out: Path) -> dict[int, tuple[list[float], int]]:
    """Participants whose report is written -> MiB at each look until the next one is, and participants begun."""
    seen: dict[int, tuple[list[float], int]] = {}
    while process.poll() is None:
        done = len(list(out.glob("sub-*.html")))
        if done not in seen:
            seen[done] = [], len(list(work_of(out).glob("*/*/conform")))
        seen[done][0].append(memory_of(process.pid))
        time.sleep(0.1)
    return seen


def test_memory_does_not_grow_with_participants(tmp_path, small_ensemble, full):
    n_participants = 200 if full else 18
    bids_dir, out = describe(tmp_path / "bids"), tmp_path / "out"
    first = write_t1w(bids_dir, "sub-001", head(1))
    for number in range(2, n_participants + 1):
        path = bids_dir / f"sub-{number:03d}" / "anat" / f"sub-{number:03d}_T1w.nii.gz"
        path.parent.mkdir(parents=True)
        os.link(first, path)
    code = "import sys; from bids_varaug.cli.run import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *App(bids_dir, small_ensemble, ()).arguments(out, "--members", "ieee")]
    started = time.monotonic()
    with (tmp_path / "errors").open("w") as errors:
        process = subprocess.Popen(command, stderr=errors)
        seen = watch(process, out)
    assert process.returncode == 0, (tmp_path / "errors").read_text()[-2000:]
    # Each worker's memory rises until it has done every kind of step a few times: the first
    # third is left out.
    third = n_participants // 3
    # Medians: at the moment of a look, steps that need 100 MiB more may run at once or not.
    early = np.median([mib for done, (looks, _) in seen.items() if third < done <= 2 * third for mib in looks])
    late = np.median([mib for done, (looks, _) in seen.items() if done > 2 * third for mib in looks])
    print(f"{n_participants} participants in {time.monotonic() - started:.0f} s; memory in the "
          f"second third {early:.0f} MiB, in the last {late:.0f} MiB")  # fmt: skip
    for done in sorted(seen)[:: max(1, n_participants // 20)]:
        print(f"  after {done:4d}: {np.median(seen[done][0]):.0f} MiB, begun {seen[done][1]}")
    assert late - early < ALLOCATOR_NOISE_MIB + MIB_PER_PARTICIPANT * third
    # Of a run that is interrupted, most of those who were begun are done.
    assert all(begun <= done + 3 for done, (_, begun) in seen.items())

"""Several members at once, each in a process of its own, spread over the devices."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue

from bids_varaug.errors import UserError


def train_side_by_side(
    command_of: Callable[[str, str], Sequence[str]],
    ids: Sequence[str],
    devices: Sequence[str],
    logs: Path,
) -> None:
    """Run one command for each member, as many at once as there are `devices`.

    Parameters
    ----------
    command_of : member id, device -> arguments of ``python -m``
    devices : one entry for each process that may run at a time; a name may be listed repeatedly
    logs : folder that gets ``<member>.txt``, what the process printed

    Raises
    ------
    UserError
        If one or more ended with an error; the others are finished first.
    """
    logs.mkdir(parents=True, exist_ok=True)
    free: SimpleQueue[str] = SimpleQueue()
    for device in devices:
        free.put(device)

    def train_one(member_id: str) -> int:
        device = free.get()
        try:
            with (logs / f"{member_id}.txt").open("w") as log:
                command = [sys.executable, "-m", *command_of(member_id, device)]
                return subprocess.run(command, stdout=log, stderr=log).returncode
        finally:
            free.put(device)

    failed = []
    with ThreadPoolExecutor(len(devices)) as pool:
        running = {pool.submit(train_one, member_id): member_id for member_id in ids}
        for done in as_completed(running):
            member_id, code = running[done], done.result()
            print(f"{member_id}: {'done' if code == 0 else f'failed (exit code {code})'}",
                  file=sys.stderr, flush=True)  # fmt: skip
            if code:
                failed.append(member_id)
    if failed:
        raise UserError(
            f"Training failed for {', '.join(sorted(failed))}; see {logs / f'{failed[0]}.txt'}. "
            "The same command goes on from the checkpoints."
        )

"""Which members an ensemble has, and processes that train several of them side by side."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from bids_varaug.errors import UsageError, UserError
from bids_varaug.models.ensemble import BASELINE
from bids_varaug.numerics import MonteCarloArithmetic

FAMILIES = (BASELINE, "mca", "seed")
_MEMBERS = re.compile(r"ieee|(?P<family>mca|seed)(?P<first>\d\d)(\.\.(?P=family)(?P<last>\d\d))?")


@dataclass(frozen=True)
class MemberPlan:
    """One member to train.

    `seed` decides initialisation and data order; `rounding_seed` the random rounding of a Monte Carlo member, None for
    deterministic arithmetic.
    """

    id: str
    family: str
    seed: int
    rounding_seed: int | None

    def arithmetic(self, step: int) -> AbstractContextManager:
        """Return the context under which step number `step` runs."""
        if self.rounding_seed is None:
            return nullcontext()
        # One stream a step, so that a resumed run rounds as an unbroken one.
        return MonteCarloArithmetic(seed=self.rounding_seed * 1_000_003 + step)


def plan_member(member_id: str) -> MemberPlan:
    """Return the seeds of a member: Monte Carlo members share the baseline's seed, 0."""
    if member_id == BASELINE:
        return MemberPlan(member_id, BASELINE, 0, None)
    family, number = member_id[:-2], int(member_id[-2:])
    return MemberPlan(member_id, family, *((0, number) if family == "mca" else (number, None)))


def parse_members(text: str) -> tuple[str, ...]:
    """Expand "ieee,mca01..mca04" into ids, in the order given; `UsageError` for what is no id or range of a family.

    >>> parse_members("ieee,seed01..seed03")
    ('ieee', 'seed01', 'seed02', 'seed03')
    """
    ids: list[str] = []
    for part in text.split(","):
        found = _MEMBERS.fullmatch(part.strip())
        if found is None or (found["last"] and found["last"] < found["first"]):
            raise UsageError(
                f"--members {part}: use ieee, mcaNN, seedNN, or a range that runs upwards within one family "
                "(mca01..mca10)."
            )
        if found["first"]:
            numbers = range(int(found["first"]), int(found["last"] or found["first"]) + 1)
            ids += [f"{found['family']}{number:02d}" for number in numbers]
        else:
            ids.append(BASELINE)
    return tuple(dict.fromkeys(ids))


def train_in_parallel(
    command_of: Callable[[str, str], Sequence[str]], ids: Sequence[str], devices: Sequence[str], logs: Path
) -> None:
    """Run one command for each member, as many at once as there are `devices`, which may be listed repeatedly.

    `command_of` gives, for a member's id and a device, the arguments of ``python -m``; the folder `logs` gets what the
    processes print, in ``<member>.txt``. `UserError` if one or more end with an error; the others are finished first.
    """
    logs.mkdir(parents=True, exist_ok=True)
    remaining = iter(ids)

    def train_on(device: str) -> list[str]:
        """Train one member after another; return those that failed."""
        failed = []
        for member_id in remaining:
            with (logs / f"{member_id}.txt").open("w") as log:
                command = [sys.executable, "-m", *command_of(member_id, device)]
                code = subprocess.run(command, stdout=log, stderr=log).returncode
            outcome = f"failed (exit code {code})" if code else "done"
            print(f"{member_id}: {outcome}", file=sys.stderr, flush=True)
            if code:
                failed.append(member_id)
        return failed

    with ThreadPoolExecutor(len(devices)) as pool:
        failed = sorted(chain.from_iterable(pool.map(train_on, devices)))
    if failed:
        raise UserError(
            f"Training failed for {', '.join(failed)}; see {logs / f'{failed[0]}.txt'}. To resume from the "
            "checkpoints, run the same command again."
        )

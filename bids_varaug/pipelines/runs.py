"""Repeated runs of a program under numerical noise, each in a folder of its own."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bids_varaug.errors import UsageError
from bids_varaug.files import write_json
from bids_varaug.models.ensemble import BASELINE
from bids_varaug.pipelines.interposer import count_calls, noise_environment, read_stats

PLACE = "{run}"
REQUEST = "perturb.json"
LOGS = "logs"
# Threads take turns as they like: with more than one, sums may differ from run to run without any noise of ours.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": "1"}


@dataclass(frozen=True)
class Request:
    """What all runs of an output folder have in common."""

    command: tuple[str, ...]  # {run} stands for the folder of a run
    seed: int
    precision: int  # bits
    spare_integers: bool


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    name: str
    problem: str  # "" if it succeeded
    seconds: float
    processor_seconds: float = 0.0  # of the program and all that it started and waited for
    calls: int = 0  # of libm
    moved: int = 0  # results

    @property
    def done(self) -> bool:
        """Whether it succeeded."""
        return not self.problem


def run_name(number: int) -> str:
    """Folder of a run; the baseline, without noise, is number 0.

    >>> run_name(0), run_name(3)
    ('ieee', 'mca03')
    """
    return f"mca{number:02d}" if number else BASELINE


def run_perturbed(
    request: Request, n: int, output_dir: Path, library: Path, n_procs: int = 1
) -> list[Outcome]:
    """Run a command once as it is and `n` times under noise, `n_procs` at a time; one that fails leaves the others.

    Each run has a folder ``OUTPUT_DIR/mcaNN``, the one without noise ``ieee``, and a log ``logs/mcaNN.txt`` of what it
    printed. What succeeded before with the same request is not run again. `UsageError` if the command does not say
    where the folder goes, or the output folder has other content.
    """
    if not any(PLACE in part for part in request.command):
        raise UsageError(
            f"the command does not say where it writes: put {PLACE} in place of the folder of each run, for example "
            f"-o {PLACE}/out_"
        )
    _check_folder(output_dir, request)
    write_json(asdict(request), output_dir / REQUEST)
    running: set[subprocess.Popen[bytes]] = set()
    with ThreadPoolExecutor(n_procs) as pool:
        jobs: list[Future[Outcome]] = []
        try:  # an interrupt may come while jobs are still added
            for number in range(n + 1):
                jobs.append(pool.submit(_run, request, number, output_dir, library, running))  # noqa: PERF401
            return [job.result() for job in jobs]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(job.done() for job in jobs):  # one may be about to start
                for process in list(running):
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)  # with all that it started
                time.sleep(0.05)
            raise


def _check_folder(output_dir: Path, request: Request) -> None:
    if not output_dir.exists() or not any(output_dir.iterdir()):
        return
    try:
        before = json.loads((output_dir / REQUEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{output_dir}: is not empty, and not of an earlier run. Choose another folder.") from error
    if before != json.loads(json.dumps(asdict(request))):
        raise UsageError(
            f"{output_dir}: holds runs of another command, seed or precision (see {REQUEST}). Choose another folder."
        )


def _run(
    request: Request, number: int, output_dir: Path, library: Path, running: set[subprocess.Popen[bytes]]
) -> Outcome:
    """Run once, unless that is done."""
    name = run_name(number)
    folder, logs = output_dir / name, output_dir / LOGS
    record, stats = logs / f"{name}.json", logs / f"{name}.calls.tsv"
    if (before := _read_record(record)) is not None and before.done:
        return before
    shutil.rmtree(folder, ignore_errors=True)
    stats.unlink(missing_ok=True)
    folder.mkdir(parents=True)
    logs.mkdir(exist_ok=True)
    command = [part.replace(PLACE, str(folder)) for part in request.command]
    environment = ONE_THREAD | os.environ
    if number:
        seed = 1000 * request.seed + number  # as many runs as one likes do not change the first ones
        environment |= noise_environment(library, seed, stats, request.precision, request.spare_integers)
    start = time.monotonic()
    with (logs / f"{name}.txt").open("wb") as log:
        log.write(f"$ {shlex.join(command)}\n".encode())
        log.flush()
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        ) as process:
            running.add(process)
            _, status, usage = os.wait4(process.pid, 0)
            code = process.returncode = os.waitstatus_to_exitcode(status)
        running.discard(process)
    calls, moved = count_calls(read_stats(stats))
    problem = ""
    if code:
        problem = f"exit code {code}" if code > 0 else f"ended by {signal.Signals(-code).name}"
    elif not any(folder.iterdir()):
        problem = f"wrote nothing into {folder}"
    elif number and not calls:
        problem = (
            "no call of libm was reached, so there was no noise: the program uses functions of its own, is linked "
            "statically, or drops LD_PRELOAD"
        )
    problem += f"; see {logs / f'{name}.txt'}" if problem else ""
    busy = usage.ru_utime + usage.ru_stime
    outcome = Outcome(name, problem, round(time.monotonic() - start, 2), round(busy, 3), calls, moved)
    write_json(asdict(outcome), record)
    told = f"{name}: {outcome.problem or f'done in {outcome.seconds:.1f} s, {calls:,} calls of libm'}\n"
    sys.stderr.write(told)  # at once with the line's end, since runs end side by side
    return outcome


def _read_record(path: Path) -> Outcome | None:
    try:
        return Outcome(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def summarise(outcomes: Sequence[Outcome]) -> Mapping[str, Any]:
    """Number of runs under noise that succeeded, their calls, and their processor time over that without noise."""
    noisy = [outcome for outcome in outcomes[1:] if outcome.done]
    plain = outcomes[0].processor_seconds if outcomes[0].done else float("nan")
    mean = sum(outcome.processor_seconds for outcome in noisy) / len(noisy) if noisy else float("nan")
    return {"n": len(noisy), "calls": sum(outcome.calls for outcome in noisy), "slowdown": mean / max(plain, 0.01)}

"""A Slurm cluster of one node on this machine, from Debian's packages, for as long as it is needed.

Everything lies in one folder and listens on the loopback alone; nothing of the system's own Slurm
is read or changed. Started by hand, it stays until the shell ends:

    python -m tests.slurm.cluster
"""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGES = "apt-get install --no-install-recommends slurmctld slurmd slurm-client"
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol", "sinfo")
START_SECONDS = 30

# No munge: all is on the loopback. No cgroups, no affinity: a container lacks the rights for them.
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/none
CredType=cred/none
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=1
# The node has the CPUs and the memory that are asked for here, whatever the machine has.
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=2
MessageTimeout=60
MinJobAge=10
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory_mb} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why no cluster can be started here; None where it can."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"no {', '.join(absent)} ({PACKAGES})"
    if os.geteuid() != 0:
        return "slurmd starts jobs as root only"
    return None


@contextmanager
def slurm_cluster(folder: Path, cpus: int = 3, memory_mb: int = 32000) -> Iterator[dict[str, str]]:
    """Start slurmctld and slurmd; gives the environment in which sbatch finds them.

    Raises
    ------
    RuntimeError
        With the daemon's log, if one is not ready after half a minute.
    """
    (folder / "state").mkdir(parents=True)
    configuration = folder / "slurm.conf"
    controller_port, node_port = _free_ports(2)
    configuration.write_text(
        CONFIGURATION.format(
            host=socket.gethostname().partition(".")[0],
            user=pwd.getpwuid(os.geteuid()).pw_name,
            **{name: value for name, value in locals().items() if name != "configuration"},
        )
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
    environment["SLURM_CONF"] = str(configuration)
    daemons = []
    try:
        # slurmd waits long before it calls again a controller that did not answer.
        for program, ready in (
            ("slurmctld", (["scontrol", "ping"], "is UP")),
            ("slurmd", (["sinfo", "-h", "-o", "%t"], "idle")),
        ):
            with (folder / f"{program}.log").open("wb") as log:
                # In the foreground: it ends when told, and no pid has to be looked for.
                daemon = subprocess.Popen([program, "-D"], env=environment, stdout=log, stderr=log)
            daemons.append(daemon)
            _await(daemon, *ready, environment, folder / f"{program}.log")
        yield environment
    finally:
        if daemons:
            _end_jobs(environment)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(60)


def _end_jobs(environment: dict) -> None:
    """Cancel all jobs and wait for their ends: slurmd leaves its jobs behind when it ends."""
    for command in (["scancel", "--me"], ["scancel", "--me", "--signal=KILL", "--full"]):
        subprocess.run(command, env=environment, capture_output=True, timeout=60)
        for _ in range(50):
            queue = subprocess.run(["squeue", "-h"], env=environment, capture_output=True)
            if not queue.stdout.strip():
                return
            time.sleep(0.1)


def _free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def _await(
    daemon: subprocess.Popen, command: list[str], expected: str, environment: dict, log: Path
) -> None:
    """Wait until the answer to `command` is as `expected`."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        answer = subprocess.run(command, env=environment, capture_output=True, text=True)
        if expected in answer.stdout:
            return
        if daemon.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{daemon.args[0]} does not start: {log.read_text()[-2000:]}")
        time.sleep(0.2)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="slurm-") as temporary:
        with slurm_cluster(Path(temporary) / "cluster") as variables:
            subprocess.run([os.environ.get("SHELL", "/bin/sh")], env=variables)

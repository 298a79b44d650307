"""The shared library that randomises the last bits of libm's results, and what it reaches.

It is compiled on this machine from ``data/libm_noise.c``, whose head says what it does, and loaded into a program with
``LD_PRELOAD``. It reaches what a program asks of libm at run time, no more: not the four operations and the square
root, which are instructions; not vector code of numpy, torch or MKL; not programs that are linked statically. The noise
is therefore a lower bound of what rounding does. The idea, without the code, is that of fuzzy-libmath (Salari et al.
2021, arXiv:2108.03129).
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import stat
import subprocess
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

from bids_varaug.errors import UserError
from bids_varaug.files import replacing

SOURCE = files("bids_varaug") / "data" / "libm_noise.c"
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O2", "-fPIC", "-fno-builtin", "-shared", "-Wl,--no-as-needed")
LIBRARIES = ("-lm", "-l:libdl.so.2")  # where dlsym was before glibc 2.34
CONTAINERS = ("apptainer", "singularity", "docker", "podman")  # the program is inside, and cannot be looked at
DOUBLE_BITS = 53


class InterposerError(UserError):
    """Noise cannot be put into this program, or not on this machine."""


def compile_interposer(folder: Path) -> Path:
    """Return the shared library, compiled into `folder` unless it is there; `InterposerError` if that is impossible.

    Its name holds the source, the C library and the processor: machines may share the folder.
    """
    source = SOURCE.read_bytes()
    libc = "-".join(platform.libc_ver())
    key = hashlib.sha256(source + f"{libc} {platform.machine()} {FLAGS} {LIBRARIES}".encode()).hexdigest()[:12]
    path = folder / f"libm_noise-{key}.so"
    if path.is_file():
        return path
    if platform.system() != "Linux":
        raise InterposerError(f"{platform.system()}: LD_PRELOAD needs Linux. Run this in a Linux container.")
    names = (os.environ.get("CC", ""), *COMPILERS)
    compiler = next((found for name in names if name and (found := shutil.which(name))), None)
    if compiler is None:
        raise InterposerError(
            "no C compiler (cc, gcc, clang) was found, and libm_noise.c is compiled on the machine that uses it. "
            "Install one (Debian: apt install gcc libc6-dev; conda install c-compiler), or set CC."
        )
    with replacing(path) as stream:
        command = [compiler, *FLAGS, "-x", "c", "-", "-x", "none", *LIBRARIES, "-o", stream.name]
        done = subprocess.run(command, input=source, capture_output=True, check=False)
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip()[-500:]
            raise InterposerError(f"{compiler} cannot compile libm_noise.c: {said}")
    return path


def noise_environment(
    library: Path, seed: int, stats: Path, precision: int = DOUBLE_BITS, spare_integers: bool = False
) -> dict[str, str]:
    """Variables that put the noise into a program, and into all that it starts.

    Apptainer gets them too, with what it has to bind. See ``libm_noise.c`` for their meaning; `precision` in bits.
    """
    before = os.environ.get("LD_PRELOAD")
    noise = {
        "LD_PRELOAD": f"{library}:{before}" if before else str(library),
        "LIBM_NOISE_SEED": str(seed),
        "LIBM_NOISE_PRECISION": str(precision),
        "LIBM_NOISE_STATS": str(stats),
        **({"LIBM_NOISE_INTEGERS": "1"} if spare_integers else {}),
    }
    bound = ",".join(filter(None, (os.environ.get("APPTAINER_BIND"), str(library.parent), str(stats.parent))))
    return noise | {f"APPTAINERENV_{name}": value for name, value in noise.items()} | {"APPTAINER_BIND": bound}


def read_stats(path: Path) -> dict[str, tuple[int, int]]:
    """Calls of each function of libm by all processes of a run, and results that were moved."""
    found: dict[str, tuple[int, int]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        name, calls, moved = line.split("\t")
        before = found.get(name, (0, 0))
        found[name] = before[0] + int(calls), before[1] + int(moved)
    return found


def check_program(name: str) -> Path:
    """Find a program that noise can be put into; `InterposerError` if there is none, or it cannot be reached."""
    found = shutil.which(name)
    if found is None:
        raise InterposerError(f"{name}: no such program. Give its path, or look at PATH.")
    path = Path(found)
    if path.name in CONTAINERS:
        return path
    if path.stat().st_mode & (stat.S_ISUID | stat.S_ISGID):
        raise InterposerError(f"{path}: runs with another user's rights (setuid), for which LD_PRELOAD has no effect.")
    with path.open("rb") as stream:
        magic = stream.read(4)
    if magic[:2] == b"#!":
        return path  # a script hands the variables on
    if magic != b"\x7fELF":
        raise InterposerError(f"{path}: neither a script nor a Linux program (ELF).")
    if _libraries(path) is None:
        raise InterposerError(
            f"{path}: is linked statically, so LD_PRELOAD does not reach it. Use a dynamic build of it."
        )
    return path


def _libraries(program: Path) -> list[Path] | None:
    """Shared libraries of a program or library; None if it is linked statically."""
    done = subprocess.run(["ldd", program], capture_output=True, text=True, check=False)
    if done.returncode and "not a dynamic" in done.stderr + done.stdout:
        return None
    return [Path(found) for found in re.findall(r"(?:=> )?(/\S+) \(0x", done.stdout)]


def libm_calls(program: Path) -> list[str] | None:
    """Functions of libm that a program and its own libraries ask for; None if that cannot be told.

    That is so for scripts, for what is in containers, and where there is no ``nm`` (binutils). What a program loads
    later (Python modules, plugins) is not seen.
    """
    with program.open("rb") as stream:
        if stream.read(4) != b"\x7fELF" or program.name in CONTAINERS or shutil.which("nm") is None:
            return None
    own = [program, *(path for path in _libraries(program) or () if not path.name.startswith("libm.so"))]
    reached = set(re.findall(r"X\((\w+)\)", SOURCE.read_text().partition("#define NUMBER")[0])) - {"X"} | {"sincos"}
    reached |= {f"{name}f" for name in reached}
    command = ["nm", "--dynamic", "--undefined-only", "--format=just-symbols", *map(str, own)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return sorted({line.partition("@")[0] for line in done.stdout.split()} & reached)


def count_calls(stats: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
    """Calls of all functions together, and results that were moved."""
    return sum(calls for calls, _ in stats.values()), sum(moved for _, moved in stats.values())

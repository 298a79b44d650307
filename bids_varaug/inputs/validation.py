"""Check of the input dataset with the BIDS schema validator, offline."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from textwrap import shorten

from bids_varaug.errors import InvalidBidsError
from bids_varaug.inputs.scans import datalad_command, is_absent
from bids_varaug.inputs.tables import some

EXECUTABLE = "bids-validator-deno"
SHOWN_CODES = 8
SHOWN_FILES = 3
# One unreadable image must not stop the other subjects, and content that git-annex has not fetched is no fault of the
# dataset: these are found per image later, with a message of their own.
CONTENT_CODES = {"EMPTY_FILE", "NIFTI_HEADER_UNREADABLE", "SYMLINK_BROKEN"}
# Says only that participants.tsv and the folders differ. Where participants are named, the folders of the others may
# have been removed, as BABS does for each job.
OTHERS_CODES = {"PARTICIPANT_ID_MISMATCH"}
# What the validator says, without a location, of a file that may be a link to what was not fetched.
FILE_OF_CODE = {"MISSING_DATASET_DESCRIPTION": "/dataset_description.json"}

HINTS = {"TSV_VALUE_INCORRECT_TYPE.age": "BIDS wants a number up to 89, and 89+ of older people"}

# Keys: code, location ("" where it is the whole dataset), message, where given subCode and issueMessage.
Issue = dict[str, str]


def find_validator() -> str | None:
    """Return the validator's executable: beside this Python (which may run without activation), else on the PATH."""
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    return shutil.which(EXECUTABLE, path=os.pathsep.join(folders))


def run_validator(bids_dir: Path, *options: str) -> list[Issue]:
    """Errors (not warnings) that the validator finds with its own schema; `InvalidBidsError` if it gives no answer."""
    # BIDS_SCHEMA would make it fetch a schema from the network; compute nodes have none.
    environment = {key: value for key, value in os.environ.items() if key != "BIDS_SCHEMA"}
    environment |= {"DENO_NO_UPDATE_CHECK": "1", "NO_COLOR": "1"}
    command = [find_validator() or EXECUTABLE, "--format", "json", "--ignoreWarnings", *options, str(bids_dir)]
    answer = f"it could not be started; pip install {EXECUTABLE}"
    try:
        done = subprocess.run(command, env=environment, capture_output=True, check=False)
        answer = done.stderr.decode(errors="replace").strip()[-500:]
        report = json.loads(done.stdout)["issues"]
        issues, messages = report["issues"], report.get("codeMessages", {})
    except (OSError, ValueError, KeyError, TypeError) as error:
        verdict = f"{EXECUTABLE} gave no verdict on {bids_dir}: {answer} ({error})"
        raise InvalidBidsError(f"{verdict}. Pass --skip-bids-validation to continue without it.") from error
    errors = [issue for issue in issues if issue.get("severity") == "error"]
    for issue in errors:
        issue["message"] = messages.get(issue["code"], "").strip()
        issue["location"] = issue.get("location") or FILE_OF_CODE.get(issue["code"], "")
    return errors


def validate_input(bids_dir: Path, participant_labels: Iterable[str] = ()) -> None:
    """Refuse a dataset that is not valid BIDS: `InvalidBidsError`, with the first errors by code and file.

    Files whose content git-annex has not fetched cannot be checked; those at the root are named in a warning. With
    `participant_labels`, errors in the folders of other participants do not count.
    """
    labels = set(participant_labels)
    with _without_others(bids_dir, labels) as looked_at:
        issues = run_validator(looked_at, "--ignoreNiftiHeaders")
    no_errors = CONTENT_CODES | OTHERS_CODES if labels else CONTENT_CODES
    errors = [issue for issue in issues if issue["code"] not in no_errors]
    absent = set()
    for location in {issue["location"] for issue in errors}:
        path = bids_dir / location.lstrip("/")
        with suppress(OSError):  # there, and unreadable: the validator's verdict stands
            if os.path.lexists(path) and not path.is_dir() and is_absent(path):
                absent.add(location)
    if at_root := sorted(location[1:] for location in absent if location.count("/") == 1):
        fetch = f"not checked, only a link is here. To fetch it: {datalad_command(bids_dir, at_root)}"
        print(f"WARNING: {', '.join(at_root)}: {fetch}", file=sys.stderr)
    errors = [issue for issue in errors if issue["location"] not in absent]
    if errors:
        raise InvalidBidsError(
            f"{bids_dir} is not valid BIDS ({len(errors)} errors):\n{summarize_errors(errors)}\n"
            "Correct the dataset, or pass --skip-bids-validation to continue anyway."
        )


@contextmanager
def _without_others(bids_dir: Path, labels: set[str]) -> Iterator[Path]:
    """The dataset as links, without the folders of other participants; itself without `labels`.

    The validator reads every file: a minute for thousands of participants, of whom one is wanted.
    """
    if not labels:
        yield bids_dir
        return
    with tempfile.TemporaryDirectory(prefix="bids_varaug-") as folder:
        for path in bids_dir.absolute().iterdir():
            if path.name.removeprefix("sub-") in {path.name, *labels} or not path.is_dir():
                (Path(folder) / path.name).symlink_to(path)
        yield Path(folder)


def summarize_errors(errors: Iterable[Issue]) -> str:
    """One line per code (and key) with its first files.

    >>> print(summarize_errors([{"code": "A", "location": "/x"}, {"code": "A", "location": "/y"}]))
      A: /x, /y
    """
    by_code = defaultdict(list)
    for issue in errors:
        by_code[".".join(filter(None, (issue["code"], issue.get("subCode"))))].append(issue)
    lines = []
    for code, issues in list(by_code.items())[:SHOWN_CODES]:
        files = sorted(issue["location"] or "(dataset)" for issue in issues)
        text = issues[0].get("issueMessage") or issues[0].get("message") or ""
        text = ". ".join(filter(None, (shorten(text, 120, placeholder=" ..."), HINTS.get(code))))
        reason = f" ({text})" if text else ""
        lines.append(f"  {code}: {some(files, shown=SHOWN_FILES)}{reason}")
    if len(by_code) > SHOWN_CODES:
        lines.append(f"  and {len(by_code) - SHOWN_CODES} other kinds of error")
    return "\n".join(lines)

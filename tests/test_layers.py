"""Folders import only from those before them: data flow = folder order."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "bids_varaug"
# Section 2 of the design. Segmentation counts votes with the pure functions of variability, the
# trainer watches real images with segmentation, and brain age reads and writes as derivatives do.
ORDER = (
    "errors", "files", "settings", "machine", "inputs", "images", "numerics", "models",
    "variability", "pipelines", "segmentation", "registration", "training", "derivatives", "brainage", "reports",
    "workflows", "api", "cli",
)  # fmt: skip


def imported(path: Path) -> Iterator[str]:
    """Folders (or modules on top level) that a module imports, in functions and for types too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, inner = name.partition(".")
            if package == "bids_varaug" and inner != "__version__":
                yield inner.partition(".")[0]


def upward() -> set[tuple[str, str]]:
    """Imports of a folder that comes later."""
    found = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        module = path.relative_to(PACKAGE)
        if module.name == "__init__.py" and len(module.parts) == 1:
            continue  # it exports the promised names of all
        place = ORDER.index(module.parts[0].removesuffix(".py"))
        later = {folder for folder in imported(path) if ORDER.index(folder) > place}
        found |= {(module.as_posix(), folder) for folder in later}
    return found


def test_folders_import_only_from_those_before_them():
    assert upward() == set()


@pytest.mark.parametrize(
    "line",
    ["from bids_varaug.cli import run", "from bids_varaug import cli", "import bids_varaug.cli.run",
     "if TYPE_CHECKING:\n    from bids_varaug.cli.run import main",
     "def f():\n    from bids_varaug.cli import run"],
)  # fmt: skip
def test_every_kind_of_import_is_seen(tmp_path, line):
    path = tmp_path / "module.py"
    path.write_text(line + "\n")
    assert set(imported(path)) == {"cli"}

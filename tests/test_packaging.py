"""What installation and the front page promise."""

from __future__ import annotations

import importlib
import re
import runpy
import sys
from argparse import SUPPRESS
from pathlib import Path

import pytest
import yaml

import bids_varaug

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIREMENTS = sorted(
    {*PROJECT["dependencies"], *(r for e in PROJECT["optional-dependencies"].values() for r in e)}
)
FRONT_PAGES = ("README.md", "docs/reference/outputs.md")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def normal(name: str) -> str:
    """Name of a distribution as package indices compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirement_name(requirement: str) -> str:
    return normal(re.match(r"[\w.-]+", requirement)[0])


def pins() -> dict[str, list[str]]:
    """Name -> lines of constraints.txt."""
    found: dict[str, list[str]] = {}
    for line in read("constraints.txt").splitlines():
        if line and not line.startswith("#"):
            found.setdefault(requirement_name(line), []).append(line)
    return found


@pytest.mark.parametrize("script", PROJECT["scripts"])
def test_console_script_can_be_imported(script):
    module, _, function = PROJECT["scripts"][script].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize("name", ["CITATION.cff", "Dockerfile", "CHANGELOG.md"])
def test_version_is_the_package_s(name):
    pattern = {
        "CITATION.cff": r"^version: (\S+)$",
        "Dockerfile": r"^ARG VERSION=(\S+)$",
        "CHANGELOG.md": r"^## .*?(\d+\.\d+\.\d+)",
    }[name]
    assert re.search(pattern, read(name), re.MULTILINE)[1] == bids_varaug.__version__


def test_citation_file_says_what_the_package_says():
    from bids_varaug.derivatives.citation import references

    cff = yaml.safe_load(read("CITATION.cff"))
    assert [author["name"] for author in cff["authors"]] == [author["name"] for author in PROJECT["authors"]]
    assert (cff["type"], cff["license"]) == ("software", PROJECT["license"])
    assert cff.get("repository-code") == PROJECT["urls"].get("Repository")
    works = {work.fields["title"].strip("{}"): work for work in references().values()}
    assert cff["title"] == works[cff["title"]].fields["title"].strip("{}")
    for paper in cff["references"]:
        work = works[paper["title"]]
        assert paper.get("url", f"https://doi.org/{paper.get('doi')}") == work.url
        named = [f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]]
        assert " and ".join(named) == work.fields["author"]
        assert str(paper["year"]) == work.fields["year"]


@pytest.mark.parametrize("requirement", REQUIREMENTS)
def test_dependency_is_pinned(requirement):
    assert requirement_name(requirement) in pins()


@pytest.mark.parametrize("name", sorted(pins()))
def test_pin_is_exact_and_holds_for_each_python_once(name):
    lines = pins()[name]
    assert all(re.match(r"[\w.-]+==[\w.]+(; python_version (>=|<) \"3\.11\")?$", x) for x in lines)
    markers = sorted(x.partition(";")[2].strip() for x in lines)
    assert markers in ([""], ['python_version < "3.11"', 'python_version >= "3.11"'])


def test_every_installed_dependency_is_pinned():
    """Of this package, all the way down; what is installed besides does not matter."""
    from importlib.metadata import PackageNotFoundError, requires

    missing, seen, queue = [], set(), [requirement_name(r) for r in REQUIREMENTS]
    while queue:
        name = queue.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            below = requires(name) or []
        except PackageNotFoundError:  # another platform's, or another Python's
            continue
        if name not in pins():
            missing.append(name)
        queue += [requirement_name(r) for r in below if "extra ==" not in r]
    assert missing == []


@pytest.mark.parametrize("name", ["aseg31.tsv", "training_labels.tsv"])
def test_label_table_is_in_the_package(name):
    assert (Path(bids_varaug.__file__).parent / "data" / name).is_file()


def test_shipped_ensemble_is_in_the_package_with_every_member():
    from bids_varaug.models.ensemble import check_member, load_ensemble
    from bids_varaug.settings import Settings

    ensemble = load_ensemble(Settings(Path("/in"), Path("/out"), "participant", Path("/work")).ensemble)
    files = {check_member(ensemble, member) for member in ensemble.members}
    assert files == set(ensemble.directory.glob("*.safetensors"))
    assert ensemble.baseline is not None and len(files) > 1


def test_weights_take_less_than_100_mb():
    folder = Path(bids_varaug.__file__).parent / "data" / "ensembles"
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 100e6


def test_every_data_file_is_declared_as_package_data():
    settings = tomllib.loads(read("pyproject.toml"))["tool"]["setuptools"]
    package = ROOT / "bids_varaug"
    declared = {p for glob in settings["package-data"]["bids_varaug"] for p in package.glob(glob)}
    files = {p for p in (package / "data").rglob("*") if p.is_file() and p.suffix != ".pyc"}
    assert files <= declared


def test_dockerfile_copies_what_the_build_needs():
    copied = {
        source.removeprefix("./")
        for line in re.findall(r"^COPY (?!--from=)(.+)$", read("Dockerfile"), re.MULTILINE)
        for source in line.split()[:-1]
    }
    needed = {"pyproject.toml", "constraints.txt", "bids_varaug", PROJECT["readme"]}
    assert needed | set(PROJECT["license-files"]) <= copied


def test_docker_build_sees_what_the_dockerfile_copies():
    allowed = {x[1:] for x in read(".dockerignore").splitlines() if x.startswith("!")}
    for line in re.findall(r"^COPY (?!--from=)(.+)$", read("Dockerfile"), re.MULTILINE):
        assert set(line.split()[:-1]) <= allowed


def test_commands_of_the_readme_exist():
    targets = set(re.findall(r"^([\w-]+):", read("Makefile"), re.MULTILINE))
    named = set(re.findall(r"^make ([\w-]+)", read("README.md"), re.MULTILINE))
    assert named and named <= targets


@pytest.mark.parametrize("page", FRONT_PAGES)
def test_page_names_every_output(page):
    from bids_varaug.derivatives.names import OF_FAMILY, OUTPUTS, SPACE_OUTPUTS
    from bids_varaug.registration.space import SPACE, OutputSpace

    names = {
        output.name("", member if output.per_member else None).removeprefix("_")
        for key, output in OUTPUTS.items()
        for member in ["mca" if key.endswith(OF_FAMILY) else "mca01"]
    }
    names |= {output.name("", space=OutputSpace(SPACE, 2)).removeprefix("_") for output in SPACE_OUTPUTS.values()}
    assert {name for name in names if f"`{name}`" not in read(page)} == set()


def test_outputs_page_names_every_column():
    from bids_varaug.derivatives.names import OUTPUTS

    columns = {column for output in OUTPUTS.values() for column in output.columns}
    assert {column for column in columns if f"`{column}`" not in read("docs/reference/outputs.md")} == set()


@pytest.mark.parametrize("module", ["bids_varaug.cli.parser", "bids_varaug.cli.train"])
def test_usage_page_describes_every_flag(module):
    parser = importlib.import_module(module).build_parser()
    flags = {flag for action in parser._actions if action.help != SUPPRESS for flag in action.option_strings}
    page = read("docs/reference/usage.md")
    assert {flag for flag in flags if not re.search(rf"`{flag}[` ]", page)} == set()


def test_usage_page_lists_every_exit_code():
    from bids_varaug.errors import ExitCode

    section = read("docs/reference/usage.md").partition("## Exit codes")[2].partition("\n## ")[0]
    listed = {int(n) for row in re.findall(r"^\| ([\d, ]+) \|", section, re.MULTILINE)
              for n in row.split(",")}  # fmt: skip
    assert listed == set(map(int, ExitCode))


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda p: p.stem)
def test_benchmarks_find_what_they_import(path, monkeypatch):
    """They are run rarely, and outlive what they use."""
    monkeypatch.syspath_prepend(path.parent)
    assert runpy.run_path(str(path), run_name="imported")["__doc__"]

"""The ids in the names of tests, such as P7, are explained in docs/math.md, and the tests are where it says."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(r"^\| ((?:[PGSK]\d+(?:, )?)+) \| .+ \| (.+) \|$", re.MULTILINE)
NAME = re.compile(r"^def (?:test_)?((?:[pgsk]\d+_)+)", re.MULTILINE | re.IGNORECASE)


def key() -> dict[str, list[Path]]:
    """{id: paths of tests} as docs/math.md lists them."""
    rows = ROW.findall((ROOT / "docs/math.md").read_text(encoding="utf-8"))
    return {
        name: [ROOT / "tests" / path for path in re.findall(r"`([^`]+)`", paths)]
        for names, paths in rows
        for name in names.split(", ")
    }


def ids(path: Path) -> set[str]:
    """The ids in the names of a file's tests and checks."""
    return {name.upper() for found in NAME.findall(path.read_text()) for name in found.strip("_").split("_")}


def test_every_id_in_a_tests_name_has_a_key() -> None:
    used = {name: path for path in (ROOT / "tests").rglob("*.py") for name in ids(path)}
    assert {name: path for name, path in used.items() if name not in key()} == {}


@pytest.mark.parametrize("name", key())
def test_the_tests_of_an_id_are_where_the_key_says(name: str) -> None:
    for path in key()[name]:
        files = path.rglob("*.py") if path.is_dir() else [path]
        assert any(name in ids(file) for file in files), f"{path} has no test of {name}"

"""Links in the documentation lead to files and headings that exist, in the repository and in the site of `make docs`.

Rows of tables have as many cells as the head. The tests need no mkdocs, and do not follow links to other hosts.
"""

import itertools
import re
from pathlib import Path

import pytest

from tools.docs_site import FENCE, INDEX, LINK, ROOT, is_relative, navigation, pages, reference, resolve, site_links

PAGES = pages()


def anchors(text: str) -> set[str]:
    """The anchors that GitHub and mkdocs give to the headings of a page."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE):
        words = re.sub(r"[^\w\- ]", "", LINK.sub(r"\g<text>", heading).lower())
        found.add(words.strip().replace(" ", "-"))
    return found


def broken(page: str, root: Path = ROOT) -> list[str]:
    """The broken relative links of a page, as file:line: link."""
    text = (root / page).read_text(encoding="utf-8")
    blank = FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), text)
    found = []
    for link in LINK.finditer(blank):
        if not is_relative(link["target"]):
            continue
        path, anchor = resolve(link["target"], page, root)
        is_there = (root / path).exists()
        if is_there and anchor:
            is_there = anchor in anchors((root / path).read_text(encoding="utf-8"))
        if not is_there:
            found.append(f"{page}:{blank.count(chr(10), 0, link.start()) + 1}: {link['target']}")
    return found


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page: str) -> None:
    assert broken(page) == []


def test_broken_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/a.md").write_text(
        "# One: two\n```bash\n[not](a-link.md)\n```\n[b](b.md) [c](#one-two) [d](#three)\n"
    )
    assert broken("docs/a.md", tmp_path) == ["docs/a.md:5: b.md", "docs/a.md:5: #three"]


def cells(row: str) -> int:
    """Cells of a row of a table. A bar behind a backslash does not divide cells; one in code does."""
    return row.replace("\\|", "").strip().removeprefix("|").removesuffix("|").count("|") + 1


def uneven(text: str) -> list[str]:
    """The rows of a page's tables that do not have as many cells as the row before, which readers would not see."""
    lines = FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), text).splitlines()
    pairs = [(before, row) for before, row in itertools.pairwise(lines) if before[:1] == row[:1] == "|"]
    return [row for before, row in pairs if cells(before) != cells(row)]


@pytest.mark.parametrize("page", PAGES)
def test_the_rows_of_a_table_have_the_cells_of_its_head(page: str) -> None:
    assert uneven((ROOT / page).read_text(encoding="utf-8")) == []


def test_a_row_with_a_cell_too_many_is_found() -> None:
    assert uneven("| a | b |\n|---|---|\n| `x` \\| y | |\n| 1 | 2 | 3 |\n\n| one |\n") == ["| 1 | 2 | 3 |"]


def test_every_page_is_in_the_index() -> None:
    in_navigation = {site for section in navigation() for value in section.values() for site in sites(value)}
    missing = sorted(path for path, site in PAGES.items() if site not in in_navigation)
    assert missing == [], f"add them to {INDEX}"


def sites(value: str | list[dict[str, str]]) -> list[str]:
    return [value] if isinstance(value, str) else [site for entry in value for site in entry.values()]


@pytest.mark.parametrize("page", PAGES)
def test_the_site_has_every_page_that_its_links_name(page: str) -> None:
    text = site_links((ROOT / page).read_text(encoding="utf-8"), page)
    here = Path(PAGES[page]).parent
    known = {Path(site) for site in PAGES.values()} | {
        path.relative_to(ROOT / "docs") for path in ROOT.glob("docs/*.png")
    }
    for link in LINK.finditer(FENCE.sub("", text)):
        path = link["target"].partition("#")[0]
        if path and is_relative(path):
            resolved = Path("/", here, path).resolve().relative_to("/")
            assert resolved in known, f"{page}: {link[0]}"


def test_the_reference_covers_the_package() -> None:
    assert {"megatron_sfr", "megatron_sfr.objectives.token", "megatron_sfr.hf.families"} <= reference().keys()
    assert not any(name.startswith("megatron_sfr.cli") for name in reference())

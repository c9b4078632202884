"""mkdocs hooks for `make docs`: the site's extra pages, its navigation and its links.

docs/README.md is the index on every platform; the navigation is read from it. Pages link to files of the repository as
they do when read there. In the site, READMEs become pages, and links to other files become plain text.
"""

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "megatron_sfr"
NOT_IN_REFERENCE = ("cli", "demo")  # commands explain themselves by --help
INDEX = "docs/README.md"
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")
FENCE = re.compile(r"^(```|~~~).*?^\1\s*$", re.MULTILINE | re.DOTALL)


def pages(root: Path = ROOT) -> dict[str, str]:
    """Path in the repository -> path in the site, for every Markdown page."""
    found = {f"docs/{path.name}": path.name for path in sorted((root / "docs").glob("*.md"))}
    found |= {"README.md": "overview.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
    for readme in sorted((root / "examples").glob("*/README.md")):
        found[readme.relative_to(root).as_posix()] = f"examples/{readme.parent.name}.md"
    return found


def outside_code(text: str, change: Any) -> str:
    """Applies `change` to the parts of Markdown text that are not in fenced code blocks."""
    parts, end = [], 0
    for fence in FENCE.finditer(text):
        parts += [change(text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, change(text[end:])])


def resolve(target: str, page: str, root: Path = ROOT) -> tuple[str, str]:
    """The repository path and the anchor of a relative link in `page`; a folder stands for its README.md."""
    path, _, anchor = target.partition("#")
    found = os.path.normpath(PurePosixPath(page).parent / path) if path else page
    if (root / found / "README.md").is_file():
        found = f"{found}/README.md"
    return found, anchor


def is_relative(target: str) -> bool:
    return not re.match(r"[a-z]+:", target)


def site_links(text: str, page: str, root: Path = ROOT) -> str:
    """A page's Markdown with its links changed from repository paths to site paths."""
    known = pages(root)
    here = PurePosixPath(known[page]).parent

    def change(link: re.Match[str]) -> str:
        if not is_relative(link["target"]):
            return link[0]
        path, anchor = resolve(link["target"], page, root)
        site = known.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if site is None:
            return link["text"]
        return f"{link['image']}[{link['text']}]({os.path.relpath(site, here)}{'#' * bool(anchor)}{anchor})"

    return outside_code(text, lambda part: LINK.sub(change, part))


def navigation(root: Path = ROOT) -> list[dict[str, Any]]:
    """The sections of docs/README.md with the pages that they link to, then the API reference."""
    known = pages(root)
    sections: list[dict[str, Any]] = [{"Index": known[INDEX]}]
    for line in (root / INDEX).read_text(encoding="utf-8").splitlines():
        if title := re.fullmatch(r"\*\*(.+)\*\*", line):
            sections.append({title[1]: []})
        for link in LINK.finditer(line):
            path, _ = resolve(link["target"], INDEX, root)
            if path in known:
                (items,) = sections[-1].values()
                items.append({link["text"]: known[path]})
    sections = [section for section in sections if all(section.values())]
    return [*sections, {"API reference": [{name: path} for name, path in reference(root).items()]}]


def reference(root: Path = ROOT) -> dict[str, str]:
    """Name of each package that holds modules -> path of its page in the site."""
    found = {}
    for init in sorted((root / PACKAGE).rglob("__init__.py")):
        parts = init.parent.relative_to(root).parts
        if not {*parts} & {*NOT_IN_REFERENCE}:
            found[".".join(parts)] = f"reference/{'.'.join(parts)}.md"
    return found


def reference_page(package: str, root: Path = ROOT) -> str:
    """Markdown that mkdocstrings fills with the docstrings of a package and its modules."""
    folder = root.joinpath(*package.split("."))
    modules = [f"{package}.{path.stem}" for path in sorted(folder.glob("*.py")) if not path.stem.startswith("__")]
    return "\n\n".join([f"# {package}", *(f"::: {module}" for module in [package, *modules])]) + "\n"


def on_config(config: Any) -> Any:
    config.nav = navigation()
    return config


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for page, site in pages().items():
        if not page.startswith("docs/"):
            files.append(File.generated(config, site, content=(ROOT / page).read_text(encoding="utf-8")))
    for package, site in reference().items():
        files.append(File.generated(config, site, content=reference_page(package)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    known = {site: path for path, site in pages().items()}
    return site_links(markdown, known[page.file.src_uri]) if page.file.src_uri in known else markdown

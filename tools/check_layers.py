"""Enforces the house's floors and sizes by reading each file's syntax tree: one line a violation, exit code 1 for any.

The rules are told in CONTRIBUTING.md; the table of floors is here. Imports inside functions count like all others.
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "megatron_sfr"
FLOORS = {
    "runtime": 0,
    **dict.fromkeys(("data", "flow", "kernels", "pages"), 1),
    **dict.fromkeys(("model", "objectives"), 2),
    **dict.fromkeys(
        ("training", "hf", "evaluation", "diagnostics", "simplex_sampling", "conflicts", "recipe", "flags"), 3
    ),
    "config": 4,
    **dict.fromkeys(
        ("cli", "train", "resume", "agent", "assembly", "denoiser", "flow_generation", "launcher", "commands", "demo"),
        5,
    ),
}
TOP = max(FLOORS.values())
WITHOUT_MEGATRON = ("data", "flow", "kernels", "objectives", "simplex_sampling")
FOLDERS = (PACKAGE, "tests", "tools", "examples")
MOST_FILE_LINES = 300
MOST_FUNCTION_LINES = 50


@dataclass(frozen=True, order=True)
class Violation:
    path: Path
    line: int
    rule: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.rule}"


@dataclass(frozen=True)
class Source:
    """One Python file: where it is, its dotted name, its tree."""

    path: Path
    module: str
    lines: int
    tree: ast.Module

    @property
    def part(self) -> str:
        """The folder or file right under the package; empty for the package's own __init__."""
        names = self.module.split(".")
        return names[1] if names[0] == PACKAGE and len(names) > 1 else ""


def read_sources(root: Path) -> list[Source]:
    found = [root / "setup.py", *(path for folder in FOLDERS for path in sorted((root / folder).rglob("*.py")))]
    sources = []
    for path in filter(Path.is_file, found):
        text = path.read_text(encoding="utf-8")
        relative = path.relative_to(root)
        names = relative.with_suffix("").parts
        module = ".".join(names[:-1] if names[-1] == "__init__" else names)
        sources.append(Source(relative, module, len(text.splitlines()), ast.parse(text, filename=str(path))))
    return sources


def imports(source: Source, modules: frozenset[str]) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of each import; `from package import name` is the module `package.name` if there is one."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            package = source.module if source.path.name == "__init__.py" else source.module.rpartition(".")[0]
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield node.lineno, inner if inner in modules or base == PACKAGE else base


def may_import(part: str, other: str) -> bool:
    return part == other or FLOORS[other] < FLOORS[part] or FLOORS[other] == FLOORS[part] == TOP


def check_layers(source: Source, modules: frozenset[str]) -> Iterator[Violation]:
    for line, name in imports(source, modules):
        top, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        if top == "megatron" and source.part in WITHOUT_MEGATRON:
            yield Violation(source.path, line, f"{source.part}/ imports no megatron, but this imports {name}")
        if top != PACKAGE or not other:
            continue
        if other not in FLOORS:
            yield Violation(source.path, line, f"imports {name}, and {other} has no floor: is the name right?")
        elif source.part not in FLOORS:
            continue  # reported by check_layout, once a folder
        elif not may_import(source.part, other):
            upper = f"{source.part} (floor {FLOORS[source.part]})"
            yield Violation(source.path, line, f"{upper} may not import {name} (floor {FLOORS[other]})")


def check_layout(source: Source, paths: frozenset[Path]) -> Iterator[Violation]:
    if source.part not in FLOORS and source.module == f"{PACKAGE}.{source.part}":
        yield Violation(source.path, 1, f"{source.part} has no floor: add it to FLOORS in tools/check_layers.py")
    if source.path.parent / "__init__.py" not in paths:
        yield Violation(source.path, 1, f"{source.path.parent} has no __init__.py: it would not be installed")


def names_cuda(node: ast.expr | ast.stmt) -> bool:
    match node:
        case ast.Attribute(value=ast.Name(id="torch"), attr="cuda") | ast.Call(func=ast.Attribute(attr="cuda")):
            return True
        case ast.Import(names=names):
            return any(alias.name.startswith("torch.cuda") for alias in names)
        case ast.ImportFrom(module="torch", names=names):
            return any(alias.name == "cuda" for alias in names)
        case ast.ImportFrom(module=str(module)):
            return module.startswith("torch.cuda")
    return False


def check_cuda(source: Source) -> Iterator[Violation]:
    """torch.cuda by attribute, by import and by .cuda(): only runtime/ knows devices."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.expr | ast.stmt) and names_cuda(node):
            yield Violation(source.path, node.lineno, "torch.cuda belongs under runtime/: ask runtime for the device")


def check_size(source: Source) -> Iterator[Violation]:
    if source.lines > MOST_FILE_LINES:
        yield Violation(source.path, source.lines, f"{source.lines} lines: split it (at most {MOST_FILE_LINES})")
    if source.tree.body and not ast.get_docstring(source.tree):
        yield Violation(source.path, 1, "opens without a docstring: say what the file holds and why")
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MOST_FUNCTION_LINES:
                what = f"{node.name} has {length} lines: split it (at most {MOST_FUNCTION_LINES})"
                yield Violation(source.path, node.lineno, what)


def check_circles(sources: list[Source], modules: frozenset[str]) -> Iterator[Violation]:
    """Each import that closes a circle, found by walking the graph depth first."""
    edges = {s.module: [(line, name) for line, name in imports(s, modules) if name in modules] for s in sources}
    paths = {s.module: s.path for s in sources}
    done: set[str] = set()

    def walk(module: str, trail: tuple[str, ...]) -> Iterator[Violation]:
        for line, name in edges[module]:
            if name in trail:
                circle = " -> ".join([*trail[trail.index(name) :], name])
                yield Violation(paths[module], line, f"import circle {circle}")
            elif name not in done:
                yield from walk(name, (*trail, name))
        done.add(module)

    for module in sorted(edges):
        if module not in done:
            yield from walk(module, (module,))


def check(root: Path) -> list[Violation]:
    sources = read_sources(root)
    ours = [source for source in sources if source.path.parts[0] == PACKAGE]
    modules, paths = frozenset(s.module for s in ours), frozenset(s.path for s in ours)
    violations = [violation for source in sources for violation in check_size(source)]
    for source in ours:
        violations += [*check_layers(source, modules), *check_layout(source, paths)]
        if source.part != "runtime":
            violations += check_cuda(source)
    return sorted(set(violations) | set(check_circles(ours, modules)))


def main() -> int:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1]
    violations = check(root)
    print(*violations, f"floors: {len(violations)} violations" if violations else "floors: clean", sep="\n")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())

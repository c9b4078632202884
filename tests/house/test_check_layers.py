"""The layer checker finds each kind of violation in a small tree. `make check` runs it on the product."""

import subprocess
import sys
from pathlib import Path

import pytest

from tools.check_layers import check

ROOT = Path(__file__).resolve().parents[2]
DOCSTRING = '"""What it holds."""\n'


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        for folder in path.relative_to(root).parents:
            if folder.parts[:1] == ("megatron_sfr",):
                init = root / folder / "__init__.py"
                init.write_text(init.read_text() if init.exists() else DOCSTRING)
    return root


VIOLATIONS = {
    "upwards": (
        {"megatron_sfr/data/a.py": DOCSTRING + "from megatron_sfr.training.b import c\n"},
        "megatron_sfr/data/a.py:2: data (layer 2) may not import megatron_sfr.training",
    ),
    "upwards, inside a function": (
        {"megatron_sfr/flow/a.py": DOCSTRING + "def f():\n    from megatron_sfr import model\n    return model\n"},
        "megatron_sfr/flow/a.py:3: flow (layer 2) may not import megatron_sfr.model (layer 3)",
    ),
    "upwards, relative": (
        {"megatron_sfr/model/a.py": DOCSTRING + "from ..training import step\n"},
        "megatron_sfr/model/a.py:2: model (layer 3) may not import megatron_sfr.training (layer 4)",
    ),
    "sideways": (
        {"megatron_sfr/hf/a.py": DOCSTRING + "import megatron_sfr.evaluation.b\n"},
        "megatron_sfr/hf/a.py:2: hf (layer 4) may not import megatron_sfr.evaluation.b (layer 4)",
    ),
    "a part without a layer": (
        {"megatron_sfr/utils/a.py": DOCSTRING},
        "megatron_sfr/utils/__init__.py:1: utils has no layer",
    ),
    "an import of nothing we have": (
        {"megatron_sfr/model/a.py": DOCSTRING + "from megatron_sfr.models import b\n"},
        "megatron_sfr/model/a.py:2: imports megatron_sfr.models, and models has no layer",
    ),
    "megatron under objectives": (
        {"megatron_sfr/objectives/a.py": DOCSTRING + "def f():\n    from megatron.core import mpu\n    return mpu\n"},
        "megatron_sfr/objectives/a.py:3: objectives imports no megatron, but this imports megatron.core",
    ),
    "torch.cuda by attribute": (
        {"megatron_sfr/model/a.py": DOCSTRING + "import torch\n\nn = torch.cuda.device_count()\n"},
        "megatron_sfr/model/a.py:4: torch.cuda belongs under runtime/",
    ),
    "torch.cuda by import": (
        {"megatron_sfr/hf/a.py": DOCSTRING + "from torch import cuda\n"},
        "megatron_sfr/hf/a.py:2: torch.cuda belongs under runtime/",
    ),
    "a tensor sent to cuda": (
        {"megatron_sfr/hf/a.py": DOCSTRING + "def f(x):\n    return x.cuda()\n"},
        "megatron_sfr/hf/a.py:3: torch.cuda belongs under runtime/",
    ),
    "a module's variable that a function sets": (
        {"megatron_sfr/hf/a.py": DOCSTRING + "x = 1\n\n\ndef f():\n    global x\n    x = 2\n"},
        "megatron_sfr/hf/a.py:6: global x: pass what a function needs",
    ),
    "a model class": (
        {"megatron_sfr/training/a.py": DOCSTRING + "from megatron.core.models.gpt import GPTModel\n"},
        "megatron_sfr/training/a.py:2: megatron.core.models.gpt.GPTModel belongs in megatron_sfr.model.model_class",
    ),
    "a model class by its module": (
        {"megatron_sfr/training/a.py": DOCSTRING + "import megatron.core.models.hybrid as models\n"},
        "megatron_sfr/training/a.py:2: megatron.core.models.hybrid belongs in megatron_sfr.model.model_class",
    ),
    "a builder of a model class": (
        {"megatron_sfr/hf/a.py": DOCSTRING + "def f():\n    from megatron.training.models import HybridModelConfig\n"},
        "megatron_sfr/hf/a.py:3: megatron.training.models.HybridModelConfig belongs in megatron_sfr.model.builder",
    ),
    "a cycle": (
        {
            "megatron_sfr/data/a.py": DOCSTRING + "from megatron_sfr.data import b\n",
            "megatron_sfr/data/b.py": DOCSTRING + "def f():\n    from megatron_sfr.data.a import g\n    return g\n",
        },
        "megatron_sfr/data/b.py:3: import cycle megatron_sfr.data.a -> megatron_sfr.data.b -> megatron_sfr.data.a",
    ),
    "folders that import each other": (
        {
            "megatron_sfr/data/chat/a.py": DOCSTRING + "from megatron_sfr.data.targets.d import e\n",
            "megatron_sfr/data/chat/b.py": DOCSTRING,
            "megatron_sfr/data/targets/c.py": DOCSTRING + "from megatron_sfr.data.chat.b import e\n",
            "megatron_sfr/data/targets/d.py": DOCSTRING,
        },
        "megatron_sfr/data/targets/c.py:2: folders import each other: megatron_sfr.data.chat -> "
        "megatron_sfr.data.targets -> megatron_sfr.data.chat",
    ),
    "megatron under one folder of a part that may": (
        {"megatron_sfr/kl_flow/sampling/a.py": DOCSTRING + "import megatron.core\n"},
        "megatron_sfr/kl_flow/sampling/a.py:2: kl_flow.sampling imports no megatron",
    ),
    "a folder of many modules": (
        {f"megatron_sfr/hf/a{number}.py": DOCSTRING for number in range(13)},
        "megatron_sfr/hf/__init__.py:1: 13 modules in megatron_sfr/hf: divide it (at most 12)",
    ),
    "a module name that is taken": (
        {"megatron_sfr/hf/a.py": DOCSTRING, "megatron_sfr/training/data/a.py": DOCSTRING},
        "megatron_sfr/training/data/a.py:1: megatron_sfr/hf/a.py is called a too",
    ),
    "a package without a docstring": (
        {"megatron_sfr/hf/__init__.py": ""},
        "megatron_sfr/hf/__init__.py:1: opens without a docstring",
    ),
    "an export that is not listed": (
        {
            "megatron_sfr/hf/__init__.py": DOCSTRING + "from megatron_sfr.hf.a import b, c\n\n__all__ = ['b']\n",
            "megatron_sfr/hf/a.py": DOCSTRING,
        },
        "megatron_sfr/hf/__init__.py:2: c is public and not in __all__",
    ),
    "a listed export that is not there": (
        {"megatron_sfr/hf/__init__.py": DOCSTRING + "__all__ = ['a', 'b']\n", "megatron_sfr/hf/a.py": DOCSTRING},
        "megatron_sfr/hf/__init__.py:2: __all__ lists b, which is not there",
    ),
    "a long file": (
        {"tools/a.py": DOCSTRING + "x = 1\n" * 300},
        "tools/a.py:301: 301 lines: split it",
    ),
    "a long function": (
        {"tests/test_a.py": DOCSTRING + "def test_f():\n" + "    x = 1\n" * 50},
        "tests/test_a.py:2: test_f has 51 lines: split it",
    ),
    "no docstring": ({"examples/a.py": "x = 1\n"}, "examples/a.py:1: opens without a docstring"),
}


@pytest.mark.parametrize("name", VIOLATIONS)
def test_a_violation_is_reported_with_its_location(name: str, tmp_path: Path) -> None:
    files, expected = VIOLATIONS[name]
    violations = [str(v) for v in check(write_tree(tmp_path, files))]
    assert len(violations) == 1, violations
    assert violations[0].startswith(expected)


def test_a_folder_without_init_is_found(tmp_path: Path) -> None:
    write_tree(tmp_path, {"megatron_sfr/data/a.py": DOCSTRING})
    (tmp_path / "megatron_sfr/data/__init__.py").unlink()
    assert [str(v) for v in check(tmp_path)] == [
        "megatron_sfr/data/a.py:1: megatron_sfr/data has no __init__.py: it would not be installed"
    ]


def test_what_is_allowed_stays_silent(tmp_path: Path) -> None:
    allowed = {
        "megatron_sfr/runtime/e.py": DOCSTRING + "import torch\n\nn = torch.cuda.device_count()\n",
        "megatron_sfr/data/chat.py": DOCSTRING + "from megatron_sfr.data import prepared\n",
        "megatron_sfr/data/prepared.py": DOCSTRING,
        "megatron_sfr/model/a.py": DOCSTRING + "from megatron.core import mpu\nfrom megatron_sfr.flow import b\n",
        "megatron_sfr/model/model_class.py": DOCSTRING + "from megatron.core.models.gpt import GPTModel\n",
        "megatron_sfr/model/builder.py": DOCSTRING + "from megatron.training.models import GPTModelBuilder\n",
        "megatron_sfr/model/spec.py": DOCSTRING + "from megatron.core.models.gpt.gpt_layer_specs import f\n",
        "megatron_sfr/cli/training/demo.py": DOCSTRING + "from megatron_sfr.demo import world\n",
        "megatron_sfr/cli/data/chat.py": DOCSTRING,  # a command may be called as another module is
        "megatron_sfr/config/recipe.py": DOCSTRING + "from megatron_sfr.training import step\n",
        "megatron_sfr/kl_flow/b.py": DOCSTRING + "from megatron.core import mpu\n",
        "megatron_sfr/kl_flow/sampling/c.py": DOCSTRING + "from megatron_sfr.kl_flow import b\n",
        "megatron_sfr/kl_flow/d.py": DOCSTRING + "from megatron_sfr.kl_flow.sampling import c\n",
        "tests/test_a.py": DOCSTRING + "from megatron_sfr import cli\n",
    }
    assert check(write_tree(tmp_path, allowed)) == []


def test_the_command_fails_on_a_violation(tmp_path: Path) -> None:
    write_tree(tmp_path, {"examples/a.py": "x = 1\n"})
    command = [sys.executable, "tools/check_layers.py", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "layers: 1 violations"

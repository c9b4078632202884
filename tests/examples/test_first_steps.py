"""The notebook of the first ten minutes runs from first to last cell in its tiny form, and is committed clean."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = json.loads((ROOT / "examples" / "first_steps.ipynb").read_text(encoding="utf-8"))


def sources(kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == kind]


def test_it_is_committed_without_outputs() -> None:
    assert [cell["id"] for cell in NOTEBOOK["cells"] if cell.get("outputs") or cell.get("execution_count")] == []


def test_its_links_lead_to_files() -> None:
    links = re.findall(r"\]\(([^)#]+)", "".join(sources("markdown")))
    assert links
    assert [link for link in links if not (ROOT / "examples" / link).exists()] == []


@pytest.mark.slow
@pytest.mark.distributed
def test_every_cell_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FIRST_STEPS", "tiny")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "notebook"}
    for number, cell in enumerate(sources("code"), start=1):
        exec(compile(cell, f"cell {number}", "exec"), names)
    out = capsys.readouterr().out
    near = [int(count) for count in re.findall(r"the flow's samples near [-+]1: (\d+)", out)]
    assert min(near) > 250, "the flow keeps both targets apart"
    assert len(re.findall(r"'sfr loss': [\d.]+", out)) == 3
    assert (tmp_path / "runs/first_steps/exported/model.safetensors").is_file()

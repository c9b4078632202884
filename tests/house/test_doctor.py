"""The doctor on this machine, and what it says of the faults that users report, each made for real in a folder."""

import argparse
import sys
from pathlib import Path

import pytest
import torch

from megatron_sfr.cli.training import doctor
from megatron_sfr.runtime.cpu import VERSIONS
from megatron_sfr.runtime.devices import Gpu

ROOT = Path(__file__).resolve().parents[2]
H100 = Gpu("NVIDIA H100 80GB HBM3", 80 * 1024**3, (9, 0))
B200 = Gpu("NVIDIA B200", 180 * 1024**3, (10, 0))


def install_fake(folder: Path, name: str, version: str, summary: str = "") -> None:
    """What pip leaves of an installed package, as far as its metadata goes."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: {summary}\n")


def test_training_works_on_the_machine_that_runs_the_tests(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    code = doctor.run(argparse.Namespace(folder=tmp_path))
    *lines, last = capsys.readouterr().out.splitlines()
    assert code == 0
    assert last.startswith("training works here, on ")
    assert all(line.split()[0] in ("ok", "note") for line in lines)
    assert f"ok       megatron-core {VERSIONS['megatron-core']}" in lines


def test_a_problem_is_reported_with_its_remedy_and_fails(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    findings = [doctor.python_finding(), doctor.disk_finding(tmp_path / "absent"), doctor.disk_finding(tmp_path)]
    assert doctor.report(findings, "on CPU (gloo)") == 2
    _, problem, _, last = capsys.readouterr().out.splitlines()
    assert problem == f"problem  {tmp_path}/absent does not exist: make it, or name another --folder"
    assert last == "training would not work: problems: 1"


def test_another_megatron_core_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake(tmp_path, "megatron-core", "0.18.0")
    monkeypatch.syspath_prepend(tmp_path)
    finding = doctor.megatron_finding("0.19.2")
    assert finding.mark == "problem"
    assert finding.text.startswith("megatron-core 0.18.0: 0.19.2 is the one tested; pip install")


def test_the_apex_of_pypi_is_named_as_the_wrong_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake(tmp_path, "apex", "0.9.10.dev0", "Pyramid toolkit to add Velruse, Flash Messages,CSRF")
    monkeypatch.syspath_prepend(tmp_path)
    finding = doctor.apex_finding()
    assert finding.mark == "note"
    assert "unrelated web toolkit" in finding.text
    assert "pip uninstall apex" in finding.text


def test_apex_without_its_extensions_does_not_count_as_apex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake(tmp_path, "apex", "0.1", "PyTorch Extensions written by NVIDIA")
    (tmp_path / "amp_C.py").touch()
    monkeypatch.delitem(sys.modules, "amp_C", raising=False)  # hidden from the other tests
    monkeypatch.syspath_prepend(tmp_path)
    finding = doctor.apex_finding()
    assert finding.mark == "note"
    assert "without its CUDA extensions: no fused_weight_gradient_mlp_cuda" in finding.text


def test_an_extension_that_ends_its_process_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_extension.py").write_text("import os\nos.abort()\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    finding = doctor.import_finding("broken_extension", "problem", "build it again")
    assert str(finding) == "problem  import broken_extension fails: exit code -6; build it again"


@pytest.mark.parametrize(("connections", "warned"), [(None, "is not set"), ("8", "is 8"), ("1", "")])
def test_hopper_needs_one_connection(connections: str | None, warned: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    if connections:
        monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", connections)
    device, *notes = map(str, doctor.gpu_findings([H100]))
    assert device == "ok       GPU 0: NVIDIA H100 80GB HBM3, 80 GiB, compute capability 9.0"
    assert [f"CUDA_DEVICE_MAX_CONNECTIONS {warned}" in note for note in notes] == ([True] if warned else [])
    assert len(list(doctor.gpu_findings([B200]))) == 1


def test_each_way_of_installing_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(doctor.NGC_VERSION, raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])  # nothing is installed
    assert doctor.installation_finding([]) == doctor.Finding("ok", "installed by pip, for the CPU")
    absent = doctor.installation_finding([H100])
    assert (absent.mark, "without Transformer Engine" in absent.text) == ("note", True)
    install_fake(tmp_path, "transformer-engine", "2.20.2")
    assert doctor.installation_finding([H100]).text == "installed by pip, with Transformer Engine"
    monkeypatch.setenv(doctor.NGC_VERSION, "26.05")
    assert "container 26.05" in doctor.installation_finding([H100]).text


def test_a_gpu_without_transformer_engine_is_reported_with_the_effect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    finding = doctor.transformer_engine_finding([H100])
    assert finding.mark == "note"
    assert "Megatron's local layers: no FP8, no context parallelism, no fused RoPE" in finding.text
    assert "--no-build-isolation" in finding.text
    assert "local layers" not in doctor.transformer_engine_finding([]).text


@pytest.mark.parametrize(("gpus", "mark"), [([], "note"), ([H100], "problem")])
def test_a_broken_transformer_engine_stops_a_gpu(
    gpus: list[Gpu], mark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_fake(tmp_path, "transformer-engine", "2.20.2")
    (tmp_path / "transformer_engine.py").write_text("raise OSError('libcudart.so.13: cannot open')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    finding = doctor.transformer_engine_finding(gpus)
    assert finding.mark == mark
    assert "libcudart.so.13: cannot open; build it for this torch" in finding.text


def test_torch_without_the_collectives_it_needs_is_a_problem() -> None:
    here = torch.__version__.partition("+")[0]
    assert doctor.torch_finding(here, [H100], ["gloo"], driver=True).mark == "problem"
    assert doctor.torch_finding(here, [], [], driver=False).mark == "problem"
    assert doctor.torch_finding(here, [], ["gloo"], driver=False).mark == "ok"
    hidden = doctor.torch_finding(here, [], ["gloo"], driver=True)
    assert hidden.mark == "note"
    assert "torch sees no GPU" in hidden.text


def test_what_is_tested_is_what_is_pinned() -> None:
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert [f"{name}=={VERSIONS[name]}" in pins for name in ("torch", "megatron-core")] == [True, True]
    assert (ROOT / ".python-version").read_text().startswith(".".join(map(str, doctor.TESTED_PYTHON)))

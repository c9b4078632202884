"""Run as ranks: runs several flow-generate jobs in one process start. argv: a JSON list of their arguments.

A job whose output is named `cut` is interrupted at the start of its third batch of two, and run again.
"""

import json
import sys
from io import StringIO
from pathlib import Path

from megatron_sfr.kl_flow.flow_generate import Job, generate, plan

KEPT = '"seed": "of the first run"'


class Stop(StringIO):
    """A terminal that raises Ctrl-C when the progress bar reports the fifth sample."""

    def write(self, text: str) -> int:
        if "sample 5" in text:
            raise KeyboardInterrupt
        return len(text)


def cut(job: Job) -> None:
    """Keeps four lines of an interrupted run and marks the first one."""
    try:
        generate(job, plan(job), Stop())
    except KeyboardInterrupt:
        partial = Path(job.output).with_name(".cut.jsonl.partial")
        text = partial.read_text(encoding="utf-8")
        assert text.count("\n") == 4
        partial.write_text(text.replace(f'"seed": {job.seed}', KEPT, 1), encoding="utf-8")
        return
    raise AssertionError("the job was not stopped")


if __name__ == "__main__":
    for given in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        job = Job(**given)
        if Path(job.output).stem == "cut":
            cut(job)
        generate(job, plan(job), sys.stderr)

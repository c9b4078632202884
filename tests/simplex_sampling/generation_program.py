"""Under torchrun: does flow-generate's jobs one after another in one start. argv: a JSON list of their arguments.

A job whose output is named `cut` is stopped as its third batch of two begins, and started again.
"""

import json
import sys
from io import StringIO
from pathlib import Path

from megatron_sfr.flow_generation import Job, generate, plan

KEPT = '"seed": "of the first run"'


class Stop(StringIO):
    """A terminal on which Ctrl-C comes when the bar tells of the fifth sample."""

    def write(self, text: str) -> int:
        if "sample 5" in text:
            raise KeyboardInterrupt
        return len(text)


def cut(job: Job) -> None:
    """Leaves four lines of a run that was stopped; the first of them says so."""
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

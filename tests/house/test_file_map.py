"""README's file map: what it names exists, and it names every folder.

The last test bounds the number of files that one conversation passes through.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import warm

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_sfr"
README = (ROOT / "README.md").read_text(encoding="utf-8")
MOST_FILES = 31
"""Files that one conversation passes through, from JSONL to its loss, as tools/trace_conversation.py counts them."""
SEARCHES = {  # what a reader looks for: the file that README's table names, and what has to be in it
    "a token loss": ("megatron_sfr/objectives/token/gem.py", "class GEM("),
    "the reply mask": ("megatron_sfr/data/chat/loss_mask.py", "class Supervised"),
    "how the flow head is attached to Megatron's GPT": ("megatron_sfr/model/attach_head.py", "def attach_head("),
    "encoding targets ahead of training": ("megatron_sfr/data/targets/prefetch.py", "class Prefetcher"),
    "the parameter mapping of Qwen3": ("megatron_sfr/hf/families/qwen3.py", "FAMILY = "),
}


def table() -> dict[str, str]:
    """The rows of README's table of places: {what to read: the cell that names the file}."""
    rows = README.partition("| to read | open |\n|---|---|\n")[2].partition("\n\n")[0].splitlines()
    return {cells[1].strip(): cells[2].strip() for cells in (row.split("|") for row in rows) if len(cells) == 4}


def tree() -> Iterator[Path]:
    """The folders and files that README's tree lists."""
    text = re.search(r"```\n(megatron_sfr/\n.*?)```", README, re.DOTALL)
    assert text is not None
    above: list[str] = []
    for line in text[1].splitlines():
        entry = re.match(r"( *)([\w.]+/?)", line)
        assert entry is not None, line
        above = [*above[: len(entry[1]) // 2], entry[2]]
        yield ROOT.joinpath(*above)


@pytest.mark.parametrize("what", SEARCHES)
def test_the_table_leads_to_the_place(what: str) -> None:
    path, content = SEARCHES[what]
    assert f"`{path}`" in table()[what]
    assert content in (ROOT / path).read_text(encoding="utf-8")


def test_everything_in_the_table_and_the_tree_exists() -> None:
    named = [ROOT / path for cell in table().values() for path in re.findall(r"`(megatron_sfr/[\w./]+)`", cell)]
    assert len(named) >= len(table())
    assert [path for path in (*named, *tree()) if not path.exists()] == []


def test_the_tree_lists_every_folder_and_every_file_at_the_top() -> None:
    listed = set(tree())
    folders = {path.parent for path in PACKAGE.rglob("__init__.py")} - {PACKAGE / "cli" / x for x in CLI}
    top = {path for path in PACKAGE.glob("*.py") if path.name not in ("__init__.py", "option_names.py")}
    assert sorted((folders | top) - listed) == []


CLI = ("data", "training", "evaluation")  # in one line of the tree


@pytest.mark.distributed
def test_one_conversation_passes_through_few_files() -> None:
    done = warm.run("-m", "tools.trace_conversation", ranks=1, check=True)
    files = [line.split()[0] for line in done.stdout.splitlines() if ".py " in line]
    assert {"data/chat/loss_mask.py", "training/forward_step.py", "objectives/token/cross_entropy.py"} <= set(files)
    assert len(files) <= MOST_FILES, "\n".join(files)

"""The public API: `import megatron_sfr as sfr`. Every name is lazy, documented, and its example runs."""

import ast
import doctest
import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

import megatron_sfr as sfr
from megatron_sfr.demo.train_tokenizer import train_tokenizer
from megatron_sfr.demo.world import QUESTIONS, World
from megatron_sfr.hf.head_files import DESCRIPTION, WEIGHTS
from megatron_sfr.objectives.sfr.target_scale import TargetOptions
from megatron_sfr.objectives.token import registry
from megatron_sfr.option_names import to_arguments

ROOT = Path(__file__).parents[1]
FIRST = ("prepare", "embed", "open_prepared", "import_hf", "export_hf")  # they write what later examples read
WITH_EXAMPLES = [*FIRST, *(name for name in sfr.__all__ if name not in FIRST)]


def test_importing_the_package_loads_neither_torch_nor_numpy() -> None:
    code = "import sys, megatron_sfr as sfr; dir(sfr); print({'torch', 'numpy', 'megatron'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        sfr.nothing  # noqa: B018


def test_all_lists_every_lazy_name_in_order() -> None:
    assert set(sfr.__all__) == set(sfr._MODULE_OF) <= set(dir(sfr))


@pytest.mark.parametrize("name", sfr.__all__)
def test_every_name_is_documented(name: str) -> None:
    thing = getattr(sfr, name)
    doc = inspect.getdoc(thing) or ""
    assert doc
    if inspect.isfunction(thing):
        assert all(f"{section}:" in doc for section in ("Args", "Returns", "Raises", "Example"))
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    assert re.search(rf"\b{name}\b", page), f"docs/api.md does not list {name}"


def test_the_scores_that_the_page_lists_exist() -> None:
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    listed = re.findall(
        r"^\| (`\w+\(.*) \| `(\w+)` \|$", page.partition("`megatron_sfr.evaluation.scores.`")[2], re.MULTILINE
    )
    assert len(listed) >= 3
    for functions, module in listed:
        for name in re.findall(r"`(\w+)\(", functions):
            assert callable(getattr(importlib.import_module(f"megatron_sfr.evaluation.scores.{module}"), name))


@pytest.mark.parametrize("name", sfr.__all__)
def test_every_field_is_documented_by_a_string_under_it(name: str) -> None:
    thing = getattr(sfr, name)
    if not inspect.isclass(thing):
        return
    (body,) = (node.body for node in ast.parse(inspect.getsource(thing)).body if isinstance(node, ast.ClassDef))
    fields = [i for i, node in enumerate(body) if isinstance(node, ast.AnnAssign)]
    names = {ast.unparse(body[i].target): body[i + 1 : i + 2] for i in fields}
    assert [field for field, after in names.items() if not (after and is_text(after[0]))] == []


def is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def write_model(folder: Path, rows: list[dict]) -> None:
    """A Hugging Face model with random weights and a tokenizer, and a flow head beside it."""
    texts = [message["content"] for row in rows for message in row["messages"]]
    tokenizer = train_tokenizer(texts, 400)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    from megatron.core.transformer import TransformerConfig

    plan = sfr.FlowHeadPlan(sfr.FlowHeadOptions(width=16), dim=384)
    head = sfr.FlowHead(
        TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=1, cuda_graph_modules=[]), plan
    )
    sizes = {"hidden_size": 32, "dim": 384, "horizons": 1, "has_network": True, "gate_bins": 1}
    options = {"head": to_arguments(plan.options), "targets": to_arguments(TargetOptions())}
    (folder / DESCRIPTION).write_text(json.dumps({**sizes, **options, "loss": "flow", "encoder": None}))
    save_file(head.state_dict(), folder / WEIGHTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the examples run: chats.jsonl and model/."""
    folder = tmp_path_factory.mktemp("api")
    records = World().validation(QUESTIONS[:2], "seen")
    rows = list({(record["persona"], record["messages"][0]["content"]): record for record in records}.values())
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    write_model(folder / "model", rows)
    return folder


def test_the_examples_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One test, because later examples read what earlier ones wrote. A loss that an example registers is forgotten."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(registry, "LOSSES", registry.LOSSES.copy())
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    finder = doctest.DocTestFinder(recurse=False)
    for name in WITH_EXAMPLES:
        thing = getattr(sfr, name)
        [example] = finder.find(thing, name, globs={"sfr": sfr}) or [None]
        assert example is not None, f"{name} has no docstring"
        assert example.examples, f"{name} has no example"
        assert runner.run(example).failed == 0, f"the example of {name} fails"


def test_one_input_needs_no_list(folder: Path) -> None:
    """Python takes a text for a sequence of letters, each of them an input."""
    options = sfr.PrepareOptions(seq_length=256)
    assert (
        sfr.prepare(str(folder / "chats.jsonl"), folder / "one", folder / "model", options, progress=False).samples
        == 18
    )
    assert len(sfr.generate(folder / "model", "How was your day?", max_new_tokens=2)) == 1


def test_an_encoder_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"^the encoder is a function: give a folder of sentence-transformers, a name"):
        sfr.embed(folder, lambda texts: texts, sfr.EmbedOptions())  # type: ignore[arg-type]

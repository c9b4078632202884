"""`megatron-sfr plan`: the examples' tables, what does not fit and what would make it fit, and a search of layouts."""

import json
import re
import shlex
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from megatron_sfr.cli import main
from megatron_sfr.cli.training.plan import _least_nodes
from megatron_sfr.cli.training.plan_table import _rounded
from tests import warm

ROOT = Path(__file__).resolve().parents[3]
CODER = "examples/qwen2.5_coder_7b/recipe.yaml"
PLANNED = ("qwen3_32b_personas", "qwen2.5_coder_7b", "long_context", "llama3_8b_lora_sfr")


def plan(*words: str) -> tuple[int, str, str]:
    """Exit code and output of `megatron-sfr plan`, run at the repository's root."""
    done = warm.run("-m", "megatron_sfr.cli", "plan", *(str(ROOT / x) if x.endswith(".yaml") else x for x in words))
    return done.returncode, done.stdout, done.stderr


def json_plan(*words: str) -> dict[str, Any]:
    code, out, error = plan(*words, "--json")
    assert code in (0, 1), error
    return json.loads(out)


@pytest.mark.parametrize("example", PLANNED)
def test_the_tables_of_the_examples_come_from_the_command_beside_them(example: str) -> None:
    readme = (ROOT / "examples" / example / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^megatron-sfr plan (.*?)(?: *#.*)?$", readme, flags=re.MULTILINE)
    code, out, error = plan(*shlex.split(command))
    assert (code, error) == (0, "")
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert len(table) > 7
    assert "\n".join(table) in readme, out


@pytest.mark.parametrize(("value", "text"), [(0, "0.0"), (2345.67, "2,345.7"), (0.06, "0.1"), (0.0123, "0.012")])
def test_small_numbers_are_not_shown_as_zero(value: float, text: str) -> None:
    assert _rounded(value, 1) == text


def test_what_does_not_fit_is_told_with_flags_that_make_it_fit() -> None:
    """GPUs of 36 GiB, of which 8 % are reserved, are too small for 36 GB."""
    small = (CODER, "--memory-gib", "36")
    code, out, _ = plan(*small)
    assert code == 1
    assert "does not fit" in out
    found = json_plan(*small)
    assert found["remedies"]
    for remedy in found["remedies"]:
        assert f"would fit with {remedy}" in out
    assert json_plan(*small, *shlex.split(found["remedies"][0]))["fits"]


def test_a_sweep_ranks_layouts_that_fit() -> None:
    found = json_plan(CODER, "--sweep", "--nodes", "2")
    times = [round(each["time"], 3) for each in found["sweep"]]
    assert len(times) > 3
    assert times == sorted(times)
    assert max(each["bytes"] for each in found["sweep"]) <= found["usable_bytes"]
    assert {each["layout"].rpartition(" ")[2] for each in found["sweep"]} == {"none", "full"}


def test_a_given_utilisation_and_rate_give_hours() -> None:
    half, whole = (json_plan(CODER, "--mfu", mfu)["work"] for mfu in ("0.2", "0.4"))
    assert half["hours"] == pytest.approx(2 * whole["hours"])
    assert 0 < half["head_share"] < 0.01


@pytest.mark.parametrize(
    ("tensor", "context", "expert", "expert_tensor", "machines"),
    [(2, 2, 1, None, 1), (4, 2, 1, None, 2), (2, 1, 8, 1, 2), (1, 1, 8, None, 2), (2, 1, 8, None, 4)],
)
def test_the_fewest_machines_hold_experts_too(
    tensor: int, context: int, expert: int, expert_tensor: int | None, machines: int
) -> None:
    """With two pipeline stages and 8 GPUs a machine."""
    options = Namespace(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=2,
        context_parallel_size=context,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=expert_tensor,
    )
    assert _least_nodes(options, 8) == machines


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plan", "absent.yaml"], "absent.yaml: no such recipe"),
        (["plan", CODER, "--mfu", "0"], "--mfu 0.0: give a number above 0"),
        (["plan", CODER, "--nodes", "-1"], "--nodes -1: give a number above 0"),
    ],
)
def test_user_errors_come_before_megatron_is_imported(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(words) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--tensor-model-parallel-size", "3"], "Megatron refuses these flags"),
        (["--optimizer", "muon"], "optimizer = muon: `megatron-sfr plan` counts adam"),
        (["--mtp-num-layers", "1"], "mtp_num_layers = 1: `megatron-sfr plan` does not count its memory"),
    ],
)
def test_what_is_not_counted_is_refused_in_one_line(flags: list[str], said: str) -> None:
    code, _, error = plan(CODER, *flags)
    assert code == 2
    assert said in error.splitlines()[-1]

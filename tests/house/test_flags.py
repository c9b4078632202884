"""Each of Megatron's flags has a line in the table; those that would do nothing or harm are refused, with a reason.

That a flag marked as passed on works is Megatron's own business and not tested here.
"""

import argparse
from pathlib import Path

import pytest
from megatron.training.arguments import add_megatron_arguments

from megatron_sfr.config import settings
from megatron_sfr.config.flags import refused
from megatron_sfr.config.flags.flag_table import page, refusal, table
from megatron_sfr.config.flags.option_parser import STORED, stored_parser, stored_text, to_flags
from megatron_sfr.config.flags.refused import REFUSED
from megatron_sfr.config.recipe import check_recipes
from megatron_sfr.config.settings import DEFAULTS, flag_parser, read_settings
from megatron_sfr.doctor.resilience import resilience_finding
from megatron_sfr.objectives.token.registry import LOSSES
from tests.config.test_settings import write

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def upstream() -> dict[str, argparse.Action]:
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False, add_help=False))
    return {action.dest: action for action in parser._actions}


def test_each_flag_of_megatron_has_a_line_in_the_table(upstream: dict[str, argparse.Action]) -> None:
    known = table()
    assert sorted(upstream.keys() - known.keys()) == [], "new in Megatron: find out who reads them, and add them"
    assert sorted(known.keys() - upstream.keys()) == [], (
        "gone from Megatron: take them out of megatron_sfr/config/flags/"
    )


def test_the_page_is_the_table() -> None:
    assert (ROOT / "docs" / "flags.md").read_text(encoding="utf-8") == page(), "run: python tools/write_flags_page.py"


def test_the_stored_parser_is_a_copy_of_the_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    """So it refuses nothing that the parser accepts. Other tests of this process may have registered losses."""
    ours = {name: loss for name, loss in LOSSES.items() if loss.loss.__module__.startswith("megatron_sfr.")}
    monkeypatch.setattr(settings, "LOSSES", ours)
    assert STORED.read_text(encoding="utf-8") == stored_text(flag_parser()), "run: python tools/write_flags_page.py"
    stored = stored_parser()
    assert stored is not None
    assert stored_text(stored) == stored_text(flag_parser())
    for copy, action in zip(stored._actions, flag_parser()._actions, strict=True):
        assert (copy.option_strings, copy.dest, copy.nargs) == (action.option_strings, action.dest, action.nargs)
        assert copy.type in (None, str, action.type)
        if copy.choices is not None:
            accepts = action.type or str
            assert {accepts(str(choice)) for choice in copy.choices} == set(action.choices or ()), action.dest


def test_a_copy_of_another_version_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "megatron_core-0.20.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: megatron-core\nVersion: 0.20.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert stored_parser() is None
    (tmp_path / "recipe.yaml").write_text("added_in_020: 1\n")
    check_recipes([tmp_path / "recipe.yaml"], ["--added-in-020", "1"])


@pytest.mark.parametrize("recipe", sorted((ROOT / "examples").rglob("*.yaml")), ids=lambda path: path.parent.name)
def test_recipes_pass_the_quick_check(recipe: Path) -> None:
    check_recipes([recipe], [])


WRONG = {
    "lr: fast": [],
    "lr: [1, 2]": [],
    "lr: {a: 1}": [],
    "train_iters: 2.5": [],
    "train_iters: 2026-11-28": [],
    "sfr: 1": [],
    "no_rope_fusion: never": [],
    "gem_h: jem": [],
    "sfr_loss: flo": [],
    "optimizer: adamm": [],
    "leraning_rate: 1": [],
    "train-data-path: [[a]]": [],
    "seed: 1": ["--seed"],
    "seed: 2": ["--seeds=3"],
    "seed: 3": ["--train-iters", "many"],
    "seed: 4": ["stray"],
}


@pytest.mark.parametrize("text", WRONG)
def test_the_quick_check_says_what_the_parser_says(tmp_path: Path, text: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"recipe\.yaml") as quick:
        check_recipes([recipe], WRONG[text])
    with pytest.raises(ValueError, match=r"recipe\.yaml") as complete:
        read_settings(["--recipe", str(recipe), *WRONG[text]])
    assert str(quick.value) == str(complete.value)


def test_a_loss_by_its_path_brings_options_that_are_checked_later(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("objective: my.losses.Mine\nmine_beta: 0.5\n")
    check_recipes([tmp_path / "recipe.yaml"], [])
    (tmp_path / "recipe.yaml").write_text("mine_beta: 0.5\n")
    check_recipes([tmp_path / "recipe.yaml"], ["--objective", "my.losses.Mine"])


def test_defaults_are_not_refused() -> None:
    defaults = vars(flag_parser().read([]))
    assert refusal(flag_parser().read(to_flags(DEFAULTS, flag_parser())), defaults) is None


def test_a_refused_flag_is_named_in_the_error() -> None:
    defaults = vars(flag_parser().read([]))
    for entry in REFUSED:
        for name in entry.names.split() if entry.when is None else ():
            found = refusal(argparse.Namespace(**defaults | {name: "something else"}), defaults)
            assert found == f"{name} = something else: {entry.reason}; {entry.remedy}"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--sft", "sft = True: conversations and their loss masks come from `megatron-sfr prepare`"),
        ("--profile-step-start 5", "no step is profiled without profile; set profile_steps for torch's profiler"),
        ("--profile --sfr-backend cpu", "nsys profiles CUDA; set profile_steps"),
        ("--profile-steps 3:5 --nvtx-ranges --save s", "only nsys reads it"),
        ("--pytorch-profiler-collect-shapes", "it belongs to torch's profiler; set profile_steps too"),
        ("--mock-data", "mock_data = True: training reads prepared folders; name one in train_data_path"),
        ("--logits-load-dir d", "logits_load_dir = d: distillation"),
        ("--hybrid-context-parallel", "sequences are divided into equal parts"),
        ("--overlap-moe-expert-parallel-comm", "schedule plan, which ours does not have"),
        ("--tokenizer-type HuggingFaceTokenizer", "leave it out and set vocab_size"),
        ("--tokenizer-model m", "name the tokenizer in `megatron-sfr prepare`"),
        ("--reset-position-ids", "set dataloader_inter_document_masking, which knows where documents begin"),
        ("--dataloader-type external", "use single or cyclic"),
        ("--position-embedding-type mrope", "use rope, yarn, learned_absolute or none"),
        ("--ddp-average-in-collective", "gradients are divided by the tokens of the global batch"),
        ("--cross-entropy-loss-fusion", "have kernels of this package"),
        ("--iterations-to-skip 3 --tensor-model-parallel-size 2", "on the first tensor-parallel rank alone"),
        ("--heterogeneous-layers-config-path f", "train with Transformer Engine on CUDA"),
        ("--yaml-cfg f", "it replaces all arguments"),
        ("--per-split-data-args-path f", "list them there, with their weights"),
    ],
)
def test_a_flag_without_effect_is_one_line(tmp_path: Path, flags: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_settings([*write(tmp_path), *flags.split()])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "flags",
    [
        "--tokenizer-type NullTokenizer",
        "--dataloader-type cyclic",
        "--iterations-to-skip 3",
        "--position-embedding-type rope",
        "--no-create-attention-mask-in-dataloader",
    ],
)
def test_what_works_is_accepted(tmp_path: Path, flags: str) -> None:
    read_settings([*write(tmp_path), *flags.split()])


def test_asynchronous_saves_need_a_worker_and_a_gpu() -> None:
    defaults = vars(flag_parser().read([]))
    alone = argparse.Namespace(**defaults | {"async_save": True})
    with_worker = argparse.Namespace(**defaults | {"async_save": True, "use_persistent_ckpt_worker": True})
    for args in (alone, with_worker):  # without a GPU
        found = refusal(args, defaults)
        assert found is not None
        assert found.startswith("async_save = True: Megatron needs use_persistent_ckpt_worker")


@pytest.mark.parametrize(
    ("installed", "accepted"), [(None, ["mcore"]), ("0.4.1", ["mcore"]), ("0.7.0", ["nvrx", "mcore"])]
)
def test_asynchronous_saves_on_a_gpu_need_a_recent_resiliency_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: str | None, accepted: list[str]
) -> None:
    if installed:
        folder = tmp_path / f"nvidia_resiliency_ext-{installed}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: nvidia-resiliency-ext\nVersion: {installed}\n")
        monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(refused, "choose", lambda _: "cuda")
    defaults = vars(flag_parser().read([]))
    changed = {"async_save": True, "use_persistent_ckpt_worker": True}
    found = {
        x: refusal(argparse.Namespace(**defaults | changed | {"async_strategy": x}), defaults)
        for x in ("nvrx", "mcore")
    }
    assert [x for x in found if found[x] is None] == accepted
    assert "nvrx" in accepted or "megatron-sfr[resilience]" in str(found["nvrx"])
    assert resilience_finding().mark == {None: "note", "0.4.1": "problem", "0.7.0": "ok"}[installed]


@pytest.mark.parametrize("name", ["cuda_graph_impl", "cuda_graph_modules", "cuda_graph_scope_deprecated"])
def test_a_captured_iteration_is_refused_by_every_flag(name: str) -> None:
    defaults = vars(flag_parser().read([]))
    found = refusal(argparse.Namespace(**defaults | {name: "full_iteration"}), defaults)
    assert found is not None
    assert "use cuda_graph_impl local or transformer_engine" in found
    assert refusal(argparse.Namespace(**defaults | {name: "local"}), defaults) is None

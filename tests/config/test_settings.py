"""Recipes, flags and defaults become one set of arguments; what is wrong with them is said in one line."""

from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_sfr.config.settings import DEFAULTS, PRESETS, flag_parser, parse, read_settings, to_flags
from megatron_sfr.config.validation import contradiction

BASE = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 16,
    "max_position_embeddings": 16,
    "micro_batch_size": 2,
    "train_iters": 5,
    "lr": 0.001,
    "vocab_size": 100,
    "train_data_path": ["data"],
    "sfr_backend": "cpu",
}


def write(folder: Path, **changes: Any) -> list[str]:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(BASE | changes), encoding="utf-8")
    return ["--recipe", str(path)]


def test_flags_win_over_the_recipe_and_the_recipe_over_our_defaults(tmp_path: Path) -> None:
    given = {"sfr": True, "sfr-weight": 2.0, "hidden_dropout": 0.2}
    recipe = read_settings([*write(tmp_path, **given), "--sfr-weight", "3"]).recipe
    assert (recipe["sfr_weight"], recipe["hidden_dropout"]) == (3.0, 0.2)
    assert recipe["attention_dropout"] == DEFAULTS["attention-dropout"]


def test_the_saved_recipe_reads_back_to_itself(tmp_path: Path) -> None:
    changes = {"sfr": True, "swiglu": True, "window_size": "3,0", "save": str(tmp_path / "run")}
    first = read_settings([*write(tmp_path, **changes), "--bf16"])
    saved = tmp_path / "saved.yaml"
    saved.write_text(yaml.safe_dump(first.recipe), encoding="utf-8")
    assert read_settings(["--recipe", str(saved)]).recipe == first.recipe
    assert first.recipe["load"] == first.recipe["save"]


def test_switches_lists_and_nulls() -> None:
    recipe = {"swiglu": True, "bf16": False, "no_rope_fusion": True, "bias_gelu_fusion": False, "seed": None}
    flags = to_flags(recipe | {"train_data_path": [0.3, "a", 0.7, "b"]}, flag_parser())
    assert flags == [
        "--swiglu",
        "--no-rope-fusion",
        "--no-bias-gelu-fusion",
        *("--train-data-path", "0.3", "a", "0.7", "b"),
    ]
    assert flag_parser().read(to_flags({"hybrid_layer_pattern": "-*"}, flag_parser())).hybrid_layer_pattern == "-*"


PACKED = {"sfr_packing": "first_fit_decreasing"}
KL_FLOW = {"training_task": "kl-flow", "position_embedding_type": "rope"}
ADALN = {"kl_flow_time": "adaln"}


def test_packing_with_transformer_engine_takes_one_row_at_a_time() -> None:
    words = ["--train-data-path", "a", "--vocab-size", "9", "--calculate-per-token-loss", "--micro-batch-size", "2"]
    args = flag_parser().read([*words, "--sfr-packing", "first_fit_decreasing"])
    assert "set micro_batch_size to 1" in str(contradiction(args))
    args.micro_batch_size = 1
    assert contradiction(args) is None
    args.context_parallel_size = 2
    assert contradiction(args) is None
    args.transformer_impl, args.eval_micro_batch_size = "local", 2
    assert "set micro_batch_size and eval_micro_batch_size to 1" in str(contradiction(args))


def test_context_parallelism_with_transformer_engine_refuses_what_its_attention_cannot_divide() -> None:
    words = ["--train-data-path", "a", "--vocab-size", "9", "--calculate-per-token-loss", "--micro-batch-size", "1"]
    args = flag_parser().read([*words, "--context-parallel-size", "2", "--dataloader-inter-document-masking"])
    assert "Megatron's datasets cut documents at any token and do not pad them" in str(contradiction(args))
    args.transformer_impl = "local"
    assert contradiction(args) is None
    args = flag_parser().read([*words, "--context-parallel-size", "2", "--window-size", "8,0"])
    assert "with cp_comm_type all_gather and a2a only" in str(contradiction(args))
    args.cp_comm_type = ["all_gather"]
    assert contradiction(args) is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--multiple-validation-sets --valid-data-path a b", "set full_validation too"),
        ("--full-validation", "set valid_data_path"),
        ("--full-validation --valid-data-path a --test-data-path b", "name the test data in valid_data_path"),
        ("--full-validation --valid-data-path 0.5 a 0.5 b", "leave the weights in valid_data_path out"),
        ("--full-validation --valid-data-path a --eval-micro-batch-size 2", "leave eval_micro_batch_size and"),
        ("--valid-data-path a b --validation-set-names x y", "set multiple_validation_sets and full_validation too"),
        ("SEVERAL --valid-data-path a b --validation-set-names x", "one name to each of the 2 folders"),
        ("SEVERAL --valid-data-path a b --validation-set-names x x", "all distinct"),
        ("SEVERAL --valid-data-path a b --validation-set-names x y", None),
    ],
)
def test_validation_sets_that_megatron_cannot_evaluate_are_refused(flags: str, message: str | None) -> None:
    words = ["--train-data-path", "a", "--vocab-size", "9", "--calculate-per-token-loss"]
    given = flags.replace("SEVERAL", "--full-validation --multiple-validation-sets").split()
    found = contradiction(flag_parser().read([*words, *given]))
    assert found is None if message is None else message in str(found)


def test_kl_flow_with_transformer_engine_has_its_time_as_a_token() -> None:
    words = ["--train-data-path", "a", "--vocab-size", "9", "--calculate-per-token-loss"]
    args = flag_parser().read([*words, *to_flags(KL_FLOW | ADALN, flag_parser())])
    assert "set kl_flow_time to token, or transformer_impl to local" in str(contradiction(args))
    args.kl_flow_time = "token"
    assert contradiction(args) is None
    args.fp8 = "hybrid"
    assert "fp8_format is not supported with" in str(contradiction(args))


@pytest.mark.parametrize(
    "option",
    ["defer_embedding_wgrad_compute", "reuse_grad_buf_for_mxfp8_param_ag", "fp8_output_proj", "use_megatron_fsdp"],
)
def test_chunks_of_the_lm_head_are_refused_where_its_weight_is_not_a_plain_parameter(option: str) -> None:
    words = ["--train-data-path", "a", "--vocab-size", "9", "--calculate-per-token-loss"]
    args = flag_parser().read(words)
    setattr(args, option, True)
    message = str(contradiction(args))
    assert f"{option} " in message
    assert "set loss_chunk_tokens to 0" in message
    assert ("has no effect on chunks" in message and "leave it out" in message) == option.startswith("defer")
    args.loss_chunk_tokens = 0
    assert contradiction(args) is None


def test_cpu_changes_are_said(tmp_path: Path) -> None:
    settings = read_settings(write(tmp_path, transformer_impl="transformer_engine"))
    assert settings.backend == "cpu"
    assert "transformer_impl: transformer_engine -> local" in settings.changes


@pytest.mark.parametrize(
    ("changes", "flags", "message"),
    [
        ({"sfr_wieght": 1.0}, [], r"recipe.yaml:\d+: unknown key 'sfr_wieght'; did you mean sfr_weight\?"),
        ({}, ["--tensor-model-paralel-size", "2"], r"did you mean --tensor-model-parallel-size\?"),
        ({"swiglu": "yes please"}, [], "neither true nor false"),
        ({"sfr": {"weight": 1}}, [], "recipes are flat"),
        ({"train_iters": [4]}, [], r"recipe.yaml: train-iters: \[4\] is not one value"),
        ({"train_data_path": [["a"]]}, [], r"train-data-path: \['a'\] is not a value or a list of values"),
        (
            {"lr": date(2020, 1, 1)},
            [],
            r"lr: datetime.date\(2020, 1, 1\) is not one value; .* in quotes where YAML takes it for a date",
        ),
        ({"train_iters": "1e3"}, [], r"recipe.yaml: argument --train-iters: invalid int value: '1e3'"),
        ({"train_iters": "y" * 6000}, [], r"recipe.yaml: argument --train-iters: invalid int value: 'y{70,80}\.\.\.'$"),
        ({"train_iters": "many"}, [], "invalid int value"),
        ({"train_iters": 0}, [], "train_iters = 0: give at least 1"),
        ({"lr": float("nan")}, [], "lr: not a finite number"),
        ({"lr": float("inf"), "min_lr": float("inf")}, [], "lr, min_lr: not a finite number"),
        ({"sfr_weight": float("nan")}, [], "sfr_weight: not a finite number"),
        ({}, ["--weight-decay", "nan"], "weight_decay: not a finite number"),
        ({"fp8_format": "hybrid"}, [], "FP8 needs Transformer Engine on CUDA"),
        ({**KL_FLOW, "context_parallel_size": 2}, [], "is not supported with --training-task kl-flow yet"),
        ({"loss_chunk_tokens": -1}, [], "loss_chunk_tokens = -1: give at least 0"),
        ({"sfr": True, "sfr_draws": 0}, [], "sfr_draws = 0"),
        ({"sfr_hf_load": "a", "pretrained_checkpoint": "b"}, [], "both say where to start"),
        ({"sfr_hf_load": "a", "exit_on_missing_checkpoint": True}, [], "leave one out"),
        ({"sfr_hf_load": "a", "init_model_with_meta_device": True}, [], "then --pretrained-checkpoint"),
        ({"sfr_fresh_head": True}, [], "goes with --load DIR --finetune"),
        ({"vocab_size": None}, [], "--vocab-size is missing"),
        ({"lr_warmup_iters": 5}, [], "lr_warmup_iters = 5 has to end before the schedule"),
        ({"train_data_path": None}, [], "no training data"),
        ({"calculate_per_token_loss": False}, [], "every term here is a sum over the global batch"),
        ({"objective": "jem"}, [], "invalid choice: 'jem'"),
        ({"objective": "sed"}, [], "needs --sed-threshold: `megatron-sfr calibrate-sed` finds it"),
        ({"gem_beta": 1.5}, [], "gem_beta = 1.5: choose above 0 and up to 1"),
        ({"gem_slope": 0}, [], "gem_slope = 0.0: the logsigmoid needs a slope above 0"),
        ({"sed_top_k": 0}, [], "sed_top_k = 0: choose 1 to 128"),
        ({"sed_weight": -1}, [], "sed_weight = -1.0: must not be negative"),
        ({"sfr": True, "sfr_source": "zero"}, [], r"leaks the target \(x_1 = x_t / t\): set sfr_time to zero"),
        ({"sfr_ema_decay": 1}, [], "sfr_ema_decay = 1.0: choose at least 0 and below 1"),
        ({"sfr_layer": 0}, [], "sfr_layer = 0: layers count from 1"),
        ({"sfr_whiten_decay": 1}, [], "sfr_whiten_decay = 1.0"),
        ({"sfr_clip_grad": -1.0}, [], "sfr_clip_grad is -1.0; give a norm above 0, or 0 for no clipping"),
        ({"sfr_head_lr_mult": 0.0}, [], "sfr_head_lr_mult is 0.0; give a factor above 0"),
        ({"sfr": True, "sfr_preset": "reference", "sfr_clip_grad": 1.0}, [], "head and backbone are clipped together"),
        ({"sfr": True, "sfr_clip_grad": 1.0, "clip_grad": 0.0}, [], "sfr_clip_grad has no effect at clip_grad = 0"),
        ({"sfr": True, "sfr_loss": "cka", "sfr_head_lr_mult": 2.0}, [], "leave sfr_clip_grad and sfr_head_lr_mult out"),
        ({"sfr": True, "sfr_head_lr_mult": 2.0, "use_mup": True}, [], "sfr_head_lr_mult does not work with use_mup"),
        ({"sfr_weight_control": "ratio", "sfr_weight": 0.0}, [], "sfr_weight_control = ratio adapts the weight around"),
        ({"sfr_gate_ratio": 0.5}, [], "sfr_gate_ratio = 0.5: below 1 the gate would close on every step"),
        ({"sfr_gate_bins": 0}, [], "sfr_gate_bins = 0"),
        ({"sfr": True, "sfr_loss": "cka", "sfr_gate": "static"}, [], "sfr_loss = cka has no head"),
        ({"sfr": True, "sfr_ema": "smooth"}, [], "averages the head from the end of phase A on"),
        (
            {"sfr": True, "sfr_ema": "smooth", "sfr_warmup_steps": 1, "optimizer_cpu_offload": True},
            [],
            "leave out use_precision_aware_optimizer and optimizer_cpu_offload",
        ),
        ({"sfr": True, "sfr_layer": 2, "sfr_weight_control": "ratio"}, [], "leave sfr_layer out"),
        ({"sfr": True, "sfr_layer": 2, "recompute_granularity": "full"}, [], "full recomputation drops"),
        ({"mtp_num_layers": 1, "pipeline_model_parallel_layout": "Et|ttt|m|L"}, [], "put m before L in the last stage"),
        ({**PACKED, "dataloader_inter_document_masking": True}, [], "set one of them"),
        ({**PACKED, "window_size": "8,0"}, [], "sfr_packing with window_size needs Transformer Engine"),
        ({**PACKED, "sfr": True, "sfr_loss": "cka"}, [], "sfr_loss = cka compares the anchors of one conversation"),
        ({"kl_flow_t_max": 1.0}, [], "kl_flow_t_max = 1.0"),
        ({"training_task": "klflow"}, [], "invalid choice: 'klflow'"),
        ({"training_task": "kl-flow", "position_embedding_type": "none"}, [], "set position_embedding_type to rope"),
        (
            {**KL_FLOW, "sfr": True},
            [],
            "sfr is for autoregressive training, not --training-task kl-flow: leave --sfr out",
        ),
        ({**KL_FLOW, "objective": "gem"}, [], "set objective to ce"),
        ({**KL_FLOW, "sfr_lock_fork_interval": 5}, [], "sfr_lock_fork_interval is for autoregressive training"),
        ({**KL_FLOW, "mtp_num_layers": 1}, [], "mtp_num_layers is for autoregressive training"),
        ({**KL_FLOW, "loss_chunk_tokens": 7}, [], "loss_chunk_tokens is for autoregressive training"),
        ({**KL_FLOW, "sfr_hf_load": "model"}, [], "no Hugging Face model starts it"),
        ({**KL_FLOW, **PACKED}, [], "sfr_packing is not supported with --training-task kl-flow yet"),
        ({**KL_FLOW, "dataloader_inter_document_masking": True}, [], "is not supported with --training-task kl-flow"),
        ({**KL_FLOW, "eod_mask_loss": True}, [], "eod_mask_loss is not supported with --training-task kl-flow yet"),
        ({**KL_FLOW, "num_experts": 4}, [], "num_experts is not supported with --training-task kl-flow yet"),
        ({**KL_FLOW, "window_size": "8,0"}, [], "window_size is not supported with --training-task kl-flow yet"),
        (
            {**KL_FLOW, "tensor_model_parallel_size": 2, "make_vocab_size_divisible_by": 6},
            [],
            "set make_vocab_size_divisible_by to a multiple of 4",
        ),
        ({**KL_FLOW, **ADALN, "recompute_granularity": "full"}, [], "recomputed norms would read a later microbatch's"),
        ({**KL_FLOW, **ADALN, "recompute_granularity": "selective", "recompute_modules": ["layernorm"]}, [], "norms"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, changes: dict, flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_settings([*write(tmp_path, **changes), *flags])
    assert "\n" not in str(caught.value)


def test_what_upstream_fails_on_by_no_assertion_is_said_in_one_line(tmp_path: Path) -> None:
    settings = read_settings(write(tmp_path, tensor_model_parallel_size=0))
    with pytest.raises(ValueError, match="Megatron refuses these flags: ZeroDivisionError: ") as caught:
        parse(settings)
    assert "\n" not in str(caught.value)


def test_a_preset_yields_to_the_recipe_and_the_recipe_to_flags(tmp_path: Path) -> None:
    flags = ["--sfr-preset", "reference", "--sfr-gate", "none"]
    recipe = read_settings([*write(tmp_path, sfr=True, sfr_draws=2), *flags]).recipe
    assert (recipe["sfr_target_scale"], recipe["sfr_time_per"]) == ("l2", "sequence")
    assert recipe["sfr_draws"] == 2
    assert "sfr_gate" not in recipe  # its default again
    for options in PRESETS["reference"]:
        assert options.replace("-", "_") in vars(flag_parser().read([]))


def test_of_two_recipes_the_later_wins(tmp_path: Path) -> None:
    (tmp_path / "arm.yaml").write_text("lr: 0.5\nobjective: gem\n")
    recipe = read_settings([*write(tmp_path), "--recipe", str(tmp_path / "arm.yaml")]).recipe
    assert (recipe["lr"], recipe["objective"], recipe["train_iters"]) == (0.5, "gem", 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: 1\nseed: 2\nlr: 3\n", "lr is set in line 1 and again in line 3"),
        (
            "tensor-model-parallel-size: 1\ntensor_model_parallel_size: 2\n",
            "tensor-model-parallel-size and tensor_model_parallel_size are one option, which is set in line 1 and",
        ),
        ("fp8: hybrid\nfp8_format: e4m3\n", "fp8 and fp8_format are one option"),
        ("no_rope_fusion: true\n\napply_rope_fusion: true\n", "set in line 1 and again in line 3"),
    ],
)
def test_an_option_that_a_recipe_sets_twice_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        read_settings(["--recipe", str(path)])
    assert str(path) in str(caught.value)


def test_a_recipe_nested_without_end_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("lr: " + "[" * 100_000 + "]" * 100_000, encoding="utf-8")
    with pytest.raises(ValueError, match="nested too deeply"):
        read_settings(["--recipe", str(path)])


@pytest.mark.parametrize("text", ["a: [1", "- a\n- b\n", "just words"])
def test_a_file_that_is_not_a_recipe_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"recipe\.yaml"):
        read_settings(["--recipe", str(path)])

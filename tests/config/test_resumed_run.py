"""What is checked before a run continues: the trackers of the folders that it loads from, and its schedule."""

import argparse
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from megatron_sfr.config.build import check_task
from megatron_sfr.config.resume import (
    changed_data,
    changed_model,
    check_schedule,
    check_targets,
    mismatch,
    repair_trackers,
    resumed_step,
)
from megatron_sfr.hf.megatron.megatron_checkpoint import COMMON, write_checkpoint
from megatron_sfr.hf.megatron.tracker import CONFIG, TRACKER
from megatron_sfr.train import _is_ready

STORED: dict[str, Any] = {
    "lr": 1e-3,
    "min_lr": 1e-5,
    "adam_beta2": 0.95,
    "muon_momentum": 0.95,
    "lion_beta1": 0.9,
    "lion_beta2": 0.98,
    "lr_decay_style": "cosine",
    "lr_decay_iters": 4,  # upstream fills it in from train_iters
    "lr_decay_samples": None,
    "lr_warmup_iters": 0,
    "lr_warmup_samples": 0,
    "lr_warmup_fraction": None,
    "lr_wsd_decay_style": "exponential",
    "lr_wsd_decay_iters": None,
    "lr_wsd_decay_samples": None,
    "train_iters": 4,
    "train_samples": None,
    "global_batch_size": 4,
    "start_weight_decay": 0.01,
    "end_weight_decay": 0.01,
    "weight_decay_incr_style": "constant",
}


def run(**changes: Any) -> argparse.Namespace:
    """The arguments of a run that continues that of STORED."""
    given = {"lr_decay_iters": None, "load": "run", "no_load_optim": False}
    given |= {"override_opt_param_scheduler": False, "use_checkpoint_opt_param_scheduler": False}
    return argparse.Namespace(**STORED | given | changes)


@pytest.fixture
def save(tmp_path: Path) -> Path:
    for step in (2, 4):
        write_checkpoint(tmp_path / "run" / f"iter_{step:07d}", [], {COMMON: {"iteration": step}})
    (tmp_path / "run" / TRACKER).write_text("4")
    return tmp_path / "run"


def test_a_damaged_tracker_is_repaired_and_said_once(save: Path) -> None:
    recipe = {"load": str(save), "pretrained_checkpoint": str(save), "save": str(save)}
    assert repair_trackers(recipe) == []
    (save / TRACKER).write_text("")
    (line,) = repair_trackers(recipe)
    assert line == f"{save / TRACKER} is empty: iter_0000004 is used, the newest complete checkpoint"
    assert (save / TRACKER).read_text() == "4"
    assert repair_trackers(recipe) == []


def test_an_incomplete_newest_checkpoint_is_kept_but_not_used(save: Path) -> None:
    (save / "iter_0000004" / CONFIG).unlink()
    (line,) = repair_trackers({"load": str(save)})
    assert "iter_0000004, which has no metadata.json" in line
    assert (save / TRACKER).read_text() == "2"
    assert (save / "iter_0000004").is_dir()


def test_nothing_to_continue_from_is_an_error_not_a_new_start(save: Path) -> None:
    (save / TRACKER).write_text("7")
    for folder in save.glob("iter_*"):
        shutil.rmtree(folder)
    with pytest.raises(ValueError, match="names iter_0000007, which does not exist, and no iter_"):
        repair_trackers({"load": str(save)})


@pytest.mark.parametrize("key", ["load", "pretrained_checkpoint"])
def test_a_start_without_a_checkpoint_is_an_error_not_random_weights(save: Path, key: str) -> None:
    own, absent, inside = str(save.parent / "own"), str(save / "absent"), str(save / "iter_0000002")
    recipe = {"save": own, "load": own}
    assert repair_trackers(recipe) == []
    with pytest.raises(ValueError, match=f"{key}: {absent} has no latest_.*: name a folder that a run saved to"):
        repair_trackers(recipe | {key: absent})
    with pytest.raises(ValueError, match=f"{key}: {inside} has no latest_.*: name the folder above it, {save}, and"):
        repair_trackers(recipe | {key: inside})
    assert repair_trackers(recipe | {key: str(save)}) == []
    assert repair_trackers({"load": str(save), "pretrained_checkpoint": absent, "save": str(save)}) == []  # it resumes
    assert repair_trackers({"load": absent, "sfr_hf_load": "model", "save": own}) == []


def test_a_step_without_a_checkpoint_is_named(save: Path) -> None:
    args = argparse.Namespace(load=str(save), finetune=False, ckpt_step=3, ckpt_format="torch_dist")
    with pytest.raises(ValueError, match=r"ckpt_step: .*iter_0000003 does not exist; newest: .*iter_0000004"):
        resumed_step(args)


def test_a_checkpoint_that_only_megatron_reads_is_named_in_a_warning(tmp_path: Path) -> None:
    (tmp_path / "iter_0000004" / "mp_rank_00").mkdir(parents=True)
    (tmp_path / TRACKER).write_text("4")
    options = {"load": None, "pretrained_checkpoint": str(tmp_path), "ckpt_format": "torch_dist", "ckpt_step": None}
    stored, warnings = check_task(argparse.Namespace(**options, lora_rank=None))
    assert stored == {}
    assert len(warnings) == 1
    assert f"{tmp_path} was not compared with the task and the model of this run ({tmp_path}" in warnings[0]


def test_a_run_without_a_learning_rate_is_refused_before_anything_is_read() -> None:
    with pytest.raises(ValueError, match="lr is missing"):
        _is_ready(argparse.Namespace(lr=None, skip_train=False), print)


@pytest.mark.parametrize(("changes", "step"), [({}, 4), ({"ckpt_step": 2}, 2), ({"finetune": True}, 0)])
def test_the_step_that_a_run_continues_from(save: Path, changes: dict[str, Any], step: int) -> None:
    args = {"load": str(save), "finetune": False, "ckpt_step": None, "ckpt_format": "torch_dist"} | changes
    assert resumed_step(argparse.Namespace(**args)) == step


def test_an_unchanged_schedule_prints_nothing() -> None:
    args = run()
    assert check_schedule(args, STORED) is None
    assert not args.override_opt_param_scheduler
    assert check_schedule(args, {}) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train_iters": 6}, r"train_iters is 6 \(in the checkpoint 4\)"),
        ({"global_batch_size": 8}, r"global_batch_size is 8 \(in the checkpoint 4\)"),
        ({"lr_decay_style": "linear"}, r"lr_decay_style is linear \(in the checkpoint cosine\)"),
        ({"lr_warmup_iters": 1}, r"lr_warmup_iters is 1 \(in the checkpoint 0\)"),
        ({"lr_decay_iters": 9}, r"lr_decay_iters is 9 \(in the checkpoint 4\)"),
        ({"start_weight_decay": 0.1, "end_weight_decay": 0.1}, r"start_weight_decay is 0.1 \(in the checkpoint 0.01\)"),
    ],
)
def test_a_changed_schedule_is_refused_with_the_key_both_values_and_the_remedy(
    changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said + ".*override_opt_param_scheduler: true.*use_checkpoint_opt_param_sch"):
        check_schedule(run(**changes), STORED)
    for chosen in ("override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler"):
        assert check_schedule(run(**changes, **{chosen: True}), STORED) is None


@pytest.mark.parametrize("key", ["lr", "min_lr", "adam_beta2", "muon_momentum", "lion_beta1", "lion_beta2"])
def test_what_the_optimizers_state_holds_cannot_be_changed(key: str) -> None:
    said = rf"{key} is 0.0005, but the run in run has {STORED[key]}.*pretrained_checkpoint: run"
    with pytest.raises(ValueError, match=said):
        check_schedule(run(**{key: 5e-4}, override_opt_param_scheduler=True), STORED)
    assert check_schedule(run(**{key: 5e-4}, no_load_optim=True), STORED) is None


FP32 = {"bf16": False, "fp16": False}
EP2, EP4 = {"expert_model_parallel_size": 2}, {"expert_model_parallel_size": 4}
SHARDED = {"use_distributed_optimizer": True, "tensor_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("now", "then", "said"),
    [
        (FP32, FP32 | {"bf16": True}, "bf16 is False, but the run in run has True"),
        (FP32 | {"fp16": True}, FP32, "fp16 is True, but the run in run has False"),
        ({"use_distributed_optimizer": False}, SHARDED, "use_distributed_optimizer is False"),
        (SHARDED | {"tensor_model_parallel_size": 1}, SHARDED, "for this layout only.*dist_ckpt_optim_fully_reshard"),
        (SHARDED | {"tensor_model_parallel_size": 1}, SHARDED | {"dist_ckpt_optim_fully_reshardable": True}, None),
        (FP32 | {"bf16": True}, FP32 | {"fp16": True}, None),
        (SHARDED | EP2, SHARDED | EP4, "expert_model_parallel_size is 2.*for this layout only"),
        (EP2, EP4, None),
        (EP2, {"expert_model_parallel_size": 1}, "expert_model_parallel_size is 2.*a second optimizer.*set it to 1"),
    ],
)
def test_an_optimizer_with_other_state_is_refused(now: dict[str, Any], then: dict[str, Any], said: str | None) -> None:
    args, stored = run(**now), STORED | then
    assert check_schedule(run(**now, no_load_optim=True), stored) is None
    if said is None:
        assert check_schedule(args, stored) is None
        return
    with pytest.raises(ValueError, match=said):
        check_schedule(args, stored)


def test_another_model_of_the_same_sizes_is_refused_or_said() -> None:
    stored = {"rotary_base": 10000, "layernorm_epsilon": 1e-5}
    args = run(rotary_base=50000, layernorm_epsilon=1e-5, finetune=False)
    with pytest.raises(ValueError, match="rotary_base is 50000, but the run in run has 10000: set rotary_base: 10000"):
        changed_model(args, "run", stored)
    (line,) = changed_model(args, "other", stored)
    assert line == "rotary_base is 50000, but the run in other has 10000, with which its weights were trained"
    assert changed_model(run(rotary_base=10000, finetune=False), "run", stored) == []


def test_data_in_another_order_are_said() -> None:
    stored = STORED | {"seed": 1, "train_data_path": ["a"]}
    assert changed_data(run(seed=1, train_data_path=["a"]), stored) is None
    assert changed_data(run(seed=1, train_data_path=[str(Path("a").resolve())]), stored) is None
    line = changed_data(run(seed=2, train_data_path=["a", "b"]), stored)
    assert line is not None
    assert line.startswith("seed is 2 (in the checkpoint 1), train_data_path is ['a', 'b'] (in the checkpoint ['a']):")
    packed = {"sfr_packing": "first_fit_decreasing", "context_parallel_size": 1}
    line = changed_data(run(**packed | {"context_parallel_size": 2}), STORED | packed)
    assert line is not None
    assert line.startswith("context_parallel_size is 2 (in the checkpoint 1): sequences that were read before may")


def test_targets_of_another_kind_are_refused_where_the_head_is_continued() -> None:
    then = {"encoder": "0a", "horizons": "1:8"}
    check_targets(run(flow_targets=then), {"flow_targets": then})
    check_targets(run(flow_targets=then), {})
    check_targets(run(flow_targets=None), {"flow_targets": then})
    with pytest.raises(ValueError, match=r"other values of encoder, horizons than .* in run was trained on"):
        check_targets(run(flow_targets={"encoder": "0b", "horizons": "0:8"}), {"flow_targets": then})


@pytest.mark.parametrize(
    ("now", "then"),
    [
        ({"train_iters": 6, "lr_decay_style": "constant"}, {"lr_decay_style": "constant"}),
        ({"global_batch_size": 8, "lr_decay_style": "constant"}, {"lr_decay_style": "constant"}),
        ({"train_iters": 6, "lr_decay_iters": 4}, {}),
    ],
)
def test_what_changes_no_rate_is_accepted(now: dict[str, Any], then: dict[str, Any]) -> None:
    args = run(**now)
    said = check_schedule(args, STORED | then)
    assert said is not None
    assert said.endswith("this changes neither the learning rate nor the weight decay of a step")
    assert args.override_opt_param_scheduler


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (KeyError("a.weight from model not in state dict: ['b', 'c']"), "has no a.weight: it is of another model"),
        (
            KeyError("flow_head.in.weight from model not in state dict: []"),
            "has no flow_head.in.weight: add --sfr-fresh",
        ),
        (
            KeyError("optimizer.state.exp_avg.a from model not in state dict: []"),
            "has no optimizer.state.exp_avg.a: its optimizer is that of other parameters than this run trains",
        ),
        (
            CheckpointingException(
                f"Global shape mismatch for loaded ({torch.Size([2, 16])}) and expected ((3, 16)) tensor for key a.bias"
            ),
            "has a.bias of size [2, 16], and this run's model [3, 16]: set the sizes (num_layers, hidden_size, ...)",
        ),
        (OSError("disk"), "CheckpointException"),
    ],
)
def test_a_model_that_does_not_fit_the_checkpoint_is_one_line(failure: Exception, said: str) -> None:
    error = mismatch(CheckpointException("load", {0: (failure, None)}), "run")
    assert said in str(error)
    assert isinstance(error, ValueError) == isinstance(failure, KeyError | CheckpointingException)


def test_state_of_other_parameters_is_one_line() -> None:
    """torch's own message for a head that has lost its network, such as sfr_loss = cka."""
    optimizers = [torch.optim.SGD([torch.nn.Parameter(torch.ones(1)) for _ in range(n)], lr=1.0) for n in (2, 1)]
    with pytest.raises(ValueError, match="parameter group") as caught:
        optimizers[0].load_state_dict(optimizers[1].state_dict())
    assert str(mismatch(caught.value, "run")).startswith(
        "the state of the optimizer in run is that of other parameters"
    )
    other = ValueError("something else")
    assert mismatch(other, "run") is other

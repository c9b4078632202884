"""All options of a run, read from the parsed arguments once. Model, forward step and datasets are built from them."""

import argparse
from dataclasses import dataclass
from typing import Literal

from megatron_sfr.config.objective import ObjectiveOptions, reference_store, selected_loss
from megatron_sfr.config.option_flags import options
from megatron_sfr.config.settings import LoadOptions, PresetOptions
from megatron_sfr.config.validation import separator
from megatron_sfr.hf.load_at_start import StartOptions
from megatron_sfr.hf.megatron.retention import RetentionOptions
from megatron_sfr.kl_flow.corruption import KLFlowOptions
from megatron_sfr.kl_flow.kl_flow_step import TaskOptions
from megatron_sfr.kl_flow.model import KLFlowModelOptions
from megatron_sfr.model.flow_head import FlowHeadOptions
from megatron_sfr.model.lora.options import LoRAOptions
from megatron_sfr.model.model_class import ModelOptions
from megatron_sfr.objectives.sfr.gate import GateOptions
from megatron_sfr.objectives.sfr.schedule import ScheduleOptions
from megatron_sfr.objectives.sfr.sfr_loss import SFROptions
from megatron_sfr.objectives.sfr.target_scale import TargetOptions
from megatron_sfr.objectives.token.loss_base import TokenLoss
from megatron_sfr.training.auxiliary_loss import TermOptions
from megatron_sfr.training.data.provider import DataOptions, DataPlan
from megatron_sfr.training.head_optimizer import HeadOptimizerOptions
from megatron_sfr.training.lock_fork import LockForkOptions
from megatron_sfr.training.tracking.mlflow_log import MLflowOptions


@dataclass(frozen=True)
class RunPlan:
    """The options of a run. Each part has validated its own."""

    megatron: argparse.Namespace
    """Megatron's arguments, as upstream's training loop has them."""
    backend: Literal["cpu", "cuda"]
    """Where the run computes."""
    task: TaskOptions
    """The kind of model."""
    model: ModelOptions
    """Megatron's class of it."""
    kl_flow: KLFlowOptions
    """The noise of KL-flow, for the task kl-flow."""
    kl_flow_model: KLFlowModelOptions
    """The denoiser, for the task kl-flow."""
    objective: str
    """Name of the token loss."""
    token_loss: TokenLoss
    """The token loss, with its options."""
    loss_chunk_tokens: int
    """Tokens whose logits exist at a time; 0: all."""
    term: TermOptions
    """The auxiliary loss; not used without data.sfr."""
    schedule: ScheduleOptions
    """The weight of the auxiliary loss."""
    head_optimizer: HeadOptimizerOptions
    """Learning rate and clipping of the flow head."""
    lock_fork: LockForkOptions
    """Measurements of Lock and Fork positions."""
    data: DataOptions
    """Targets and packing."""
    preset: PresetOptions
    """The set of options that the run started from."""
    load: LoadOptions
    """How a checkpoint without a head is loaded."""
    start: StartOptions
    """The Hugging Face model to start from."""
    lora: LoRAOptions
    """Low-rank adapters, if it has a rank."""
    retention: RetentionOptions
    """Which checkpoints are kept."""
    mlflow: MLflowOptions
    """Logging to MLflow."""
    separator: str | None
    """The option that puts several texts into a sequence, each with its own attention; None without one."""

    @property
    def is_kl_flow(self) -> bool:
        """Whether the model is a denoiser of KL-flow."""
        return self.task.training_task == "kl-flow"

    @property
    def datasets(self) -> DataPlan:
        """What the datasets are built from."""
        length = text_length(self.task, self.kl_flow_model, self.megatron.seq_length)
        raw_weights = self.term.sfr.mean == "microbatch"
        store, preset = reference_store(self.token_loss), self.preset.preset
        return DataPlan(self.megatron, self.data, length, raw_weights, preset == "reference", store)


def plan_run(args: argparse.Namespace, backend: Literal["cpu", "cuda"]) -> RunPlan:
    """Reads all options of a run.

    Args:
        args: Megatron's arguments and ours, as `settings.parse` returns them.
    Raises:
        ValueError: a part refuses its options.
    """
    term = TermOptions(
        options(SFROptions, args),
        options(TargetOptions, args),
        options(GateOptions, args),
        options(FlowHeadOptions, args),
    )
    name, token_loss = selected_loss(args)
    return RunPlan(
        megatron=args,
        backend=backend,
        task=options(TaskOptions, args),
        model=options(ModelOptions, args),
        kl_flow=options(KLFlowOptions, args),
        kl_flow_model=options(KLFlowModelOptions, args),
        objective=name,
        token_loss=token_loss,
        loss_chunk_tokens=options(ObjectiveOptions, args).loss_chunk_tokens,
        term=term,
        schedule=options(ScheduleOptions, args),
        head_optimizer=options(HeadOptimizerOptions, args),
        lock_fork=options(LockForkOptions, args),
        data=options(DataOptions, args),
        preset=options(PresetOptions, args),
        load=options(LoadOptions, args),
        start=options(StartOptions, args),
        lora=options(LoRAOptions, args),
        retention=options(RetentionOptions, args),
        mlflow=options(MLflowOptions, args),
        separator=separator(args),
    )


def text_length(task: TaskOptions, model: KLFlowModelOptions, seq_length: int) -> int | None:
    """Tokens of a sequence that KL-flow reads: the time's token takes a position. None for other tasks."""
    if task.training_task != "kl-flow":
        return None
    return seq_length - (model.time == "token")

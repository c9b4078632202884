"""Upstream's GPT builder, plus the flow head on the stage that computes the loss."""

from dataclasses import dataclass, field
from typing import ClassVar

from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

from megatron_sfr.model.flow_head import FlowHead, FlowHeadOptions


@dataclass(kw_only=True)
class SFRModelConfig(GPTModelConfig):
    """A GPT with a flow head (head = None: without one, which is upstream's own model)."""

    builder: ClassVar[str] = "megatron_sfr.model.builder.SFRModelBuilder"
    head: FlowHeadOptions | None = field(default=None)
    head_weight: float = 1.0
    """Where the steered weight of the loss starts."""
    head_seed: int = 1234
    """Seed of the head's initial weights."""
    head_fresh: bool = False
    """Whether the checkpoint to be loaded may lack the head."""


class SFRModelBuilder(GPTModelBuilder):
    """Builds upstream's model; the head becomes its submodule `flow_head`, so DDP, optimizer and checkpoints see it."""

    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> GPTModel:
        """One stage of the model; arguments as upstream's."""
        model = super().build_model(pg_collection, pre_process, post_process, vp_stage)
        config: SFRModelConfig = self._model_config
        if model.post_process and config.head is not None:
            model.flow_head = FlowHead(
                config.transformer,
                config.head,
                weight=config.head_weight,
                seed=config.head_seed,
                fresh=config.head_fresh,
            )
        return model

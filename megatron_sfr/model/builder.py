"""Upstream's builders of both model classes, plus the flow head on the stage that computes the loss.

The only module that takes builders and configurations of model classes from Megatron's training package. They are for
the other builder, of KL-flow, too.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.training.argument_utils import gpt_config_from_args, hybrid_config_from_args
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig, default_layer_spec
from megatron.training.models.hybrid import HybridModelBuilder, HybridModelConfig

from megatron_sfr.model.attach_head import attach_head
from megatron_sfr.model.flow_head import FlowHeadPlan
from megatron_sfr.model.gradient_fusion import fuse_layers

__all__ = [
    "GPTModelBuilder",
    "GPTModelConfig",
    "SFRHybridBuilder",
    "SFRHybridConfig",
    "SFRModelBuilder",
    "SFRModelConfig",
    "default_layer_spec",
    "gpt_config_from_args",
    "hybrid_config_from_args",
]


@dataclass(kw_only=True)
class SFRModelConfig(GPTModelConfig):
    """A GPT, optionally with a flow head."""

    builder: ClassVar[str] = "megatron_sfr.model.builder.SFRModelBuilder"
    head: FlowHeadPlan | None = field(default=None)
    """The flow head to attach; None builds upstream's own model."""
    fuses_layers: bool = False
    """Whether gradient accumulation is fused in Transformer Engine's layers only (gradient_fusion.py)."""


class SFRModelBuilder(GPTModelBuilder):
    """Builds upstream's model and attaches the flow head to the chunk that computes the loss."""

    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> MegatronModule:
        """One model chunk. Arguments as upstream's; ValueError if sfr_layer is not on the last pipeline stage."""
        return _complete(super().build_model(pg_collection, pre_process, post_process, vp_stage), self._model_config)


@dataclass(kw_only=True)
class SFRHybridConfig(HybridModelConfig):
    """A HybridModel, optionally with a flow head. Fields as SFRModelConfig's."""

    builder: ClassVar[str] = "megatron_sfr.model.builder.SFRHybridBuilder"
    head: FlowHeadPlan | None = field(default=None)
    fuses_layers: bool = False


class SFRHybridBuilder(HybridModelBuilder):
    """Builds upstream's HybridModel and attaches the flow head to the chunk that computes the loss."""

    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> MegatronModule:
        """One model chunk. Arguments as upstream's; ValueError if sfr_layer is not on the last pipeline stage."""
        return _complete(super().build_model(pg_collection, pre_process, post_process, vp_stage), self._model_config)


def _complete(model: MegatronModule, config: SFRModelConfig | SFRHybridConfig) -> MegatronModule:
    """Adds to a model chunk of upstream what its configuration has besides upstream's."""
    if config.fuses_layers:
        fuse_layers(model)
    if config.head is not None:
        attach_head(config.head)([model])
    return model

"""Upstream's builders of both model classes, plus the flow head on the stage that computes the loss.

The only module that takes builders and configurations of model classes from Megatron's training package. They are for
the other builder, of KL-flow, too.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.training.argument_utils import gpt_config_from_args, hybrid_config_from_args
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig, default_layer_spec
from megatron.training.models.hybrid import HybridModelBuilder, HybridModelConfig

from megatron_sfr.model import local_spec
from megatron_sfr.model.attach_head import attach_head
from megatron_sfr.model.flow_head import FlowHeadPlan
from megatron_sfr.model.gradient_fusion import fuse_layers
from megatron_sfr.model.multi_token import drop_unused_output_weight
from megatron_sfr.runtime.replacements import replaced

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


@dataclass(kw_only=True)
class SFRHybridConfig(HybridModelConfig):
    """A HybridModel, optionally with a flow head. Fields as SFRModelConfig's."""

    builder: ClassVar[str] = "megatron_sfr.model.builder.SFRHybridBuilder"
    head: FlowHeadPlan | None = field(default=None)
    fuses_layers: bool = False


class _BuildsWithHead:
    """Builds upstream's model and attaches the flow head to the chunk that computes the loss."""

    _model_config: SFRModelConfig | SFRHybridConfig

    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> MegatronModule:
        """One model chunk. Arguments as upstream's; ValueError if sfr_layer is not on the last pipeline stage."""
        build: Callable[..., MegatronModule] = super().build_model  # type: ignore[misc]
        with replaced(local_spec.REPLACEMENTS):
            model = build(pg_collection, pre_process, post_process, vp_stage)
        drop_unused_output_weight(model)
        if self._model_config.fuses_layers:
            fuse_layers(model)
        if self._model_config.head is not None:
            attach_head(self._model_config.head)([model])
        return model


class SFRModelBuilder(_BuildsWithHead, GPTModelBuilder):
    """Builds a GPTModel, optionally with a flow head."""


class SFRHybridBuilder(_BuildsWithHead, HybridModelBuilder):
    """Builds a HybridModel, optionally with a flow head."""

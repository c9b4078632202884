"""Upstream's GPT builder, plus the flow head on the stage that computes the loss."""

from dataclasses import dataclass, field
from typing import ClassVar

from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

from megatron_sfr.model.flow_head import FlowHead, FlowHeadPlan
from megatron_sfr.model.gradient_fusion import fuse_layers


@dataclass(kw_only=True)
class SFRModelConfig(GPTModelConfig):
    """A GPT with a flow head (head = None: without one, which is upstream's own model)."""

    builder: ClassVar[str] = "megatron_sfr.model.builder.SFRModelBuilder"
    head: FlowHeadPlan | None = field(default=None)
    fuses_layers: bool = False
    """Gradient accumulation is fused in Transformer Engine's layers only (gradient_fusion.py)."""


class SFRModelBuilder(GPTModelBuilder):
    """Builds upstream's model; the head becomes its submodule `flow_head`, so DDP, optimizer and checkpoints see it."""

    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> GPTModel:
        """One stage of the model; arguments as upstream's. ValueError where sfr_layer is not on the last stage."""
        model = super().build_model(pg_collection, pre_process, post_process, vp_stage)
        config: SFRModelConfig = self._model_config
        if config.fuses_layers:
            fuse_layers(model)
        if model.post_process and config.head is not None:
            model.flow_head = FlowHead(config.transformer, config.head)
            if (number := config.head.options.sfr_layer) is not None:
                layers = {layer.layer_number: layer for layer in model.decoder.layers}
                if number not in layers:
                    here = f"{min(layers)} to {max(layers)}" if layers else "no layer"
                    raise ValueError(f"sfr_layer = {number} does not live on the last stage, which has {here}")
                layers[number].register_forward_hook(model.flow_head.catch)
        return model

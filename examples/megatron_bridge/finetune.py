"""Adds SFR to a configuration of Megatron-Bridge, and fine-tunes with it in Megatron-Bridge's own loop."""

from dataclasses import dataclass
from pathlib import Path

from megatron.bridge.training.config import ConfigContainer, DatasetBuildContext, DatasetProvider
from megatron.bridge.training.pretrain import pretrain

import megatron_sfr as sfr
from megatron_sfr.data.targets.store import TargetStore
from megatron_sfr.training.data.anchor_arrays import AnchorPlan
from megatron_sfr.training.data.conversation_dataset import PreparedDatasetConfig
from megatron_sfr.training.data.provider import build


@dataclass
class Conversations(DatasetProvider):
    """A folder that `megatron-sfr prepare` and `megatron-sfr embed` wrote."""

    folder: str
    seq_length: int

    def build_datasets(self, context: DatasetBuildContext) -> tuple:
        config = PreparedDatasetConfig(
            random_seed=1234,
            sequence_length=self.seq_length,
            blend_per_split=[([self.folder], None), None, None],
            anchors=AnchorPlan("targets"),
        )
        return tuple(build(config, [context.train_samples, None, None]))


def finetune_with_sfr(config: ConfigContainer, folder: Path, vocab_size: int, options: sfr.TermOptions) -> None:
    """Fine-tunes the model of a configuration, such as a recipe's, on a prepared folder."""
    model = config.model
    config.dataset = Conversations(folder=str(folder), seq_length=model.seq_length)
    getattr(model, "transformer", model).calculate_per_token_loss = True
    dim = TargetStore.open(folder / "targets", sfr.open_prepared(folder)).dim
    schedule = sfr.ScheduleOptions(warmup="detached", warmup_steps=100, ramp_steps=100)
    hook = sfr.attach_head(sfr.flow_head_plan(dim, options, schedule))
    if hasattr(model, "register_pre_wrap_hook"):  # a provider
        model.register_pre_wrap_hook(hook)
    else:  # a model config, as newer recipes have
        model.pre_wrap_hooks.append(hook)
    with sfr.separate_clipping():  # the head has its own gradient norm
        pretrain(config, sfr.forward_step(vocab_size, sfr=options, schedule=schedule))

"""Training language models that stay diverse, on NVIDIA Megatron: objectives, data, conversion, evaluation.

`import megatron_sfr as sfr` loads nothing else; each name below is imported when it is first used (PEP 562).
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "ASFT",
    "DFT",
    "EAFT",
    "GEM",
    "SED",
    "TOFU",
    "ClosedFormLoss",
    "CrossEntropy",
    "EmbedOptions",
    "EvaluationOptions",
    "FlowHead",
    "FlowHeadOptions",
    "FlowHeadPlan",
    "GateOptions",
    "LogitStatistics",
    "LossAndCoefficients",
    "PrepareOptions",
    "Reference",
    "SFROptions",
    "SampleOptions",
    "SamplingOptions",
    "ScheduleOptions",
    "StatisticsSpec",
    "StepContext",
    "TargetOptions",
    "TemplateOptions",
    "TermOptions",
    "TokenLoss",
    "anchor_weights",
    "attach_head",
    "embed",
    "evaluate",
    "evaluate_replies",
    "export_hf",
    "flow_head_plan",
    "flow_matching_loss",
    "forward_step",
    "generate",
    "import_hf",
    "load_head",
    "open_prepared",
    "prepare",
    "register",
    "separate_clipping",
    "token_loss",
]

_MODULES = {
    "data.chat.template_options": ["SampleOptions", "TemplateOptions"],
    "data.prepare.chat_source": ["PrepareOptions"],
    "data.prepare.pipeline": ["prepare"],
    "data.prepared.open": ["open_prepared"],
    "data.targets.embed": ["EmbedOptions", "embed"],
    "evaluation.compare.questions": ["EvaluationOptions"],
    "evaluation.compare.evaluate_models": ["evaluate"],
    "evaluation.compare.evaluate_replies": ["evaluate_replies"],
    "evaluation.generate.generate_replies": ["generate"],
    "evaluation.generate.sampling": ["SamplingOptions"],
    "hf.export_hf": ["export_hf"],
    "hf.head_files": ["load_head"],
    "hf.import_hf": ["import_hf"],
    "kernels.vocab_parallel": ["LogitStatistics", "StatisticsSpec"],
    "model.attach_head": ["attach_head"],
    "model.flow_head": ["FlowHead", "FlowHeadOptions", "FlowHeadPlan"],
    "objectives.anchored.asft": ["ASFT"],
    "objectives.anchored.reference": ["Reference"],
    "objectives.sfr.gate": ["GateOptions"],
    "objectives.sfr.schedule": ["ScheduleOptions"],
    "objectives.sfr.sfr_loss": ["SFROptions", "anchor_weights", "flow_matching_loss"],
    "objectives.sfr.target_scale": ["TargetOptions"],
    "objectives.token.cross_entropy": ["CrossEntropy"],
    "objectives.token.dft": ["DFT"],
    "objectives.token.eaft": ["EAFT"],
    "objectives.token.gem": ["GEM"],
    "objectives.token.loss_base": ["ClosedFormLoss", "LossAndCoefficients", "TokenLoss"],
    "objectives.token.registry": ["register"],
    "objectives.token.sed": ["SED"],
    "objectives.token.tofu": ["TOFU"],
    "objectives.token.token_loss": ["token_loss"],
    "training.auxiliary_loss": ["TermOptions"],
    "training.bridge": ["flow_head_plan", "forward_step"],
    "training.head_optimizer": ["separate_clipping"],
    "training.step_context": ["StepContext"],
}
_MODULE_OF = {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}

if TYPE_CHECKING:  # for type checkers and editors
    from megatron_sfr.data.chat.template_options import SampleOptions, TemplateOptions
    from megatron_sfr.data.prepare.chat_source import PrepareOptions
    from megatron_sfr.data.prepare.pipeline import prepare
    from megatron_sfr.data.prepared.open import open_prepared
    from megatron_sfr.data.targets.embed import EmbedOptions, embed
    from megatron_sfr.evaluation.compare.evaluate_models import evaluate
    from megatron_sfr.evaluation.compare.evaluate_replies import evaluate_replies
    from megatron_sfr.evaluation.compare.questions import EvaluationOptions
    from megatron_sfr.evaluation.generate.generate_replies import generate
    from megatron_sfr.evaluation.generate.sampling import SamplingOptions
    from megatron_sfr.hf.export_hf import export_hf
    from megatron_sfr.hf.head_files import load_head
    from megatron_sfr.hf.import_hf import import_hf
    from megatron_sfr.kernels.vocab_parallel import LogitStatistics, StatisticsSpec
    from megatron_sfr.model.attach_head import attach_head
    from megatron_sfr.model.flow_head import FlowHead, FlowHeadOptions, FlowHeadPlan
    from megatron_sfr.objectives.anchored.asft import ASFT
    from megatron_sfr.objectives.anchored.reference import Reference
    from megatron_sfr.objectives.sfr.gate import GateOptions
    from megatron_sfr.objectives.sfr.schedule import ScheduleOptions
    from megatron_sfr.objectives.sfr.sfr_loss import SFROptions, anchor_weights, flow_matching_loss
    from megatron_sfr.objectives.sfr.target_scale import TargetOptions
    from megatron_sfr.objectives.token.cross_entropy import CrossEntropy
    from megatron_sfr.objectives.token.dft import DFT
    from megatron_sfr.objectives.token.eaft import EAFT
    from megatron_sfr.objectives.token.gem import GEM
    from megatron_sfr.objectives.token.loss_base import ClosedFormLoss, LossAndCoefficients, TokenLoss
    from megatron_sfr.objectives.token.registry import register
    from megatron_sfr.objectives.token.sed import SED
    from megatron_sfr.objectives.token.tofu import TOFU
    from megatron_sfr.objectives.token.token_loss import token_loss
    from megatron_sfr.training.auxiliary_loss import TermOptions
    from megatron_sfr.training.bridge import flow_head_plan, forward_step
    from megatron_sfr.training.head_optimizer import separate_clipping
    from megatron_sfr.training.step_context import StepContext


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])

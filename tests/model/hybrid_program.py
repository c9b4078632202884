"""HybridModel in one process: our hook against upstream's own loss, and against GPTModel with the same weights.

It prints JSON. Shapes as in tests/training/loop_program.py, whose model and batches it takes.
"""

import json
from typing import Any

import torch

from megatron_sfr.runtime import backend
from tests.training.loop_program import STEPS, VOCAB, D, S, gradients, make_batch, plain_model, randomized


def hybrid_model(layers: int, head: Any = None, *, tied: bool = False) -> Any:
    """A HybridModel as Megatron Core's documentation builds one, of attention and MLP on the local specification."""
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    from megatron_sfr.model.attach_head import attach_head
    from megatron_sfr.model.local_spec import local_hybrid_spec

    config = plain_model(None).config
    config.num_layers = 2 * layers
    model = HybridModel(
        config,
        local_hybrid_spec(config),
        vocab_size=64,
        max_sequence_length=S,
        hybrid_layer_pattern="*-" * layers,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=tied,
    )
    return model if head is None else attach_head(head)([model])[0]


def against_upstreams_loss(*, tied: bool) -> dict[str, Any]:
    """What the hook is given, carried on to logits and loss as upstream does it after the hidden states."""
    from megatron_sfr.model.model_class import ensure_output_processor

    model, batch = randomized(hybrid_model(2, tied=tied)), make_batch(0)
    inputs = (batch["tokens"], batch["position_ids"], None)
    logits, loss = model(*inputs), model(*inputs, labels=batch["labels"])
    names = list(model.state_dict())
    ensure_output_processor(model)

    def carry_on(*, hidden_states: Any, output_layer: Any, output_weight: Any, labels: Any, **given: Any) -> Any:
        z, _ = output_layer(hidden_states, weight=output_weight, runtime_gather_output=given["runtime_gather_output"])
        z = given["scale_logits"](z)
        z_BSV = z.transpose(0, 1).clone()  # upstream's cross-entropy overwrites the logits
        return z_BSV, given["compute_language_model_loss"](labels, z), given["context"]

    found = model(*inputs, labels=batch["labels"], output_processor=carry_on, output_processor_context="context")
    return {
        "logits": torch.equal(found[0], logits),
        "loss": torch.equal(found[1], loss),
        "context": found[2],
        "without the hook": torch.equal(model(*inputs, labels=batch["labels"]), loss),
        "names": names == list(model.state_dict()) and model.post_process,
    }


def against_gpt(layer: int | None) -> dict[str, Any]:
    """Losses, log and gradients of our forward step. layer: the one of GPTModel that the head reads."""
    from megatron_sfr.hf.megatron.hybrid_names import hybrid_name
    from megatron_sfr.model.flow_head import FlowHeadOptions, FlowHeadPlan
    from megatron_sfr.training.auxiliary_loss import TermOptions
    from megatron_sfr.training.bridge import forward_step
    from megatron_sfr.training.step_context import StepContext

    def run(build: Any, number: int | None, weights: Any = None) -> tuple[Any, list[dict[str, Any]]]:
        options = FlowHeadOptions(width=8, layer=number)
        model = randomized(build(FlowHeadPlan(options, dim=D)))
        if weights is not None:
            model.load_state_dict(weights)
        step = forward_step(VOCAB, sfr=TermOptions(head=options))
        contexts = [StepContext(i, STEPS, 1, implementation="local") for i in range(STEPS)]
        saved = {name: x.clone() for name, x in model.state_dict().items() if x is not None}
        return saved, [gradients(lambda data, at=at: step(at, data, model), model, at.iteration) for at in contexts]

    weights, gpt = run(plain_model, layer)
    translated = {hybrid_name(name): x for name, x in weights.items()}
    _, hybrid = run(lambda head: hybrid_model(2, head), None if layer is None else 2 * layer, translated)
    difference = max(
        ((y["gradients"][hybrid_name(name)] - g).norm() / g.norm().clamp(min=1e-12)).item()
        for x, y in zip(gpt, hybrid, strict=True)
        for name, g in x["gradients"].items()
    )
    return {
        "reports": [[x["report"], y["report"]] for x, y in zip(gpt, hybrid, strict=True)],
        "losses": [[x["loss"], y["loss"]] for x, y in zip(gpt, hybrid, strict=True)],
        "named": sorted(map(hybrid_name, gpt[0]["gradients"])) == sorted(hybrid[0]["gradients"]),
        "gradients": difference,
    }


if __name__ == "__main__":
    backend.prepare(["--sfr-backend", "cpu"])
    backend.join("cpu")
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    model_parallel_cuda_manual_seed(1)
    found: dict[str, Any] = {name: against_upstreams_loss(tied=name == "tied") for name in ("tied", "untied")}
    found |= {"last states": against_gpt(None), "first layer": against_gpt(1)}
    print(json.dumps(found))

"""The token objective on Megatron's output layer: chunks against all logits, and what the layer's hooks may do.

Parallel layouts are in tests/distributed/test_chunks.py.
Shapes: S positions, B samples, H hidden size, V columns, A anchors.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_sfr.objectives.token.gem import GEM
from megatron_sfr.training.lm_head import LastStage, Measured, TokenObjective, check_layer, weight_accumulator

pytestmark = pytest.mark.usefixtures("one_rank")
S, B, H, V, SIZE = 9, 2, 8, 16, 13
TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}


def make_config(**changes: Any) -> TransformerConfig:
    given = {"num_layers": 1, "hidden_size": H, "num_attention_heads": 1, "use_cpu_initialization": True}
    return TransformerConfig(**given | {"calculate_per_token_loss": True, "cuda_graph_modules": []} | changes)


def new_layer(kind: type[ColumnParallelLinear], config: TransformerConfig, **options: Any) -> ColumnParallelLinear:
    group, start = parallel_state.get_tensor_model_parallel_group(), torch.nn.init.normal_
    return kind(H, V, config=config, init_method=start, bias=False, tp_group=group, **options)


def make_layer(config: TransformerConfig, *, tied: bool = False) -> tuple[ColumnParallelLinear, Tensor | None]:
    """An output layer with a random weight, which it has itself or is given in each call."""
    layer = new_layer(ColumnParallelLinear, config, skip_weight_param_allocation=tied)
    weight = torch.randn(V, H, generator=torch.Generator().manual_seed(1))
    if tied:
        return layer, torch.nn.Parameter(weight)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer, None


def make_batch(*, supervised: bool = True) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(2)
    mask = (torch.rand(B, S, generator=g) < 0.6).float() * supervised
    mask[:, 3] = 0
    return {
        "labels": torch.randint(SIZE, (B, S), generator=g),
        "loss_mask": mask,
        "anchor_position": torch.tensor([[3, 5, 0], [3, 8, 0]]),
        "anchor_weight": torch.tensor([[1.0, 1, 0], [1, 1, 0]]),
    }


def run(
    chunk: int,
    batch: dict[str, Tensor],
    measured: Measured = Measured(),  # noqa: B008, frozen
    *,
    tied: bool = False,
    config: TransformerConfig | None = None,
    prepare: Callable[[ColumnParallelLinear, Tensor], None] | None = None,
    backward: float = 1.0,
) -> dict[str, Tensor | None]:
    """Values and gradients of one microbatch. prepare: called with the layer and its weight before the forward pass."""
    config = config or make_config()
    layer, given = make_layer(config, tied=tied)
    weight = layer.weight if given is None else given
    h_SBH = torch.randn(S, B, H, generator=torch.Generator().manual_seed(3), requires_grad=True)
    if prepare is not None:
        prepare(layer, weight)
    objective = TokenObjective(SIZE, GEM(), chunk)
    if (index := objective.positions(batch, measured.entropy)) is not None:
        batch = batch | {"logit_position": index}
    multiplier = config.mup_output_mult if config.use_mup else 1.0
    stage = LastStage(h_SBH, layer, given, None, lambda x: x * multiplier, config)
    result = objective(stage, batch["labels"], batch, measured, counts=True)
    (backward * result.total).backward()
    found = result.values._asdict() | {"power": result.power}
    if result.entropy_BS is not None:
        known_BS = batch["loss_mask"] > 0
        known_BS[[0, 0, 1, 1], [3, 5, 3, 8]] = True  # the anchors
        found |= {"entropy": result.entropy_BS[known_BS], "top": result.max_prob_BS[known_BS]}
    return found | {"total": result.total.detach(), "h": h_SBH.grad, "weight": weight.grad}


@pytest.mark.parametrize("tied", [False, True])
def test_chunks_and_all_logits_give_the_same_values_gradients_and_measurements(tied: bool) -> None:
    config = make_config()
    config.use_mup, config.mup_output_mult = True, 0.5
    whole, chunked = (
        run(chunk, make_batch(), Measured(power=True, entropy=True), tied=tied, config=config) for chunk in (0, 4)
    )
    torch.testing.assert_close(chunked, whole, **TOLERANCE)


@pytest.mark.parametrize("supervised", [True, False])
def test_no_weight_is_read_before_the_output_layers_hook_has_run(supervised: bool) -> None:
    """With overlap_param_gather the weight of the step arrives while the forward pass runs; the hook waits for it."""
    calls: list[int] = []

    def arrive_late(layer: ColumnParallelLinear, weight: Tensor) -> None:
        kept = weight.detach().clone()
        weight.data.fill_(torch.nan)

        def hook(*_: Any) -> None:
            weight.data.copy_(kept)
            calls.append(1)

        layer.register_forward_pre_hook(hook)

    batch = make_batch(supervised=supervised)
    late = run(4, batch, Measured(power=True), prepare=arrive_late)
    assert calls
    torch.testing.assert_close(late, run(4, batch, Measured(power=True)), rtol=0, atol=0)


def test_the_weights_gradient_is_added_to_megatrons_buffer_in_upstreams_schedule_only() -> None:
    buffers: list[Tensor] = []

    def give_buffer(_layer: ColumnParallelLinear, weight: Tensor) -> None:
        weight.main_grad = torch.ones(V, H)
        buffers.append(weight.main_grad)

    plain = run(4, make_batch())["weight"]
    upstream = make_config(grad_scale_func=lambda loss: loss * 8)
    accumulated = run(4, make_batch(), config=upstream, prepare=give_buffer, backward=8.0)["weight"]
    torch.testing.assert_close(buffers.pop(), 1 + 8 * plain, **TOLERANCE)
    assert not accumulated.any()
    own_loop = run(4, make_batch(), prepare=give_buffer, backward=8.0)["weight"]
    torch.testing.assert_close(own_loop, 8 * plain, **TOLERANCE)
    assert torch.equal(buffers.pop(), torch.ones(V, H))
    mean = make_config(grad_scale_func=lambda loss: loss, calculate_per_token_loss=False)
    layer, _ = make_layer(mean)
    layer.weight.main_grad = torch.ones(V, H)
    assert weight_accumulator(layer.weight, mean) is None


def test_layers_whose_gradient_is_not_known_are_refused() -> None:
    class Adapted(ColumnParallelLinear):
        """An adapter of the output layer would add to its logits."""

    config = make_config()
    with pytest.raises(ValueError, match="not Adapted: set loss_chunk_tokens to 0"):
        check_layer(new_layer(Adapted, config), config)
    layer, _ = make_layer(config)
    check_layer(layer, config)
    layer.config.defer_embedding_wgrad_compute = True
    with pytest.raises(ValueError, match="set loss_chunk_tokens to 0"):
        check_layer(layer, config)

"""The flow head: zero at first, differentiable, blind to how it is batched, and quiet about the random stream."""

import pytest
import torch
from megatron.core.transformer import TransformerConfig

from megatron_sfr.model.flow_head import FlowHead, FlowHeadOptions, Measured
from megatron_sfr.objectives.sfr import flow_matching_loss

B, A, K, D, H = 2, 3, 2, 5, 8


def make_head(seed: int = 3, *, fresh: bool = False) -> FlowHead:
    config = TransformerConfig(num_layers=1, hidden_size=H, num_attention_heads=2, cuda_graph_modules=[])
    options = FlowHeadOptions(sfr_target_dim=D, sfr_head_width=7, sfr_head_depth=2)
    return FlowHead(config, options, weight=1.0, seed=seed, fresh=fresh)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = ((B, A, K, D), (B, A, K, 1), (B, A, 1, H))
    x_t, t, h = (torch.rand(shape, generator=g, dtype=dtype) for shape in shapes)
    return x_t, t, h


def test_a_new_head_answers_zero_and_only_its_output_layer_has_a_gradient() -> None:
    head = make_head()
    v = head(*inputs())
    assert v.shape == (B, A, K, D)
    assert not v.any()
    (v - 1).square().sum().backward()
    assert {name for name, p in head.named_parameters() if p.grad.any()} == {"output.weight", "output.bias"}


def test_its_weights_come_from_its_own_seed_and_leave_the_global_stream_alone() -> None:
    torch.manual_seed(9)
    expected = torch.rand(4)
    torch.manual_seed(9)
    one, other = make_head(), make_head(seed=4)
    assert torch.equal(torch.rand(4), expected)
    assert torch.equal(one.input.weight, make_head().input.weight)
    assert not torch.equal(one.input.weight, other.input.weight)
    assert one.input.weight.abs().max() <= one.input.in_features**-0.5


def test_splitting_the_first_product_equals_one_linear_on_the_concatenation() -> None:
    head = make_head()
    torch.nn.init.normal_(head.output.weight)
    x_t, t, h = inputs()
    time = head.time_out(torch.nn.functional.silu(head.time_in(head.embed_time(t))))
    x = head.input(torch.cat([x_t, time, h.expand(B, A, K, H)], dim=-1))
    x = torch.nn.functional.silu(head.norm(x))
    for block in head.blocks:
        x = block(x)
    assert torch.allclose(head(x_t, t, h), head.output(x), atol=1e-6)


def test_gradients_of_the_loss_at_the_hidden_state_pass_gradcheck_in_float64() -> None:
    head = make_head().double()
    torch.nn.init.normal_(head.output.weight)
    x_0, t, h = inputs(torch.float64)
    x_1, weight = x_0[:, :, 0] * 2, torch.tensor([[1.0, 0, 2], [0.5, 1, 1]], dtype=torch.float64)

    def loss(h: torch.Tensor) -> torch.Tensor:
        return flow_matching_loss(head, h[:, :, 0], x_1, weight, x_0, t)

    assert torch.autograd.gradcheck(loss, h.requires_grad_())


def test_time_embedding_tells_near_times_apart() -> None:
    head = make_head()
    near = head.embed_time(torch.tensor([[0.5], [0.501]]))
    assert near.shape == (2, D)
    assert (near[0] - near[1]).abs().max() > 0.1


def test_what_was_measured_stays_fp32_when_the_model_becomes_bf16() -> None:
    head = make_head().bfloat16()
    assert {b.dtype for b in head.measured.buffers()} == {torch.float32}
    assert {p.dtype for p in head.parameters()} == {torch.bfloat16}
    assert Measured(0.3).half().weight.item() == pytest.approx(0.3, abs=1e-7)


def test_only_a_fresh_head_may_be_missing_and_only_once() -> None:
    head = make_head(fresh=True)
    before = head.input.weight.clone()
    assert head.sharded_state_dict() == {}
    head.load_state_dict({}, strict=True)
    assert torch.equal(head.input.weight, before)
    with pytest.raises(RuntimeError, match=r"Missing key.*input\.weight"):
        head.load_state_dict({}, strict=True)
    with pytest.raises(RuntimeError, match="Missing key"):
        make_head().load_state_dict({}, strict=True)

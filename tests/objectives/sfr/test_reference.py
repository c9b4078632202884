"""The preset `reference` against the authors' loss, reimplemented here from the formulas of arXiv 2605.27971.

N tokens y_1 ... y_N of one reply; d: embedding dimension; h_t in R^H: hidden state at the input y_t.
"""

import argparse
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_sfr.config.option_flags import options
from megatron_sfr.config.settings import PARTS, PRESETS, Parser, to_flags
from megatron_sfr.data.prepared.conversations import Anchors
from megatron_sfr.model.flow_head import FlowHead, FlowHeadOptions, FlowHeadPlan
from megatron_sfr.objectives.sfr.gate import GateOptions
from megatron_sfr.objectives.sfr.schedule import ScheduleOptions
from megatron_sfr.objectives.sfr.sfr_loss import SFROptions, anchor_errors, draw_noise, weighted_sum
from megatron_sfr.objectives.sfr.target_scale import TargetOptions
from megatron_sfr.training.auxiliary_loss import FlowTerm, TermOptions
from megatron_sfr.training.data.anchor_arrays import AnchorSizes, anchor_arrays, join_anchors
from megatron_sfr.training.data.provider import DataOptions

N, STRIDE, d, H = 15, 4, 10, 12  # of 15 tokens our weights (N - j) / 8 are exact in fp32
BEFORE = 3  # tokens before the reply
SAMPLE = 7


def preset() -> argparse.Namespace:
    parser = Parser()
    return parser.read(to_flags(PRESETS["reference"], parser))


def authors_loss(weights: dict[str, Tensor], h: Tensor, z_1: Tensor, z_0: Tensor, tau: Tensor) -> Tensor:
    """L = sum_t w_t l_t / max(1, sum_t w_t) of h [N, H], z_1 and z_0 [N, d], tau one number for the sequence."""
    z_tau, v = tau * z_1 + (1 - tau) * z_0, z_1 - z_0
    # Sines first, as in our code: another order only permutes the inputs, and so the weights, of a Linear.
    angle = tau / 10000.0 ** (2 * torch.arange(d // 2, dtype=tau.dtype) / d)
    temb = torch.cat([angle.sin(), angle.cos()])
    temb = weights["time_in.weight"] @ temb + weights["time_in.bias"]
    temb = weights["time_out.weight"] @ (temb * temb.sigmoid()) + weights["time_out.bias"]
    first = torch.cat([weights[f"input_{part}.weight"] for part in "xth"], dim=1)
    x = torch.cat([z_tau, temb.expand(N, d), h], dim=1) @ first.T + weights["input_x.bias"]
    x = silu_of_norm(x, weights["norm.weight"], weights["norm.bias"])
    inner = x @ weights["blocks.0.linear.weight"].T + weights["blocks.0.linear.bias"]
    x = x + silu_of_norm(inner, weights["blocks.0.norm.weight"], weights["blocks.0.norm.bias"])
    v_hat = x @ weights["output.weight"].T + weights["output.bias"]
    l_t = (v_hat - v).square().mean(-1)
    position = torch.arange(1, N + 1, dtype=tau.dtype)
    w_t = (N - position + 1) / N
    return (w_t * l_t).sum() / w_t.sum().clamp(min=1)


def silu_of_norm(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    x = gain * (x - mean) / (variance + 1e-5).sqrt() + shift
    return x * x.sigmoid()


def make_head() -> FlowHead:
    """The preset's head with all parameters random, including norms and the output layer."""
    config = TransformerConfig(num_layers=1, hidden_size=H, num_attention_heads=2, cuda_graph_modules=[])
    head = FlowHead(config, FlowHeadPlan(options(FlowHeadOptions, preset()), dim=d, gate_bins=1))
    g = torch.Generator().manual_seed(0)
    for p in head.net.parameters():
        with torch.no_grad():
            p.add_(0.05 * torch.randn(p.shape, generator=g))
    return head.eval()


def make_batch() -> dict[str, Tensor]:
    """One reply with an anchor at every 4th token; each position has the target of its nearest anchor."""
    ordinal = np.arange(0, N, STRIDE, dtype=np.int32)
    same, n = np.zeros_like(ordinal), len(ordinal)
    anchors = Anchors(BEFORE + ordinal, np.arange(n, dtype=np.int32), same, ordinal, same + N, same)
    g = torch.Generator().manual_seed(1)
    store = F.normalize(torch.randn(n, d, generator=g), dim=-1).half().numpy()
    fill = options(DataOptions, preset()).sfr_anchors
    row = join_anchors([anchors], np.array([SAMPLE]), np.array([0]))
    arrays = anchor_arrays(row, fill, AnchorSizes(n, N + 2)) | {"target": store}  # two entries of padding
    return {name: torch.from_numpy(x)[None] for name, x in arrays.items()}


def make_states(dtype: torch.dtype) -> Tensor:
    """[S, 1, H]: the prompt, the reply and two more positions."""
    return torch.randn(BEFORE + N + 4, 1, H, dtype=dtype, generator=torch.Generator().manual_seed(2))


def authors_inputs(batch: dict[str, Tensor], h_SBH: Tensor) -> tuple[Tensor, ...]:
    """h, z_1, z_0 and tau of the reply's positions, in float64: the nearest anchor's target, the earlier on a tie."""
    h = h_SBH[BEFORE : BEFORE + N, 0].double()
    nearest = [min(range(0, N, STRIDE), key=lambda anchor: abs(anchor - j)) // STRIDE for j in range(N)]
    z_1 = batch["target"][0].double()[nearest]
    position = BEFORE + torch.arange(N)[None]
    z_0, tau = draw_noise(
        torch.tensor([[SAMPLE]]), position, torch.zeros_like(position), d, 0, options(SFROptions, preset())
    )
    assert z_0.shape == (1, N, 1, d)  # one draw
    assert len(tau.unique()) == 1  # shared by the sequence
    return h, z_1, z_0[0, :, 0].double(), tau.flatten()[0].double()


def test_the_term_equals_the_authors_loss_in_float64() -> None:
    sfr, head, batch, h_SBH = (
        options(SFROptions, preset()),
        make_head().double(),
        make_batch(),
        make_states(torch.float64),
    )
    position, horizon = batch["anchor_position"], batch["anchor_horizon"]
    x_0, t = (x.double() for x in draw_noise(batch["anchor_sample"], position, horizon, d, 0, sfr))
    error, weight = anchor_errors(
        partial(head, horizon_BA=horizon),
        h_SBH[position[0], 0][None],
        batch["target"][:, batch["anchor_row"][0]].double(),
        batch["anchor_weight"].double(),
        *(x_0, t, sfr),
    )
    expected = authors_loss(dict(head.net.named_parameters()), *authors_inputs(batch, h_SBH))
    actual = weighted_sum(error, weight) / weight.sum()
    assert expected > 0.5
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=0)


def test_the_term_of_a_run_equals_the_authors_loss_and_gradient_at_h() -> None:
    args, head, batch, h_SBH = preset(), make_head(), make_batch(), make_states(torch.float32).requires_grad_()
    kinds = (SFROptions, TargetOptions, GateOptions, FlowHeadOptions)
    term = FlowTerm(TermOptions(*(options(kind, args) for kind in kinds)))
    start = term.begin(head, step=0, first_average=0)
    actual = term(head, batch, h_SBH, start, detach=False, sharded=False, microbatches=1)
    weights = {name: p.double() for name, p in head.net.named_parameters()}
    reference = h_SBH.detach().clone().requires_grad_()
    expected = authors_loss(weights, *authors_inputs(batch, reference))
    torch.testing.assert_close((actual.loss / actual.weight).double(), expected, rtol=1e-5, atol=0)
    (actual.objective / actual.weight).backward()
    expected.backward()
    torch.testing.assert_close(h_SBH.grad, reference.grad, rtol=1e-4, atol=1e-7)
    assert not h_SBH.grad[:BEFORE].any()


def test_the_preset_sets_the_authors_options() -> None:
    args = preset()
    for part in PARTS:
        options(part, args)
    assert options(DataOptions, args).sfr_anchors == "nearest"
    assert options(TargetOptions, args).scale == "l2"
    assert options(SFROptions, args) == SFROptions(time_per="sequence", draws=1)
    assert options(ScheduleOptions, args) == ScheduleOptions(weight_on="loss")
    assert options(GateOptions, args) == GateOptions("dynamic", bins=1)
    assert options(FlowHeadOptions, args) == FlowHeadOptions(time_scale=1.0, ema="smooth")

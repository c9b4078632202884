"""From SFR to one-step multi-token prediction (MTP), trained side by side on one stream of batches.

The text is a Markov chain, so what one-step MTP learns is known: p(y_{t+2} | y_t), the square of the chain's matrix. A
backbone learns the next token by cross-entropy. Heads read its hidden states and learn y_{t+2}; they have
the same network, the same initial weights and the same batches, and differ in one setting each:

flow    SFR as it is by default, with the one-hot vector of y_{t+2} as the embedding of a segment of one token
start   --sfr-time zero: the head sees the noise alone, and its target is x_1 minus that noise
mse     --sfr-source zero too: regression on the one-hot vector, the Brier score
mtp     the same output read as logits, with cross-entropy: a head of multi-token prediction

Their gradients at the hidden states are compared on each batch. docs/math.md has the numbers and what they mean.
Shapes: B sequences, S positions, V tokens and dimension of the embeddings, H hidden size.
"""

from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_sfr.model.velocity import MLPVelocity
from megatron_sfr.objectives.sfr.sfr_loss import SFROptions, anchor_errors, draw_noise, weighted_sum

B, S, V, H, STEPS = 16, 12, 6, 16, 300
ARMS = {
    "flow": SFROptions(),
    "start": SFROptions(time="zero"),
    "zero source": SFROptions(source="zero", time="zero"),
    "mse": SFROptions(loss="mse"),
}


def chain() -> Tensor:
    """p(y_{t+1} | y_t), [V, V]: each token has three successors of unlike probability."""
    p = torch.zeros(V, V)
    for y in range(V):
        for step, mass in ((1, 0.6), (2, 0.3), (4, 0.1)):
            p[y, (y + step) % V] = mass
    return p


def text(step: int) -> Tensor:
    """A batch of the stream, int64 [B, S + 2]."""
    g = torch.Generator().manual_seed(1000 + step)
    y = [torch.randint(V, (B,), generator=g)]
    for _ in range(S + 1):
        y.append(torch.multinomial(chain()[y[-1]], 1, generator=g)[:, 0])
    return torch.stack(y, dim=1)


def make_head() -> MLPVelocity:
    head = MLPVelocity(V, H, W=32, depth=1, horizons=1, time_scale=1000.0)
    head.initialize(torch.Generator().manual_seed(0))
    return head


def error_of(head: MLPVelocity, h_BSH: Tensor, x_1_BSV: Tensor, options: SFROptions, step: int) -> Tensor:
    """The mean SFR loss of an anchor at each position."""
    position, sample = torch.arange(S).expand(B, S), (torch.arange(B) + B * step)[:, None].expand(B, S)
    none = torch.zeros_like(position)

    def velocity(x_t: Tensor, t: Tensor, h: Tensor) -> Tensor:
        return head(x_t, t, h, none)

    noise = draw_noise(sample, position, none, V, 0, options)
    return weighted_sum(*anchor_errors(velocity, h_BSH, x_1_BSV, torch.ones(B, S), *noise, options)) / (B * S)


def read(head: MLPVelocity, h_BSH: Tensor) -> Tensor:
    """The head's output at x_t = 0, t = 0: [B, S, V]."""
    zero = torch.zeros(B, S, 1, V)
    out: Tensor = head(zero, zero[..., :1], h_BSH[:, :, None], torch.zeros(B, S, dtype=torch.int64))
    return out[:, :, 0]


@dataclass
class Arm:
    """A head, its optimizer, and the gradient at h of each of its steps."""

    head: MLPVelocity = field(default_factory=make_head)
    gradients: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.head.parameters(), 3e-3)

    def learn(self, loss: Tensor, h: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        assert h.grad is not None
        self.gradients.append(h.grad.flatten().clone())
        self.optimizer.step()


def train() -> tuple[dict[str, Arm], Tensor, Tensor]:
    """The arms after STEPS steps, and hidden states [B, S, H] and tokens [B, S] of a batch that none has seen."""
    torch.manual_seed(0)
    backbone, output = nn.Sequential(nn.Embedding(V, H), nn.Linear(H, H), nn.Tanh()), nn.Linear(H, V)
    optimizer = torch.optim.Adam([*backbone.parameters(), *output.parameters()], 1e-2)
    arms = {name: Arm() for name in (*ARMS, "mtp")}
    for step in range(STEPS):
        y = text(step)
        h = backbone(y[:, :S])
        optimizer.zero_grad()
        F.cross_entropy(output(h).flatten(0, 1), y[:, 1 : S + 1].flatten()).backward()
        optimizer.step()
        x_1, y_2 = F.one_hot(y[:, 2:], V).float(), y[:, 2:].flatten()
        for name, arm in arms.items():
            own = h.detach().requires_grad_()
            if name == "mtp":
                loss = F.cross_entropy(read(arm.head, own).flatten(0, 1), y_2)
            else:
                loss = error_of(arm.head, own, x_1, ARMS[name], step)
            arm.learn(loss, own)
    y = text(STEPS)[:, :S]
    return arms, backbone(y).detach(), y


@pytest.fixture(scope="module")
def run() -> tuple[dict[str, Arm], Tensor, Tensor]:
    return train()


def cosine(a: Arm, b: Arm, steps: slice) -> float:
    pairs = zip(a.gradients[steps], b.gradients[steps], strict=True)
    return float(torch.stack([F.cosine_similarity(x, y, dim=0) for x, y in pairs]).mean())


def prediction(name: str, arm: Arm, h: Tensor) -> Tensor:
    """p(y_{t+2} | h) as the arm has learned it: [B, S, V]. A flow's is its mean over noise at t = 0."""
    with torch.no_grad():
        if name == "mtp":
            return read(arm.head, h).softmax(-1)
        if name in ("mse", "zero source"):
            return read(arm.head, h)
        x_0 = torch.randn(B, S, 256, V, generator=torch.Generator().manual_seed(7))
        v = arm.head(x_0, torch.zeros_like(x_0[..., :1]), h[:, :, None], torch.zeros(B, S, dtype=torch.int64))
        mean: Tensor = (x_0 + v).mean(2)  # E[x_1 - x_0 | x_0, h] + x_0
        return mean


def distance(name: str, arm: Arm, h: Tensor, y: Tensor) -> float:
    """Total variation between what the arm predicts and the chain, on average over positions."""
    truth = (chain() @ chain())[y]
    return float((prediction(name, arm, h) - truth).abs().sum(-1).mean() / 2)


def test_P7_zero_source_equals_the_mse_ablation_bit_for_bit(run: tuple) -> None:
    arms, _, _ = run
    for a, b in zip(arms["zero source"].head.parameters(), arms["mse"].head.parameters(), strict=True):
        assert torch.equal(a, b)
    assert all(map(torch.equal, arms["zero source"].gradients, arms["mse"].gradients))


def test_P7_every_arm_learns_the_same_conditional_distribution(run: tuple) -> None:
    arms, h, y = run
    assert (chain() @ chain()).max(dim=1).values.max() < 0.5, "a prediction of one token is far from the truth"
    found = {name: distance(name, arm, h, y) for name, arm in arms.items()}
    print("distance to the truth:", {name: round(value, 3) for name, value in found.items()})
    uniform = float(((chain() @ chain()) - 1 / V).abs().sum(-1).mean() / 2)
    assert uniform > 0.39
    assert max(found["mse"], found["mtp"]) < 0.08
    assert max(found["flow"], found["start"]) < 0.18, "the noise costs steps"


def test_P7_gradients_at_h_approach_mtps_along_the_chain_but_are_not_equal_to_it(run: tuple) -> None:
    arms, _, _ = run
    late = slice(STEPS // 2, STEPS)
    found = {name: cosine(arm, arms["mtp"], late) for name, arm in arms.items()}
    print("cosine at h with MTP's gradient:", {name: round(value, 3) for name, value in found.items()})
    assert found["mtp"] == pytest.approx(1)
    assert found["zero source"] == found["mse"]
    assert found["flow"] < found["start"] < found["mse"]
    assert 0.5 < found["mse"] < 0.999, "the Brier score and cross-entropy weigh the same errors differently"


def test_P7_the_difference_that_is_left_is_a_factor_1_over_p() -> None:
    """At equal predictions p(h): Brier (2 / V) sum_v (p_v - [v = y]) dp_v/dh; MTP the same sum with dp_v/dh / p_v."""
    g = torch.Generator().manual_seed(3)
    matrix, y = torch.randn(H, V, generator=g, dtype=torch.float64), torch.randint(V, (B, S), generator=g)
    h = torch.randn(B, S, H, generator=g, dtype=torch.float64).requires_grad_()
    x_1, ones = F.one_hot(y, V).double(), torch.ones(B, S, dtype=torch.float64)

    def velocity(x_t: Tensor, t: Tensor, h: Tensor) -> Tensor:
        return (h @ matrix).softmax(-1) + 0 * x_t

    zero = torch.zeros(B, S, 1, V, dtype=torch.float64)
    noise = zero, zero[..., :1]
    sfr = weighted_sum(*anchor_errors(velocity, h, x_1, ones, *noise, SFROptions(loss="mse")))
    (brier,) = torch.autograd.grad(sfr, h)
    (mtp,) = torch.autograd.grad(F.cross_entropy((h @ matrix).flatten(0, 1), y.flatten(), reduction="sum"), h)
    p = (h @ matrix).softmax(-1)
    jacobian = torch.einsum("bsv,bsvw,hw->bsvh", p, torch.eye(V, dtype=torch.float64) - p[..., None, :], matrix)
    error = (p - x_1).detach()
    torch.testing.assert_close(brier, 2 / V * torch.einsum("bsv,bsvh->bsh", error, jacobian))
    torch.testing.assert_close(mtp, torch.einsum("bsv,bsvh->bsh", error / p, jacobian))
    similar = F.cosine_similarity(brier.flatten(), mtp.flatten(), dim=0)
    assert 0.5 < similar < 0.99

"""The loss of multi-token prediction on Megatron's output layer, against Megatron's own on one process.

Parallel layouts, context parallelism among them, are in tests/distributed.
Shapes: S positions, B samples, H hidden size, V columns, K layers.
"""

from typing import Any

import pytest
import torch
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler, process_mtp_loss
from torch import Tensor
from torch.nn.functional import cross_entropy

from megatron_sfr.model.multi_token import predicted_states
from megatron_sfr.objectives.anchored.asft import ASFT
from megatron_sfr.objectives.anchored.reference import LOG_P, TOKEN, Reference
from megatron_sfr.training.attention_mask import document_bounds, packed_sequence
from megatron_sfr.training.data.multi_token_labels import multi_token_labels
from megatron_sfr.training.lm_head import LastStage, Measured, MultiTokenLoss, MultiTokenResult, TokenObjective
from tests.objectives.token.token_cases import reference
from tests.training.test_lm_head import TOLERANCE, H, S, V, make_config, make_layer

pytestmark = pytest.mark.usefixtures("one_rank")
K = 2
DOCUMENTS = torch.tensor([[0, 0, 0, 0, 1, 1, 2, 2, 2]])


def make_batch(document: Tensor | None = None, *, supervised: bool = True) -> dict[str, Tensor]:
    """The first position of each document is supervised, so that no two layers have equally many labels."""
    g, samples = torch.Generator().manual_seed(2), 2 if document is None else 1
    mask = (torch.rand(samples, S, generator=g) < 0.7).float()
    mask[:, [0, 4, 6]] = 1
    batch = {"labels": torch.randint(V, (samples, S), generator=g), "loss_mask": mask * supervised}
    return batch if document is None else batch | {"document": document}


def make_states(samples: int) -> Tensor:
    """Hidden states of the decoder and of K layers."""
    return torch.randn((1 + K) * S, samples, H, generator=torch.Generator().manual_seed(3), requires_grad=True)


def make_config_with_layers(**changes: Any) -> Any:
    return make_config(**{"mtp_num_layers": K, "mtp_loss_scaling_factor": 0.3} | changes)


def ours(
    batch: dict[str, Tensor], chunk: int, size: int = V, *, grad: bool = True, **changes: Any
) -> tuple[dict[str, Tensor | None], MultiTokenResult]:
    config, states_SBH = make_config_with_layers(**changes), make_states(len(batch["labels"]))
    layer, _ = make_layer(config)
    loss = MultiTokenLoss(size, chunk)
    batch = multi_token_labels(batch, K)
    batch |= loss.positions(batch)
    last_SBH, *predicted = states_SBH.chunk(1 + K)
    stage = LastStage(last_SBH, layer, None, None, lambda x: x, config)
    with torch.set_grad_enabled(grad):
        result = loss(stage, predicted, batch, counts=True)
    assert result is not None
    if grad:
        result.total.backward()
    return {"states": states_SBH.grad, "weight": layer.weight.grad}, result


def megatrons(batch: dict[str, Tensor], **changes: Any) -> dict[str, Tensor | None]:
    config, states_SBH = make_config_with_layers(**changes), make_states(len(batch["labels"]))
    layer, _ = make_layer(config)
    MTPLossAutoScaler.set_loss_scale(torch.tensor(1.0))

    def of_each_token(labels_BS: Tensor, logits_SBV: Tensor) -> Tensor:
        return cross_entropy(logits_SBV.permute(1, 2, 0), labels_BS, reduction="none")

    last_SBH = process_mtp_loss(
        hidden_states=states_SBH,
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        output_layer=layer,
        output_weight=None,
        runtime_gather_output=None,
        is_training=False,
        compute_language_model_loss=of_each_token,
        config=config,
        packed_seq_params=packed_sequence(document_bounds(batch["document"][0])) if "document" in batch else None,
    )
    (0 * last_SBH).sum().backward()  # the losses add their gradients to any backward pass
    return {"states": states_SBH.grad, "weight": layer.weight.grad}


@pytest.mark.parametrize("document", [None, DOCUMENTS], ids=["sequences", "documents"])
@pytest.mark.parametrize("chunk", [0, 4])
def test_gradients_are_megatrons(document: Tensor | None, chunk: int) -> None:
    batch = make_batch(document)
    found, _ = ours(batch, chunk)
    expected = megatrons(batch)
    assert all(expected[name].abs().sum() > 0.1 for name in expected)
    torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize("chunk", [0, 4])
def test_detached_heads_do_not_train_the_output_layer(chunk: int) -> None:
    found, _ = ours(make_batch(), chunk, mtp_detach_heads=True)
    expected = megatrons(make_batch(), mtp_detach_heads=True)
    assert found.pop("weight") is None
    expected.pop("weight")
    torch.testing.assert_close(found, expected, **TOLERANCE)


def test_columns_that_pad_the_vocabulary_do_not_count() -> None:
    batch = make_batch()
    batch["labels"] %= V - 3
    (found, result), (complete, _) = ours(batch, 4, V - 3), ours(batch, 4)
    assert not found["weight"][V - 3 :].any()
    assert complete["weight"][V - 3 :].all()
    assert result.sums_K3[0, 0] < ours(batch, 4, grad=False)[1].sums_K3[0, 0]


def test_what_is_logged_is_the_sum_over_the_labels_of_a_layer() -> None:
    batch = make_batch()
    result = ours(batch, 4, grad=False)[1]
    assert result.sums_K3[:, 2].tolist() == [batch["loss_mask"][:, k:].sum() for k in (1, 2)]
    layer, _ = make_layer(make_config_with_layers())
    for k, h_SBH in enumerate(make_states(2).chunk(1 + K)[1:], start=1):
        z_BSV = torch.einsum("sbh,vh->bsv", h_SBH, layer.weight).detach()[:, : S - k]
        label_BS, mask_BS = batch["labels"][:, k:], batch["loss_mask"][:, k:]
        loss_BS = cross_entropy(z_BSV.transpose(1, 2), label_BS, reduction="none") * mask_BS
        correct_BS = (z_BSV.argmax(-1) == label_BS) * mask_BS
        torch.testing.assert_close(result.sums_K3[k - 1, :2], torch.stack([loss_BS.sum(), correct_BS.sum()]))


@pytest.mark.parametrize("chunk", [0, 4])
@pytest.mark.parametrize("nothing", ["labels", "weight"])
def test_without_labels_or_weight_gradients_are_zero(chunk: int, nothing: str) -> None:
    batch = make_batch(supervised=nothing != "labels")
    config = {} if nothing == "labels" else {"mtp_loss_scaling_factor": 0.0}
    found, result = ours(batch, chunk, **config)
    assert result.total == 0
    assert not found["states"].any()
    assert found["weight"] is None or not found["weight"].any()


@pytest.mark.parametrize("chunk", [0, 4])
def test_beside_asft_only_the_main_loss_reads_the_reference(chunk: int) -> None:
    batch, r = make_batch(), reference(2 * S, V, 3)
    given = batch | {TOKEN: r.token.view(2, S, 3).int(), LOG_P: r.log_p.view(2, S, 4).float()}
    torch.testing.assert_close(ours(given, chunk)[0], ours(batch, chunk)[0], rtol=0, atol=0)

    layer, _ = make_layer(make_config_with_layers())
    objective, labelled = TokenObjective(V, ASFT(weight=0.3), chunk), multi_token_labels(given, K)
    if (index := objective.positions(labelled, False)) is not None:
        labelled |= {"logit_position": index}
    last_SBH, *_ = make_states(2).chunk(1 + K)
    stage = LastStage(last_SBH, layer, None, None, lambda x: x, layer.config)
    found = objective(stage, labelled["labels"], labelled, Measured(), counts=True)
    known = batch["loss_mask"].flatten() > 0
    z_TV = (last_SBH.transpose(0, 1).flatten(0, 1) @ layer.weight.t())[known]
    loss = ASFT(weight=0.3).at(Reference(r.token[known], r.log_p[known].float()))
    torch.testing.assert_close(found.total, loss.loss(z_TV, batch["labels"].flatten()[known]).sum(), **TOLERANCE)


def test_a_model_returns_all_hidden_states_within_the_context_only() -> None:
    from megatron.core.models.gpt import gpt_model

    before, states = gpt_model.process_mtp_loss, make_states(1)
    with predicted_states():
        assert gpt_model.process_mtp_loss(hidden_states=states, labels=None) is states
    assert gpt_model.process_mtp_loss is before

"""GEM as slime's loss: `--loss-type custom_loss --custom-loss-function-path examples.slime_loss.gem_loss.loss`."""

import torch
from megatron.core import mpu

import megatron_sfr as sfr

GEM = sfr.GEM(beta=0.7)


def loss(args, batch, logits, sum_of_sample_mean):
    """slime's custom loss over the response tokens of a microbatch: (scalar loss, metrics)."""
    from slime.backends.megatron_utils.loss import get_responses

    fields = {name: batch[name] for name in ("unconcat_tokens", "total_lengths", "response_lengths")}
    if batch.get("max_seq_lens") is not None:  # of the layout bshd, which slime no longer has
        fields["max_seq_lens"] = batch["max_seq_lens"]
    # By default get_responses divides the logits by the rollout's temperature, which would change beta.
    responses = get_responses(logits, args=args, **fields, apply_temperature=False)
    z_TV, y_T = (torch.cat(parts) for parts in zip(*responses, strict=True))
    loss_T, cross_entropy_T = sfr.token_loss(
        z_TV, y_T, GEM, mpu.get_tensor_model_parallel_group(), vocab_size=args.vocab_size
    )
    total = sum_of_sample_mean(loss_T)
    return total, {"loss": total.detach().clone(), "cross_entropy": sum_of_sample_mean(cross_entropy_T)}

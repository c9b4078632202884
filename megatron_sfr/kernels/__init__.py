"""The two passes over the logits that every token loss makes, in plain torch and fused in Triton for CUDA; and the
vocabulary axis that they share."""

from megatron_sfr.kernels.vocab_parallel import choose

__all__ = ["choose"]

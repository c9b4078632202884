"""Training objectives, one file a paper. Tensors and process groups come in; no Megatron here."""

"""Model families: which Hugging Face tensors make up each Megatron tensor, one file a family."""

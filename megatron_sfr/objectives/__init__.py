"""Training objectives, one file per paper. They take tensors and process groups and do not depend on Megatron."""

"""Megatron's torch_dist checkpoints, read and written without Megatron's process groups."""

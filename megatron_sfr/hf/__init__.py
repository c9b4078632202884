"""Strict conversion between Hugging Face and Megatron: every tensor is mapped, or the conversion fails by name."""

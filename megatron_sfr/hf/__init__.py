"""Weights to and from Hugging Face's format, strictly: every tensor is mapped, or the conversion fails by name."""

"""Training language models that stay diverse, on NVIDIA Megatron: objectives, data, conversion, evaluation."""

__version__ = "0.1.0"

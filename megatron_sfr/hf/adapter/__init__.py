"""Adapters of LoRA between Megatron's checkpoints and PEFT's folders, and merged into their base."""

"""What becomes of each of Megatron's flags here: refused, used by this package, or passed on to Megatron."""

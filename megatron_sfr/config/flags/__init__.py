"""What becomes of each of Megatron's flags here: refused, used or passed on; and the parser of all options."""

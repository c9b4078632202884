"""Sampling replies: prompts, and the engines that answer them."""

"""Sampling replies: prompts and sampling engines."""

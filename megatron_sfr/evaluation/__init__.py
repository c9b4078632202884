"""Evaluation: sampling, metrics of diversity and quality, and the frontier of one against the other."""

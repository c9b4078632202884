"""Evaluation: sampling, metrics of diversity and quality, and diversity-quality frontiers."""

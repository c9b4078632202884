"""Semantic Flow Regularization (arXiv 2605.27971): its loss, weight schedule, gate and ablations."""

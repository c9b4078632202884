"""Upstream's GPT with a flow head on the last pipeline stage, and upstream's GPT as a denoiser on the simplex."""

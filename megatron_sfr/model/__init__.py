"""Upstream's GPT with a flow head on the stage that computes the loss."""

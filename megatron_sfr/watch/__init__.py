"""Watching a run: each new checkpoint is sampled and scored beside the training, so that collapse is seen early."""

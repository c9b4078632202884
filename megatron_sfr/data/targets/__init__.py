"""Target stores: the embedding of each distinct segment, encoded before training or ahead of it."""

"""The datasets that upstream's training loop samples: conversations or documents, with anchors and targets."""

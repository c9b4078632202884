"""What upstream's training loop asks of us: datasets, the forward step, the loss terms, their metrics."""

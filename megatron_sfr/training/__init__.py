"""The parts that upstream's training loop calls: datasets, the forward step, the auxiliary loss and metrics."""

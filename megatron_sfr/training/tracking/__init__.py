"""Other programs that get the metrics of a run."""

"""Lock and Fork: where a model knows what comes next, where several futures are open, and whether it says so."""

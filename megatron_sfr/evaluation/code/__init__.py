"""Programming tasks: replies run in a sandbox, scored by pass@k."""

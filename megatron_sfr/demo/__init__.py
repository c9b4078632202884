"""The demo: a persona world with known correct replies; trains, samples and compares models on it."""

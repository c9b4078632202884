"""The demo: a persona world whose truth is known, trained, sampled and compared from start to finish."""

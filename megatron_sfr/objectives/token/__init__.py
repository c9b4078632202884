"""Losses of one token: cross-entropy, GEM, SED-SFT, DFT. Each has one file and an entry in the registry."""

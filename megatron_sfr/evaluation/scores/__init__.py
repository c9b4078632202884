"""Scores of replies as pure functions: diversity, quality, modes, repetition, style, and bootstrap intervals."""

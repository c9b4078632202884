"""Scores of replies, pure functions: diversity, quality, modes, repetition, style; and their intervals."""

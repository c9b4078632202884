"""Ratings of replies by a language model: context relevance and style, with several votes and their agreement."""

"""Comparing models: curves over temperatures, frontiers, and the report as text, JSON and HTML."""

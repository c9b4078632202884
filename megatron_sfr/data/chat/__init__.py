"""Conversations: their formats, the rendered chat template, and the exact mask of the tokens the assistant writes."""

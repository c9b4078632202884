"""Families with experts, one file a family; `experts` holds what they share."""

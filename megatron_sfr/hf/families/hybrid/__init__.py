"""Families whose layers are of different kinds, one file a family; `layers` holds what they share."""

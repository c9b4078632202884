"""Anchors and the future segments that the flow head predicts there: windows, sentences or statements."""

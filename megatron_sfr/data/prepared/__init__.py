"""Prepared folders, memory-mapped and read-only: conversations, documents, and the texts of their segments."""

"""Lock and Fork: positions where the next token is almost certain, and positions where several futures are open."""

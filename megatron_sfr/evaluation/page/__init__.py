"""Parts of the evaluation's page: frontiers by persona, and the replies beside the nearest real ones."""

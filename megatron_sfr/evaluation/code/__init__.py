"""Programming tasks: runs replies in a sandbox and scores them by pass@k."""

"""`prepare` and `prepare-text`: worker processes encode records, and a stopped run resumes where it ended."""

"""From JSONL conversations to what training reads: tokens, exact loss masks, anchors and their target embeddings."""

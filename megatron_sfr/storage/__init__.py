"""Files that survive a kill: atomic writes, manifests, memory-mapped arrays, journals, JSONL, resumable outputs."""

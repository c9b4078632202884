"""From JSONL to what training reads: tokens, exact loss masks, anchors, and embeddings of the text that follows them.

chat/       one conversation: its format, its tokens, and which of them the assistant writes
segments/   anchors, and the windows, sentences or statements that follow each
prepare/    `prepare` and `prepare-text`: encode records in several processes, and resume after a kill
prepared/   prepared folders, memory-mapped; what `inspect` shows of them
targets/    target stores: an embedding for each distinct segment, encoded before training or ahead of it
"""

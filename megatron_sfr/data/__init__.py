"""From JSONL to what training reads: tokens, exact loss masks, anchors and the embeddings of what follows them.

rows of text      lines formats chat tool_turns template       what a row says, and which tokens the assistant writes
futures           token_text sentences statements units horizons segments    what an anchor is to foresee, exactly
prepare           samples sample_files document_encoder document_files segment_files journal workers progress
                  preparation document_preparation             by several processes, going on after a kill
prepared folders  flat manifest texts prepared documents       memory-mapped; inspection inspection_page show them
packing           which conversations share a row
target store      rows targets statistics                      a checksum for each row
embedding         encoder filling worker crew beginning embedding prefetch    before training, or ahead of it
"""

"""What training changes in the hidden states: how well linear probes read the persona and the future from them.

    python -m examples.dictionary_styles.study.probe --start HF_DIR --regime scarce

Shapes: N positions, A anchors, L tokens, H hidden size, K outputs, P headwords, S seeds, D values of a measure: of all
headwords, then of each bootstrap resample.
"""

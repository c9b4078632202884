"""GGUF files (llama.cpp's format) as a source of weights."""

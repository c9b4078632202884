"""The study: does any objective leave a model more diverse than cross-entropy at some temperature? docs/study.md tells."""

"""The study: is any objective more diverse than cross-entropy is at some temperature? See docs/study.md."""

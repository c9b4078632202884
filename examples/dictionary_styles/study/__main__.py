"""Starts or resumes the study: python -m examples.dictionary_styles.study."""

import sys

from examples.dictionary_styles.study.stages import main

if __name__ == "__main__":
    sys.exit(main())

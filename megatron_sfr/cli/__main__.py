"""`python -m megatron_sfr.cli` is `megatron-sfr`."""

import sys

from megatron_sfr.cli import main

if __name__ == "__main__":
    sys.exit(main())

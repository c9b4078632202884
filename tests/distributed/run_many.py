"""Under torchrun: trains several recipes one after another in one start. argv: a JSON list of argument lists."""

import json
import sys
from pathlib import Path

from megatron_sfr.train import main

if __name__ == "__main__":
    from megatron.training.training import destroy_global_state

    for argv in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        try:
            main(argv)
        except SystemExit as end:  # how upstream ends a run at --exit-interval
            if end.code:
                raise
        destroy_global_state()

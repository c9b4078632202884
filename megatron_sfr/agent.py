"""torchrun with exit codes that a job script can act on; launch/slurm.sbatch starts one on each node.

torchrun itself ends with 1 both after a failure and after SIGTERM, so a script cannot tell which run to start again.
"""

import os
import sys
from collections.abc import Mapping, Sequence

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main(argv: Sequence[str]) -> int:
    """Runs torchrun with the given arguments and returns the exit code that says how the run ended.

    Returns:
        0 if all ranks finished, 128 + N if signal N stopped the run or killed a rank (143 for SIGTERM), otherwise the
        exit code of the rank that failed first: 2 for an error that the user has to correct.
    """
    try:
        torchrun.main([*local_address(os.environ), *argv])
    except SignalException as stopped:
        print(f"torchrun: stopped by {stopped.sigval.name}", file=sys.stderr, flush=True)
        return 128 + stopped.sigval
    except ChildFailedError as error:
        print(error, file=sys.stderr, flush=True)
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code
    return 0


def local_address(environment: Mapping[str, str]) -> list[str]:
    """torchrun's --local-addr under Slurm: the node's name there, which all nodes of the job resolve.

    Without it torchrun gives the other nodes the host's own name, and they wait for minutes where it does not resolve.
    """
    node = environment.get("SLURMD_NODENAME")
    return ["--local-addr", node] if node else []


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What torch reports about itself and the GPUs: as a program, it prints this as JSON.

The doctor runs it in a separate process. An import of torch can fail, end its process (a broken library) or hang (a
broken driver), and it takes longer than all other checks together.
"""

import gc
import json
import subprocess
from dataclasses import asdict, dataclass

from megatron_sfr.doctor.import_checks import begin_python, result_of
from megatron_sfr.runtime.devices import Gpu


@dataclass(frozen=True)
class TorchFacts:
    version: str
    cuda: str | None
    """The CUDA version that torch was built for; None for a build without CUDA."""
    backends: tuple[str, ...]
    """Collective backends of the build: gloo, nccl."""
    nccl: str | None
    """NCCL's version; None where there is no GPU."""
    gpus: tuple[Gpu, ...]


def begin_torch_facts() -> subprocess.Popen[str]:
    return begin_python(["-m", __name__])


def torch_facts(process: subprocess.Popen[str]) -> TorchFacts:
    """Raises ValueError with the reason if torch cannot be imported or does not answer."""
    output, reason = result_of(process)
    if reason is not None:
        raise ValueError(f"import torch fails: {reason}")
    facts = json.loads(output.splitlines()[-1])
    gpus = tuple(Gpu(gpu["name"], gpu["memory"], tuple(gpu["capability"])) for gpu in facts.pop("gpus"))
    return TorchFacts(**facts | {"backends": tuple(facts["backends"]), "gpus": gpus})


def read_torch_facts() -> TorchFacts:
    """The facts of this process's torch."""
    import torch

    from megatron_sfr.runtime.devices import backends, gpus, nccl_version

    found = tuple(gpus())
    nccl = nccl_version() if found else None
    return TorchFacts(str(torch.__version__), torch.version.cuda, tuple(backends()), nccl, found)


if __name__ == "__main__":
    gc.disable()
    print(json.dumps(asdict(read_torch_facts())))

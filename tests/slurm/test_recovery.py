"""launch/slurm.sbatch on a real Slurm of two nodes: kills, a stop and a requeue do not change the final weights.

Both nodes are this machine, with one rank (a pipeline stage) each, on gloo; a real network and GPUs are not exercised.
Skipped where Slurm is not installed.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from megatron_sfr.hf.megatron.megatron_checkpoint import find_checkpoint
from tests import warm
from tests.distributed.launch import read_checkpoint
from tests.distributed.tiny import write_prepared, write_recipe

from .cluster import NODES, Job, running, unavailable

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.recovery,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(unavailable()), reason=unavailable()),
]
STEPS, INTERVAL = 40, 2


def survive_three_kills(job: Job) -> None:
    """Kills a rank, a node's torchrun agent and a DataLoader worker, each after a checkpoint."""
    for restart, kill in enumerate((job.rank, job.agent, job.data_worker), 1):
        job.wait_for_steps()
        kill(NODES[restart % 2]).kill()
        job.wait_for_text(f"restart {restart} of 3 from the last checkpoint")


def stop(job: Job) -> None:
    """Stops the job as the time limit does; it leaves a checkpoint of its last step and is not started again."""
    job.wait_for_steps()
    job.cluster.call("scancel", "--signal=TERM", job.number)
    job.wait_for_state("FAILED")
    assert job.shown("ExitCode") == "143:0"


def requeue_and_finish(job: Job) -> None:
    """Sends the job back to the queue while it trains; Slurm starts it again, and it trains to the end."""
    job.wait_for_steps()
    job.cluster.call("scontrol", "requeue", job.number)
    job.wait_for_state("COMPLETED", "FAILED")
    assert job.state() == "COMPLETED"
    assert job.shown("Restarts") == "1"


def test_a_job_survives_faults_and_ends_with_the_same_weights(tmp_path: Path) -> None:
    """A failure shows what Slurm says of the jobs, and the ends of their logs and of its daemons'."""
    save, straight = tmp_path / "run", tmp_path / "straight"
    changes = {"pipeline_model_parallel_size": 2, "train_iters": STEPS, "num_workers": 2, "sfr_backend": "cpu"}
    prepared = write_prepared(tmp_path / "data")
    recipe = write_recipe(tmp_path / "recipe.yaml", prepared, save=str(save), save_interval=INTERVAL, **changes)

    # In a folder with a short path: Slurm keeps sockets there, whose paths have at most 108 letters.
    with TemporaryDirectory(prefix="slurm-") as folder, running(Path(folder)) as cluster:
        first = cluster.submit(recipe, tmp_path / "first.log", WAIT_S="10")
        survive_three_kills(first)
        stop(first)
        stopped = int(find_checkpoint(save).name.removeprefix("iter_"))
        assert stopped == first.steps()[-1] < STEPS
        assert first.steps().count(1) == 1, "a restart began again instead of resuming"

        second = cluster.submit(recipe, tmp_path / "second.log", WAIT_S="10")
        requeue_and_finish(second)
        assert second.steps()[0] == stopped + 1
        assert second.steps()[-1] == STEPS

    undisturbed = write_recipe(tmp_path / "straight.yaml", prepared, save=str(straight), save_interval=STEPS, **changes)
    warm.run("-m", "megatron_sfr.train", "--recipe", str(undisturbed), ranks=2, check=True)
    expected, actual = (read_checkpoint(find_checkpoint(folder)) for folder in (straight, save))
    assert expected.keys() == actual.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(tensor, actual[name])]
    assert not different

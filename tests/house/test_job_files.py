"""The job files of Kubeflow Trainer and SkyPilot: the first against the API's own schema; what both would run exists.

Neither was submitted: there is no Kubernetes and no cloud here.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
TRAINJOB, SKYPILOT = LAUNCH / "trainjob.yaml", LAUNCH / "skypilot.yaml"


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_the_trainjob_is_one_of_kubeflows_schema() -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="the schema is in the dev extra")
    given = read(TRAINJOB)
    job = models.TrainerV1alpha1TrainJob.from_dict(given)  # checks the types
    assert job.to_dict() == given, "the schema drops fields that it does not know"


def test_the_trainjob_runs_our_agent_and_its_grace_covers_the_last_checkpoint() -> None:
    spec = read(TRAINJOB)["spec"]
    trainer = spec["trainer"]
    assert trainer["command"] == ["python", "-m", "megatron_sfr.agent", "-m", "megatron_sfr.train"]
    assert (ROOT / trainer["args"][trainer["args"].index("--recipe") + 1]).is_file()
    (patch,) = spec["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    environment = {entry["name"]: entry["value"] for entry in trainer["env"]}
    assert int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_skypilot_sets_what_the_script_of_many_hosts_reads() -> None:
    task = read(SKYPILOT)
    assert (ROOT / task["envs"]["RECIPE"]).is_file()
    script = (LAUNCH / "hosts.sh").read_text(encoding="utf-8")
    read_there = set(re.findall(r"^([A-Z_]+)=\$\{\1:-", script, re.MULTILINE))
    set_here = set(re.findall(r"\b([A-Z_]+)=", task["run"]))
    assert {"HOSTS", "FIRST_HOST", "NPROC"} <= set_here <= read_there


@pytest.mark.parametrize("path", sorted(LAUNCH.iterdir()), ids=lambda path: path.name)
def test_a_launch_file_is_short_and_says_where_a_site_differs(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "site" in text
    assert len([line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]) <= 80

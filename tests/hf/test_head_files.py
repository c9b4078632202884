"""The head that is exported beside the model is the trained one: its velocities are equal bit for bit."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_sfr.hf.export_hf import export_hf
from megatron_sfr.hf.families.family_registry import megatron_flags
from megatron_sfr.hf.head_files import DESCRIPTION, WEIGHTS, load_head
from megatron_sfr.hf.hf_folder import INDEX, Weights, read_config
from megatron_sfr.hf.megatron.megatron_checkpoint import Checkpoint
from tests import warm
from tests.distributed.launch import train
from tests.distributed.tiny import write_prepared, write_recipe
from tests.hf.models import save_model

RUNS = {
    "mlp": (),
    "adaln, averaged, whitened, bf16": (
        *("--sfr-head", "adaln", "--sfr-head-depth", "2", "--sfr-target-scale", "whiten", "--bf16"),
        *("--sfr-ema", "teacher", "--sfr-warmup", "detached", "--sfr-warmup-steps", "1"),
    ),
}


def inputs(name: str, hidden: int, dim: int) -> dict:
    g = torch.Generator().manual_seed(3)
    x_t, t, h = torch.randn(2, 3, 4, dim, generator=g), torch.rand(2, 3, 4, 1, generator=g), (2, 3, 1, hidden)
    dtype = torch.bfloat16 if "bf16" in name else torch.float32
    h = torch.randn(h, generator=g).to(dtype)
    return {"x_t": x_t, "t": t, "h": h, "horizon_BA": torch.randint(2, (2, 3), generator=g), "averaged": "aver" in name}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Each run's checkpoint, what its head answers inside upstream's model, and its export with the head."""
    folder = tmp_path_factory.mktemp("head")
    prepared = write_prepared(folder / "data", horizons=((1, 8), (4, 3)))
    save_model(folder / "hf")
    changes = megatron_flags(read_config(folder / "hf")) | {"seq_length": 80, "train_iters": 2, "lr": 0.01}
    write_recipe(folder / "recipe.yaml", prepared, **changes)
    named = ["--recipe", str(folder / "recipe.yaml")]
    start = ["--sfr-hf-load", str(folder / "hf")]
    jobs = []
    for name, flags in RUNS.items():
        train(1, *named, *start, "--save", str(folder / name), *flags)
        torch.save(inputs(name, 36, 384), folder / f"{name}.pt")
        jobs.append([[*named, "--load", str(folder / name), *flags], str(folder / f"{name}.pt")])
        export_hf(folder / name, folder / f"{name} hf", like=folder / "hf", head=True, progress=False)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    warm.run(str(Path(__file__).with_name("head_velocities.py")), str(folder / "jobs.json"), ranks=1, check=True)
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("name", RUNS)
def test_velocities_are_those_of_the_trained_head(trained, name):
    head, given, wanted = load_head(trained / f"{name} hf"), inputs(name, 36, 384), torch.load(trained / f"{name}.pt")
    with torch.no_grad():
        assert torch.equal(head(**given), wanted)
        assert wanted.abs().max() > 1e-3  # it has learned: an untrained head answers 0
    checkpoint = Checkpoint(trained / name / "iter_0000002")
    for key, value in head.state_dict().items():
        stored = checkpoint.tensors[f"flow_head.{key}"]
        assert torch.equal(value, checkpoint.read(f"flow_head.{key}", [0] * len(stored.size), stored.size)), key
    said = json.loads((trained / f"{name} hf" / DESCRIPTION).read_text())
    assert (said["dim"], said["horizons"], said["hidden_size"]) == (384, 2, 36)
    assert said["encoder"]["encoder_sha256"]


@pytest.mark.distributed
def test_the_model_beside_it_is_the_model(trained):
    """Who loads every .safetensors of a folder is told by an index which are the model's."""
    folder = trained / "mlp hf"
    assert set(json.loads((folder / INDEX).read_text())["weight_map"].values()) == {"model.safetensors"}
    assert Weights(folder).files.keys() == Weights(trained / "hf").files.keys()
    AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.distributed
def test_a_damaged_head_is_refused(trained, tmp_path):
    for name in (WEIGHTS, DESCRIPTION):
        (tmp_path / name).write_bytes((trained / "mlp hf" / name).read_bytes())
    said = json.loads((tmp_path / DESCRIPTION).read_text())
    (tmp_path / DESCRIPTION).write_text(json.dumps(said | {"dim": 383}))
    with pytest.raises(ValueError, match="do not belong together"):
        load_head(tmp_path)
    (tmp_path / DESCRIPTION).write_text(json.dumps(said))
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:-10])
    with pytest.raises(ValueError, match="do not belong together"):
        load_head(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"has no flow_head\.safetensors: export it with"):
        load_head(tmp_path)


def test_a_checkpoint_without_a_head_has_none_to_keep(imported, untied, tmp_path):
    with pytest.raises(ValueError, match="has no flow head to keep"):
        export_hf(imported, tmp_path / "out", like=untied, head=True, progress=False)
    assert list(tmp_path.iterdir()) == []

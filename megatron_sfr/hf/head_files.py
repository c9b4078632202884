"""The flow head beside an exported model: writes and loads `flow_head.safetensors` and `flow_head.json`."""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from megatron.core.transformer import TransformerConfig
from safetensors.torch import load_file

from megatron_sfr.data.targets.store import EncoderIdentity
from megatron_sfr.hf.megatron.megatron_checkpoint import Checkpoint
from megatron_sfr.hf.megatron.megatron_model import HEAD
from megatron_sfr.hf.safetensors_writer import Header, Shard, ShardWriter
from megatron_sfr.model.flow_head import FlowHead, FlowHeadOptions, FlowHeadPlan
from megatron_sfr.objectives.sfr.target_scale import TargetOptions
from megatron_sfr.option_names import option_names
from megatron_sfr.storage.manifest import NAME
from megatron_sfr.storage.user_files import check_fields, loading, read_json_object, shown

WEIGHTS, DESCRIPTION = "flow_head.safetensors", "flow_head.json"


def keep_head(checkpoint: Checkpoint, folder: Path) -> None:
    """Writes the head of a checkpoint. Raises ValueError if it has none, or does not record how it was built."""
    tensors = {key: stored for key, stored in checkpoint.tensors.items() if key.startswith(HEAD)}
    if not tensors:
        raise ValueError(f"{checkpoint.folder} has no flow head to keep: leave --keep-head out")
    (folder / DESCRIPTION).write_text(json.dumps(describe(checkpoint), indent=2) + "\n")
    headers = {
        key.removeprefix(HEAD): Header(tuple(stored.size), stored.properties.dtype) for key, stored in tensors.items()
    }
    with ShardWriter(folder, Shard(WEIGHTS, headers)) as writer:
        for name, header in headers.items():
            writer.write(name, checkpoint.read(HEAD + name, [0] * len(header.shape), header.shape))


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Everything that `load_head` needs, and the encoder of the head's targets if the store still exists."""
    sizes = {key.removeprefix(HEAD): tuple(stored.size) for key, stored in checkpoint.tensors.items()}
    arguments = checkpoint.arguments()
    try:
        options, targets = (
            {option: arguments[option] for option in option_names(part).values()}
            for part in (FlowHeadOptions, TargetOptions)
        )
        return {
            "checkpoint": checkpoint.folder.name,
            "hidden_size": arguments["hidden_size"],
            "dim": sizes["state.target_mean"][0],
            "horizons": sizes.get("net.horizon.weight", (1,))[0],
            "has_network": any(name.startswith("net.") for name in sizes),
            "gate_bins": sizes["state.baseline"][0],
            "head": options,
            "targets": targets,
            "loss": arguments["sfr_loss"],
            "encoder": encoder_of(arguments),
        }
    except KeyError as e:
        raise ValueError(f"{checkpoint.folder} does not say how its flow head was built: no {e}") from e


def encoder_of(arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """The encoder of the run's first target store, if the store still exists."""
    for path in arguments.get("train_data_path") or ():
        manifest = Path(path) / arguments["sfr_target_store"] / NAME
        if manifest.is_file():
            stored = read_json_object(manifest)
            return {field.name: stored.get(field.name) for field in fields(EncoderIdentity)}
    return None


def read_description(folder: Path) -> dict[str, Any]:
    """flow_head.json of a folder. Raises ValueError if it is damaged."""
    hint = "export the model again with --keep-head"
    said = read_json_object(folder / DESCRIPTION, hint)
    for name, kind in {"encoder": dict | None, "head": dict, "targets": dict, "horizons": int, "loss": str}.items():
        if not isinstance(said.get(name), kind):
            raise ValueError(f"{folder / DESCRIPTION}: {name} is {shown(said.get(name))}; {hint}")
    return said


def stored_options[Options](part: type[Options], stored: Mapping[str, Any]) -> Options:
    """A part's options as flow_head.json has them, by the names of flags; options that are missing have defaults."""
    fields_by_option = {option: field for field, option in option_names(part).items()}
    given = {fields_by_option[option]: value for option, value in stored.items()}
    check_fields(given, part)
    return part(**given)


def load_head(folder: str | Path) -> FlowHead:
    """Loads the flow head that `export_hf(..., head=True)` wrote beside a model.

    Args:
        folder: the Hugging Face folder.
    Returns:
        The head with its state, on CPU, in evaluation mode.
    Raises:
        ValueError: the folder has no head, or its files are damaged.
    Example:
        >>> import megatron_sfr as sfr
        >>> sfr.load_head("model").dim
        384
    """
    folder = Path(folder)
    for name in (DESCRIPTION, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}: export it with `megatron-sfr convert export --keep-head`")
    said = read_description(folder)
    with loading(f"{folder}: {WEIGHTS} and {DESCRIPTION} are damaged or do not belong together", "export them again"):
        options = stored_options(FlowHeadOptions, said["head"])
        stored_options(TargetOptions, said["targets"])
        plan = FlowHeadPlan(options, said["dim"], said["horizons"], said["has_network"], said["gate_bins"])
        # cuda_graph_modules: megatron-core 0.19.2 warns of its own default
        config = TransformerConfig(
            num_layers=1, hidden_size=said["hidden_size"], num_attention_heads=1, cuda_graph_modules=[]
        )
        head, tensors = FlowHead(config, plan), load_file(folder / WEIGHTS)
        if head.net is not None:
            head.to(tensors["net.output.weight"].dtype)
        head.load_state_dict(tensors)
    return head.eval()

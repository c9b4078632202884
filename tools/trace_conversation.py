"""Which files of the package one conversation passes through, from its line of JSONL to its loss.

    python -m tools.trace_conversation [--sfr] [--complete]

A file counts if one of its lines runs once more for each further conversation. The tool takes one conversation, and
then two, through `prepare`, the training sequence and a forward step (one chunk, sequence and microbatch each), in one
process, and compares how often each line ran. So what runs once for a folder or a run does not count: options,
tokenizer, locks, manifests. --complete counts that too, from the call of `prepare` on. --sfr adds `embed` and the
auxiliary loss to cross-entropy. runtime/cpu.py, which stands in for CUDA here, is not in the path on a GPU.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1] / "megatron_sfr"
TOOL = sys.monitoring.COVERAGE_ID
EVENTS = sys.monitoring.events.LINE, sys.monitoring.events.PY_RESUME  # a generator may resume within a line
NOT_CALLS = {"<module>", "__post_init__"}
STAND_INS = {"runtime/cpu.py"}
TEXTS = ("It is blue. " * 9, "It is grey. " * 9)
SEQ_LENGTH, VOCABULARY = 128, 400
DIM = 384


Counts = Counter[tuple[str, str, int]]
"""How often each line (file, function, number) ran."""


@contextmanager
def counted() -> Iterator[Counts]:
    """Counts the lines of the package's functions that run meanwhile."""
    found: Counts = Counter()

    def ran(code: CodeType, line: int, *_: Any) -> Any:
        path = Path(code.co_filename)
        if not path.is_relative_to(PACKAGE) or code.co_name in NOT_CALLS:
            return sys.monitoring.DISABLE
        found[path.relative_to(PACKAGE).as_posix(), code.co_qualname, line] += 1
        return None

    sys.monitoring.use_tool_id(TOOL, "trace_conversation")
    for event in EVENTS:
        sys.monitoring.register_callback(TOOL, event, ran)
    sys.monitoring.set_events(TOOL, EVENTS[0] | EVENTS[1])
    try:
        yield found
    finally:
        sys.monitoring.set_events(TOOL, 0)
        sys.monitoring.free_tool_id(TOOL)


def files_of(counts: Counts) -> dict[str, list[str]]:
    """{file: its functions that ran}."""
    found: dict[str, list[str]] = {}
    for file, function, _ in counts:
        if file not in STAND_INS and function not in found.setdefault(file, []):
            found[file].append(function)
    return found


def write_inputs(folder: Path, conversations: int) -> tuple[Path, Path]:
    """A file of equally long records, and a tokenizer that is the same for any number of them."""
    from megatron_sfr.demo.train_tokenizer import train_tokenizer

    folder.mkdir()
    records = folder / "chats.jsonl"
    record, question = {"persona": "sailor"}, {"role": "user", "content": "How is the sea?"}
    lines = [
        json.dumps(record | {"messages": [question, {"role": "assistant", "content": text}]}) + "\n" for text in TEXTS
    ]
    records.write_text("".join(lines[:conversations]), encoding="utf-8")
    train_tokenizer(lines, 400).save_pretrained(folder / "tokenizer")
    return records, folder / "tokenizer"


def model_of(sfr: bool) -> Any:
    """A GPT of Megatron Core in this process, with a flow head for --sfr."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    from megatron_sfr.model.attach_head import attach_head
    from megatron_sfr.model.flow_head import FlowHeadOptions, FlowHeadPlan

    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    model_parallel_cuda_manual_seed(1)
    sizes = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "ffn_hidden_size": 24}
    config = TransformerConfig(**sizes, hidden_dropout=0.0, attention_dropout=0.0, use_cpu_initialization=True)
    model: torch.nn.Module = GPTModel(config, get_gpt_layer_local_spec(), VOCABULARY, SEQ_LENGTH)
    return attach_head(FlowHeadPlan(FlowHeadOptions(width=8), dim=DIM))([model])[0] if sfr else model


def count(folder: Path, conversations: int, model: Any, *, sfr: bool) -> Counts:
    """How often each function ran while this many conversations became losses. Imports are done before."""
    import numpy as np
    from megatron.core.datasets.utils import Split
    from torch.utils.data import default_collate

    from megatron_sfr.data.prepare.chat_source import PrepareOptions
    from megatron_sfr.data.prepare.pipeline import prepare
    from megatron_sfr.data.targets.embed import EmbedOptions, embed
    from megatron_sfr.training.auxiliary_loss import TermOptions
    from megatron_sfr.training.bridge import forward_step
    from megatron_sfr.training.data.anchor_arrays import AnchorPlan
    from megatron_sfr.training.data.conversation_dataset import PreparedDataset, PreparedDatasetConfig
    from megatron_sfr.training.step_context import StepContext

    records, tokenizer = write_inputs(folder, conversations)
    prepared, options = folder / "prepared", PrepareOptions(seq_length=SEQ_LENGTH, min_segment_length=2, stride=4)
    step = forward_step(VOCABULARY, sfr=TermOptions() if sfr else None)
    anchors = AnchorPlan("targets") if sfr else None
    common: dict[str, Any] = {"random_seed": 1, "sequence_length": SEQ_LENGTH, "anchors": anchors}
    config = PreparedDatasetConfig(**common, split=None, blend=None, blend_per_split=[None] * 3)
    with counted() as counts:
        prepare([records], prepared, tokenizer, options, progress=False, chunk_bytes=1)
        if sfr:
            embed(prepared, "minilm", EmbedOptions(block_rows=1, batch_size=1), progress=False)
        data = PreparedDataset.build_low_level_dataset(str(prepared), config)
        dataset = PreparedDataset(data, str(prepared), np.arange(len(data)), None, Split.train, config)
        if anchors is not None:
            dataset.anchor_sizes = dataset.sizes(anchors.entries)
        for number in range(len(dataset)):
            batch = default_collate([dataset[number]])
            output, loss = step(StepContext(0, 1, 1, implementation="local"), iter([batch]), model)
            loss(output)
    assert len(dataset) == conversations
    return counts


def trace(folder: Path, *, sfr: bool, complete: bool) -> dict[str, list[str]]:
    """{file: functions} that one conversation passes through."""
    model = model_of(sfr)
    one, two = (count(folder / str(n), n, model, sfr=sfr) for n in (1, 2))
    return files_of(one if complete else two - one)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sfr", action="store_true", help="also embed the segments, and add the auxiliary loss")
    parser.add_argument("--complete", action="store_true", help="also count what runs once")
    args = parser.parse_args()
    from megatron_sfr.runtime import backend

    backend.prepare(["--sfr-backend", "cpu"])
    backend.join("cpu")
    with tempfile.TemporaryDirectory() as folder:
        found = trace(Path(folder), sfr=args.sfr, complete=args.complete)
    for name, functions in found.items():
        print(f"{name:45} {', '.join(functions)}")
    print(f"{len(found)} files")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A program: the parameters of the most loaded stage of a recipe, by our count and by Megatron's, as JSON."""

import json
import sys
from dataclasses import replace
from pathlib import Path

from megatron.training.theoretical_memory_usage import compute_weight_and_optimizer_memory

from megatron_sfr.config.cluster_args import cluster_args, merged_flags
from megatron_sfr.planning.layout import layout_of
from megatron_sfr.planning.memory import stage_counts

BYTES = 18
"""Of a parameter, by Megatron's count without the distributed optimizer."""


def main() -> None:
    args = cluster_args(merged_flags([Path(sys.argv[1])], [])[1], int(sys.argv[2]))
    args.use_distributed_optimizer = False
    layout = layout_of(args)
    layers = args.num_layers // layout.pipeline  # Megatron's count takes stages to be equal
    layout = replace(layout, stage_layers=(layers,) * layout.pipeline)
    counts = stage_counts(args, layout, 0, [False] * layers)
    print(json.dumps([counts.dense(layout.tensor), compute_weight_and_optimizer_memory(args) / BYTES]))


if __name__ == "__main__":
    main()

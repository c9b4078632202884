"""A program: validates a recipe as rank 0 of N processes would, by upstream's own parser and checks, and prints JSON.

python -m tests.house.validate_recipe N RECIPE [flags]. Upstream's checks ask the GPU for its architecture: the CPU
seam answers as Hopper. Rope fusion alone is left out, because upstream refuses it where Transformer Engine is absent.
"""

import json
import os
import sys
from pathlib import Path


def validate(recipe: Path, flags: list[str]) -> dict[str, object]:
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.training.argument_utils import gpt_config_from_args

    from megatron_sfr.config import settings
    from megatron_sfr.config.recipe import read_recipe
    from megatron_sfr.model.builder import SFRModelConfig
    from megatron_sfr.runtime import cpu

    cpu.install()
    parser = settings.Parser()
    merged = settings.to_flags(settings.DEFAULTS | read_recipe(recipe), parser) + ["--no-rope-fusion", *flags]
    settings.check(parser.read(merged))
    args = settings.parse(settings.Settings(merged, {}, "cuda", []))
    model = gpt_config_from_args(args, model_config_cls=SFRModelConfig).transformer
    return {
        "data_parallel": args.data_parallel_size,
        "layers": [get_num_layers_to_build(model, pp_rank=i) for i in range(args.pipeline_model_parallel_size)],
        "fp8": [model.fp8, model.fp8_recipe, model.first_last_layers_bf16],
        "sequence_parallel": model.sequence_parallel,
        "per_token_loss": model.calculate_per_token_loss,
        "implementation": args.transformer_impl,
    }


if __name__ == "__main__":
    os.environ.update(RANK="0", WORLD_SIZE=sys.argv[1], CUDA_DEVICE_MAX_CONNECTIONS="1")
    try:
        print(json.dumps(validate(Path(sys.argv[2]), sys.argv[3:])))
    except ValueError as error:
        sys.exit(str(error))

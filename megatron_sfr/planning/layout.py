"""How a run is divided over GPUs, and what follows from it: stages, microbatches in flight, the pipeline's bubble."""

import argparse
from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """The parallel sizes of a run and its choices between memory and time."""

    world: int
    """GPUs."""
    tensor: int = 1
    pipeline: int = 1
    chunks: int = 1
    """Model chunks of each stage, above 1 with virtual pipeline stages."""
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1
    sequence_parallel: bool = False
    micro_batch: int = 1
    recompute: str = "none"
    """none, selective or full."""
    recompute_method: str = "uniform"
    recompute_layers: int = 1
    recompute_modules: tuple[str, ...] = ()
    """What selective recomputation computes again."""
    distributed_optimizer: bool = False
    loss_chunk: int = 4096
    stage_layers: tuple[int, ...] = (1,)
    """Decoder layers of each stage."""

    @property
    def data(self) -> int:
        """Replicas of the model."""
        return self.world // (self.tensor * self.pipeline * self.context)

    @property
    def shards(self) -> int:
        """Ranks over which the distributed optimizer divides the state of the parameters outside the experts."""
        return self.data * self.context if self.distributed_optimizer else 1

    @property
    def expert_shards(self) -> int:
        """The same for the experts."""
        ranks = self.world // (self.expert_tensor * self.expert * self.pipeline)
        return ranks if self.distributed_optimizer else 1

    def microbatches(self, global_batch: int) -> int:
        """Microbatches of a step on each pipeline."""
        return global_batch // (self.micro_batch * self.data)

    def in_flight(self, stage: int, microbatches: int) -> float:
        """Microbatches whose activations a stage keeps at most; parts of one where a stage has several chunks.

        Of Megatron's schedules: 1F1B, and its interleaved form.
        """
        behind = self.pipeline - stage - 1
        if self.chunks == 1:
            return min(microbatches, behind + 1)
        return min(microbatches * self.chunks, 2 * behind + (self.chunks - 1) * self.pipeline + 1) / self.chunks

    def bubble(self, microbatches: int) -> float:
        """Share of a step in which a stage waits for the others."""
        waits = self.pipeline - 1
        return waits / (self.chunks * microbatches + waits)

    def __str__(self) -> str:
        sizes = [("TP", self.tensor), ("PP", self.pipeline), ("VPP", self.chunks), ("CP", self.context)]
        sizes += [("EP", self.expert), ("DP", self.data)]
        shown = [f"{name} {size}" for name, size in sizes if size > 1 or name in ("TP", "PP", "DP")]
        more = f", micro batch {self.micro_batch}, recompute {self.recompute}"
        return " x ".join(shown) + more


def layout_of(args: argparse.Namespace) -> Layout:
    """The layout of a run's parsed arguments."""
    pipeline = args.pipeline_model_parallel_size
    return Layout(
        world=args.world_size,
        tensor=args.tensor_model_parallel_size,
        pipeline=pipeline,
        chunks=args.virtual_pipeline_model_parallel_size or 1,
        context=args.context_parallel_size,
        expert=args.expert_model_parallel_size,
        expert_tensor=args.expert_tensor_parallel_size or args.tensor_model_parallel_size,
        sequence_parallel=args.sequence_parallel,
        micro_batch=args.micro_batch_size,
        recompute=args.recompute_granularity or "none",
        recompute_method=args.recompute_method or "uniform",
        recompute_layers=args.recompute_num_layers or 1,
        recompute_modules=tuple(args.recompute_modules or ("core_attn",)),
        distributed_optimizer=args.use_distributed_optimizer,
        loss_chunk=args.loss_chunk_tokens,
        stage_layers=stage_layers(args),
    )


def stage_layers(args: argparse.Namespace) -> tuple[int, ...]:
    """Decoder layers of each stage, as Megatron divides them."""
    pipeline, layers = args.pipeline_model_parallel_size, args.num_layers
    first, last = args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers
    if first is None and last is None:
        with_embedding = bool(args.account_for_embedding_in_pipeline_split)
        with_loss = bool(args.account_for_loss_in_pipeline_split)
        each = (layers + with_embedding + with_loss) // pipeline
        sizes = [each] * pipeline
        sizes[0] -= with_embedding
        sizes[-1] -= with_loss
        return tuple(sizes)
    rest = pipeline - (first is not None) - (last is not None)
    middle = (layers - (first or 0) - (last or 0)) // max(1, rest)
    sizes = [middle] * pipeline
    sizes[0] = middle if first is None else first
    sizes[-1] = middle if last is None else last
    return tuple(sizes)

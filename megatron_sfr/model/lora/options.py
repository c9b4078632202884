"""Options of LoRA, and which linear layers of a decoder layer they adapt. Imports no Megatron: exports read it too."""

from dataclasses import dataclass
from fnmatch import fnmatchcase

from megatron_sfr.option_names import named

KINDS = {"qkv": "linear_qkv", "proj": "linear_proj", "fc1": "linear_fc1", "fc2": "linear_fc2"}
"""Names of the layers that can be adapted: queries, keys and values; the attention's output; gate and up; down."""

ADAPTER = ".adapter."
"""Part of the names of all adapters' parameters."""


@named("lora_")
@dataclass(frozen=True)
class LoRAOptions:
    """LoRA (arXiv 2106.09685): trains low-rank adapters of frozen linear layers, and the flow head."""

    rank: int | None = None
    """Rank of the adapters. The authors' YAML has 8. Default: no adapters, all weights are trained."""
    alpha: float = 16.0
    """The adapters' output is scaled by alpha / rank. Default 16: twice the rank of 8, as LLaMA-Factory does."""
    dropout: float = 0.0
    """Dropout of the adapters' input. Default 0. Above 0, results depend on the layout, as with attention_dropout."""
    targets: str = "all"
    """Layers to adapt, separated by commas: 'all' (default), or any of qkv (queries, keys, values), proj (output of the
    attention), fc1 (gate and up), fc2 (down), or patterns of Megatron's names inside a layer, such as
    self_attention.* or mlp.experts.*. Embeddings, output layer and routers are never adapted."""
    base: str | None = None
    """Megatron checkpoint with the frozen base weights, read at every start: checkpoints of the run hold only adapters
    and flow head. For a Hugging Face folder set --sfr-hf-load instead. Default: none."""

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"`rank` = {self.rank}: give at least 1, or leave it out to train all weights")
        if not self.alpha > 0:
            raise ValueError(f"`alpha` = {self.alpha}: give a number above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` = {self.dropout}: choose at least 0 and below 1")
        if not all(self.patterns):
            raise ValueError(f"`targets` = {self.targets!r}: give 'all', or names and patterns separated by commas")

    @property
    def patterns(self) -> tuple[str, ...]:
        """The targets as patterns of names inside a layer."""
        names = [name.strip() for name in self.targets.split(",")]
        names = [*KINDS] if names == ["all"] else names
        return tuple(f"*{KINDS[name]}" if name in KINDS else name for name in names)

    def adapts(self, name: str) -> bool:
        """Whether the layer with this name, such as `mlp.experts.linear_fc1`, is adapted."""
        return any(fnmatchcase(name, pattern) for pattern in self.patterns)

"""Shapes of published models for benchmarks (`--like`), and the operations of a training step."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A decoder with gated feed-forward layers and grouped queries; all sizes as in the model's config.json."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    kv_channels: int
    vocab: int
    seq: int

    def flops(self, *, causal: bool = True) -> int:
        """Floating-point operations of matrix products for one token, forward and backward.

        The backward pass counts twice the forward; recomputation, optimizer and embedding count nothing. causal: half
        of the S x S scores, which is what an attention kernel with a causal mask computes.
        """
        attention = self.heads * self.kv_channels
        projections = self.hidden * (2 * attention + 2 * self.groups * self.kv_channels)
        scores = 2 * self.seq * attention // (2 if causal else 1)
        layer = projections + 3 * self.hidden * self.ffn + scores
        return 3 * 2 * (self.layers * layer + self.hidden * self.vocab)

    def lora_flops(self, rank: int, *, causal: bool = True) -> int:
        """The same with LoRA on every linear layer of the decoder: no gradient of a frozen weight is computed.

        The first layer's queries, keys and values need no gradient of their input either, since nothing before them is
        trained.
        """
        attention, kv = self.heads * self.kv_channels, self.groups * self.kv_channels
        qkv = self.hidden * (attention + 2 * kv)
        frozen = self.layers * (qkv + attention * self.hidden + 3 * self.hidden * self.ffn) + self.hidden * self.vocab
        scores = self.layers * 2 * self.seq * attention // (2 if causal else 1)
        first = qkv + 3 * rank * self.hidden
        return 2 * 2 * frozen + 3 * 2 * (scores + self.lora_parameters(rank)) - 2 * first

    def lora_parameters(self, rank: int) -> int:
        """Parameters of the adapters: A and B of queries, keys, values, projection, gate, up and down."""
        attention, kv = self.heads * self.kv_channels, self.groups * self.kv_channels
        inputs = 3 * self.hidden + attention + 2 * self.hidden + self.ffn
        outputs = attention + 2 * kv + self.hidden + 2 * self.ffn + self.hidden
        return self.layers * rank * (inputs + outputs)

    @property
    def parameters(self) -> int:
        """All weights, with separate embedding and output layer."""
        attention, kv = self.heads * self.kv_channels, self.groups * self.kv_channels
        matrices = self.hidden * (2 * attention + 2 * kv) + 3 * self.hidden * self.ffn
        return self.layers * (matrices + 2 * self.hidden) + self.hidden + 2 * self.hidden * self.vocab


# Layers are cut: two models with their optimizers have to fit beside each other. Sequence: what fine-tuning uses.
SHAPES = {
    "qwen3-8b": Shape(2, 4096, 12288, 32, 8, 128, 151936, 4096),  # Qwen/Qwen3-8B, config.json: 36 layers
    "qwen2.5-1.5b": Shape(6, 1536, 8960, 12, 2, 128, 151936, 4096),  # Qwen/Qwen2.5-1.5B, config.json: 28 layers
}

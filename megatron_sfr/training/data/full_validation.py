"""A complete validation set for `full_validation`, in equal numbers of sequences for all data-parallel ranks.

Megatron's sampler (megatron-core 0.19.2) gives a rank one sequence at a time, and starts again at the first one where a
rank has fewer than the others, so that some sequences would count twice.
"""

from typing import Any

from megatron.core.datasets.utils import Split
from torch.utils.data import Dataset


class EvenlyDivided(Dataset):
    """The sequences of a validation dataset, and further ones without supervised tokens."""

    split = Split.valid  # upstream chooses the sampler by it

    def __init__(self, dataset: Any, ranks: int) -> None:
        self.dataset, self.size = dataset, -(-len(dataset) // ranks) * ranks

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index < len(self.dataset):
            return self.dataset[index]
        item = dict(self.dataset[0])
        return item | {name: 0 * item[name] for name in ("loss_mask", "anchor_weight") if name in item}

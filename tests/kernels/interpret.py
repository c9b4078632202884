"""A program: the fused kernels on CPU in Triton's interpreter, against `plain` in float64 and in the same dtype.

The interpreter must be chosen before Triton is imported, so this runs in a separate process. It prints as JSON, for
each group and case, the largest error of each quantity in units of its tolerance. T tokens, V columns.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from megatron_sfr.kernels import fused, plain
from tests.kernels.through import through, worst
from tests.objectives.token.token_cases import CLOSED_FORM_LOSSES

INF = float("inf")
LOSSES = tuple(name for name in CLOSED_FORM_LOSSES if name not in ("sed-128", "eaft-20"))
ONE_A_KERNEL = tuple({CLOSED_FORM_LOSSES[name].statistics: name for name in reversed(LOSSES)}.values())
"""One loss of each kind of statistics: with equal ones, losses run the same kernels with the same arguments."""


@dataclass(frozen=True)
class Case:
    """Logits and labels, in equal shards of which the first `size` columns are real."""

    name: str
    z_TV: Tensor
    size: int
    shards: int = 1
    losses: tuple[str, ...] = ONE_A_KERNEL


def random_logits(V: int, dtype: torch.dtype = torch.float32, scale: float = 3.0, T: int = 3) -> Tensor:
    return (scale * torch.randn(T, V, generator=torch.Generator().manual_seed(V))).to(dtype)


def labels(T: int, size: int) -> Tensor:
    """Spread over the columns; the first token is ignored."""
    y_T = torch.arange(T) * (size - 1) // max(T - 1, 1)
    y_T[0] = -100
    return y_T


def cases() -> Iterator[tuple[str, Case]]:
    for V in (1, 501, 2048, 5001):
        yield "odd vocabularies", Case(f"V={V}", random_logits(V), V, losses=LOSSES)
    yield "strided rows", Case("501 of 512 columns", random_logits(512), 501)
    yield "strided rows", Case("501 of 512 columns, bf16", random_logits(512, torch.bfloat16), 501)
    for shards in (2, 4):
        yield "shards", Case(f"{shards} shards", random_logits(1024), 1001, shards)
    yield "shards", Case("two of four shards without real columns", random_logits(1024), 500, 4)
    yield "shards", Case("shards of odd width", random_logits(1002, torch.bfloat16), 1002, 2)
    for dtype in (torch.bfloat16, torch.float16):
        yield "dtypes", Case(str(dtype), random_logits(2600, dtype), 2600)
    yield "dtypes", Case("float64, left to the twin", random_logits(100, torch.float64), 100, 2)
    yield "extremes", Case("logits at +-1e4", random_logits(3000).sign() * 1e4 + random_logits(3000), 3000, 2)
    falling = torch.linspace(1e4, -1e4, 3000)
    yield "extremes", Case("falling and rising", torch.stack([falling, falling, falling.flip(0)]), 3000)
    masked = random_logits(4000)
    masked[:, 1:1999] = masked[:, 2001:2600] = -INF  # the third quarter starts with only -inf
    masked[:, 1000:2000] = -INF
    yield "extremes", Case("-inf, a whole shard of it too", _with_labels(masked), 4000, 4)
    least = random_logits(3000)
    least[:, :2500] = torch.finfo(torch.float32).min
    yield "extremes", Case("masked with the least number", _with_labels(least), 3000)
    few = torch.randint(0, 4, (3, 2500), generator=torch.Generator().manual_seed(0)).float()
    yield "ties", Case("four values", few, 2500, 2, ("sed", "sed-10", "sed-128", "eaft-20"))
    yield "ties", Case("no ties", random_logits(2500), 2500, 1, ("sed-128",))
    yield "ties", Case("one value", torch.zeros(3, 300), 300, 1, ("sed", "sed-10", "sed-128"))
    yield "ties", Case("fewer columns than wanted", random_logits(50), 50, 2, ("sed", "sed-10", "sed-128"))


def _with_labels(z_TV: Tensor) -> Tensor:
    """Makes the labels' logits finite: masking never removes the label."""
    T, V = z_TV.shape
    return z_TV.scatter(1, labels(T, V).clamp(min=0)[:, None], 1.0)


def compare(case: Case, name: str) -> dict[str, dict[str, float]]:
    y_T, loss = labels(len(case.z_TV), case.size), CLOSED_FORM_LOSSES[name]
    exact = through(plain, case.z_TV.double(), y_T, loss, size=case.size, shards=1)
    ours, twin = (
        through(kernels, case.z_TV, y_T, loss, size=case.size, shards=case.shards) for kernels in (fused, plain)
    )
    cut = case.z_TV.dtype == torch.bfloat16  # Triton 3.7's interpreter truncates fp32 to bf16; compiled code rounds it
    return {
        f"{case.name}, {name}": worst(ours, exact, truncates=cut),
        f"{case.name}, {name}, plain": worst(twin, exact),
    }


def ignored_rows_are_not_read() -> dict[str, float]:
    """Both modules write zeros where both coefficients are 0, even over NaN and infinity."""
    actual = {}
    for module in (fused, plain):
        z_TV = torch.full((2, 2500), torch.nan)
        z_TV[1] = INF
        zero_T = torch.zeros(2)
        module.write_gradient(z_TV, torch.tensor([-1, -1]), zero_T, zero_T, zero_T, zero_T, beta=0.7, c=0.1)
        actual[module.__name__] = float(z_TV.count_nonzero())
    return actual


def main() -> None:
    actual: dict[str, dict[str, dict[str, float]]] = {"ignored rows": {"zeros": ignored_rows_are_not_read()}}
    for group, case in cases():
        for name in case.losses:
            actual.setdefault(group, {}).update(compare(case, name))
    print(json.dumps(actual))


if __name__ == "__main__":
    main()

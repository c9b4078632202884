"""Optimizer state is cut out of the gathered buffer by the offsets that it has there."""

from megatron_sfr.runtime import resharding


def test_offsets_lose_the_padding_of_earlier_buckets_and_no_other() -> None:
    # Buckets of 100, 130 and 7 elements, padded to multiples of 128; gaps within a bucket stay.
    padded = {"a": (0, 60, 0), "b": (64, 100, 0), "c": (128, 258, 1), "d": (384, 391, 2)}
    moved = resharding.without_padding(padded, starts=[0, 128, 384], unpadded=[100, 130, 7])
    assert moved == {"a": (0, 60, 0), "b": (64, 100, 0), "c": (100, 230, 1), "d": (230, 237, 2)}

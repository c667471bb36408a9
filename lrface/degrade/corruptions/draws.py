"""Random numbers that are a function of an image's seed alone: counter-based, the same on every device.

A field is drawn for all images of a batch at once, yet what an image gets depends neither on its batch nor on its
place in it. That makes an image of an evaluation set replayable on its own.
"""

import zlib

import torch
from torch import Tensor

_COUNTERS: dict[tuple[int, torch.device], Tensor] = {}


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


def _finalise64(state: Tensor) -> Tensor:
    """Mix int64 values (the finaliser of splitmix64; shifts made logical by masks)."""
    state = (state ^ ((state >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9, 64)
    state = (state ^ ((state >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB, 64)
    return state ^ ((state >> 31) & ((1 << 33) - 1))


class Draws:
    """The random numbers of n images.

    Args:
        seeds: int64 [n], on the device of the images.
    """

    def __init__(self, seeds: Tensor):
        self.seeds = seeds
        self.device = seeds.device

    def __getitem__(self, part: slice) -> "Draws":
        return Draws(self.seeds[part])

    def bits(self, stream: str, *shape: int) -> Tensor:
        """int32 [n, *shape], all 32 bits random. Different names of ``stream`` give independent numbers."""
        count = 1
        for extent in shape:
            count *= extent
        salt = _signed(zlib.crc32(stream.encode()) * 0x9E3779B97F4A7C15 % (1 << 64), 64)
        keys = _finalise64(_finalise64(self.seeds + salt) + salt)
        first, second = keys.to(torch.int32)[:, None], (keys >> 32).to(torch.int32)[:, None]
        counter = _COUNTERS.get((count, self.device))
        if counter is None:
            if len(_COUNTERS) > 16:
                _COUNTERS.clear()
            counter = _COUNTERS[count, self.device] = torch.arange(
                count, dtype=torch.int32, device=self.device
            )
        # Two rounds of multiply and xor-shift (constants of lowbias32), with half of the key between them. Shifts of
        # signed numbers copy the sign: the masks take it away.
        state = counter ^ first
        state ^= (state >> 16).bitwise_and_(0xFFFF)
        state *= 0x7FEB352D
        state += second
        state ^= (state >> 15).bitwise_and_(0x1FFFF)
        state *= _signed(0x846CA68B, 32)
        state ^= (state >> 16).bitwise_and_(0xFFFF)
        return state.view(len(self.seeds), *shape)

    def uniform(self, stream: str, *shape: int) -> Tensor:
        """float32 [n, *shape], uniform in (0, 1)."""
        high = self.bits(stream, *shape).bitwise_right_shift_(8)
        return high.float().add_(0.5 + (1 << 23)).mul_(2.0**-24)

    def normal(self, stream: str, *shape: int) -> Tensor:
        """float32 [n, *shape], standard normal, cut beyond 5.3 standard deviations."""
        values = self.bits(stream, *shape).float()
        return values.mul_((1 - 2.0**-23) * 2.0**-31).erfinv_().mul_(2.0**0.5)

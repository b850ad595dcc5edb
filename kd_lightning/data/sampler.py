"""The order of samples: a function of (seed, epoch), divided equally between the ranks."""

from collections.abc import Iterator, Sized
from typing import cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler


class EpochSampler(DistributedSampler[tuple[int, int]]):
    """Yields ``(position, epoch)`` for one rank.

    In training each global batch is shuffled from (seed, epoch), rank r holds its contiguous rows [r*B, (r+1)*B), and
    samples that do not fill a global batch are left out of the epoch. In evaluation (epoch -1) every sample is yielded
    once, by one rank: nothing is padded, so nothing is counted twice. Lightning keeps a subclass of
    ``DistributedSampler`` as it is and calls ``set_epoch``.

    Args:
        samples: Anything with a length.
        batch_size: Batch size of one rank, B.
        training: Shuffle the samples.
        seed: Seed of the order.
        num_replicas: Number of ranks.
        rank: Number of this rank.
        steps: Batches in an epoch, if each epoch takes the next rows of one stream of permutations, in which nothing is
            left out, so that all samples are seen equally often however many they are; ``None`` if each epoch is a
            permutation of its own.
        balanced: Class of each sample, -1 where unlabelled, if an epoch of as many samples shows each class equally
            often: samples of rare classes several times, and of frequent ones a part, another one in each epoch.
            Unlabelled samples are shown once.

    Example:
        >>> list(EpochSampler(range(5), batch_size=2, training=False, num_replicas=2, rank=1))
        [(2, -1), (3, -1), (4, -1)]
    """

    def __init__(
        self,
        samples: Sized,
        *,
        batch_size: int,
        training: bool,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        steps: int | None = None,
        balanced: Tensor | None = None,
    ) -> None:
        # torch wants a Dataset, and uses only its length
        super().__init__(
            cast("Dataset[object]", samples), num_replicas, rank, shuffle=training, seed=seed, drop_last=training
        )
        self.count = len(samples)
        self.batch_size = batch_size
        self.training = training
        self.steps = steps
        self.balanced = balanced
        self.first = (-1, 0)
        """An epoch, and the number of its batches that are skipped because they were taken before."""

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch if self.training else -1
        return iter([(position, epoch) for position in self.positions().tolist()])

    def positions(self) -> Tensor:
        """Return the positions that this rank sees in the epoch, int64, without those that were taken before."""
        return self._training() if self.training else self._evaluation()

    def __len__(self) -> int:
        if self.training:
            steps = self.count // (self.batch_size * self.num_replicas) if self.steps is None else self.steps
            return steps * self.batch_size
        return len(self._evaluation())

    def _training(self) -> Tensor:
        order = self._order() if self.steps is None else self._next_rows()
        batches = order[: len(self) * self.num_replicas].view(-1, self.num_replicas, self.batch_size)
        taken = self.first[1] if self.first[0] == self.epoch else 0
        return batches[taken:, self.rank].flatten()

    def _order(self) -> Tensor:
        if self.balanced is None:
            return self._permutation(self.epoch)
        generator = self._generator(self.epoch)
        members = [(self.balanced == label).nonzero().flatten() for label in self.balanced.unique() if label >= 0]
        unlabelled = (self.balanced < 0).nonzero().flatten()
        each, rest = divmod(self.count - len(unlabelled), max(len(members), 1))
        chosen = [unlabelled]
        for place, number in enumerate(torch.randperm(len(members), generator=generator).tolist()):
            shown, count = members[number], each + (place < rest)
            passes = [torch.randperm(len(shown), generator=generator) for _ in range(-(-count // len(shown)))]
            chosen += [shown[torch.cat(passes)[:count]]] if count else []
        return torch.cat(chosen)[torch.randperm(self.count, generator=generator)]

    def _next_rows(self) -> Tensor:
        rows = len(self) * self.num_replicas
        first, skipped = divmod(self.epoch * rows, self.count)
        passes = range(first, first + -(-(skipped + rows) // self.count))
        # below 0, so that two sets of one length and seed, a source and its target, are not shuffled alike
        return torch.cat([self._permutation(-1 - number) for number in passes])[skipped : skipped + rows]

    def _permutation(self, number: int) -> Tensor:
        return torch.randperm(self.count, generator=self._generator(number))

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**63)

    def _evaluation(self) -> Tensor:
        start, end = (self.count * rank // self.num_replicas for rank in (self.rank, self.rank + 1))
        return torch.arange(start, end)

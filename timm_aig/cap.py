"""Cap: holds each image to a number of MACs, while it runs, the least decisive gates closed first."""
import threading
from bisect import bisect_right
from typing import List, Sequence

__all__ = ['Cap']


class _Pass(threading.local):
    """The forward pass under way in this thread: what its samples may still spend, MACs, and whose turn is next."""

    def __init__(self) -> None:
        self.left: List[int] = []
        self.next = 0


_pass = _Pass()


class Cap:
    """One gate's part in a cap on the MACs of each image.

    The gates answer in turn, and none knows what the later ones will say. An open gate is closed if its block, and the
    later blocks whose gates are likely to be more decisive, would take more than the image has left. How likely, the
    execution rates of a table of budgets tell. So no image ever exceeds the cap and no block runs twice; that the least
    decisive gates close first holds in expectation.
    """

    def __init__(
            self,
            index: int,
            budget: int,
            macs: int,
            margins: Sequence[float],
            reserve: Sequence[float],
    ) -> None:
        """
        Args:
            index: Of the gate among those of its model, in the order they run.
            budget: MACs that each image may spend on gated blocks.
            macs: MACs of the gate's block.
            margins: Open minus closed logits, ascending, at which `reserve` is known; linear in between.
            reserve: MACs to keep for later blocks whose gates may open with a larger margin.
        """
        self.index = index
        self.budget = budget
        self.macs = macs
        self.margins = list(margins)
        self.reserve = list(reserve)

    def answers(self, open: Sequence[float], margins: Sequence[float]) -> List[bool]:
        """Which of the samples run after all.

        Args:
            open: The gate's own answers [B].
            margins: Its open minus closed logits [B], without offset.

        Raises:
            RuntimeError: The gates before it did not answer just before, for as many samples.
        """
        if self.index == 0:
            _pass.left, _pass.next = [self.budget] * len(open), 0
        if (self.index, len(open)) != (_pass.next, len(_pass.left)):
            raise RuntimeError('a cap on the MACs of each image needs whole forward passes, in which each gated block '
                               'runs once and in turn: no stages by themselves, no gradient checkpointing.')
        _pass.next += 1
        left, answers = _pass.left, []
        for row, (answer, margin) in enumerate(zip(open, margins)):
            runs = bool(answer) and self.macs + self._reserve(margin) <= left[row]
            left[row] -= runs * self.macs
            answers.append(runs)
        return answers

    def _reserve(self, margin: float) -> float:
        at = bisect_right(self.margins, margin)
        if at in (0, len(self.margins)) or margin != margin:
            return self.reserve[0 if at == 0 else -1]
        low, high = self.margins[at - 1], self.margins[at]
        share = (margin - low) / (high - low)
        return self.reserve[at - 1] * (1 - share) + self.reserve[at] * share

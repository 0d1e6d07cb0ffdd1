"""Proposed tokens of which a given share is right, for tests of speculation."""

import random


class Replay:
    """Proposes the ids that a run without proposals gave, each of them right with a given probability."""

    def __init__(self, results, share: float, seed: int = 1):
        self.true, self.share, self.random = [result.token_ids for result in results], share, random.Random(seed)

    def propose(self, wanted):
        found = {}
        for sequence, count in wanted.items():
            at = len(sequence.generated)
            ids = self.true[sequence.id % len(self.true)][at : at + count]
            found[sequence.id] = tuple(id if self.random.random() < self.share else id % 100 + 1 for id in ids)
        return found

    def forget(self, id):
        pass

    def close(self):
        pass

"""The proof at the end: each worker's weights and tokens against the trainer's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import attrs

from weight_transfer.values.events import Version

if TYPE_CHECKING:
    import torch

    from weight_transfer.demo.workers import Worker


@attrs.frozen(kw_only=True)
class Verdict:
    """What one worker has, compared with the trainer; ``str()`` is the sentence.

    Attributes:
        worker: its name.
        version: that it serves, and ``wanted``: that the trainer sent last.
        sha256: of its weights, and ``expected``: of the trainer's.
        tokens: that it generates, and ``reference``: that the trainer generates from the same prompt.
    """

    worker: str
    version: Version | None
    wanted: Version
    sha256: str
    expected: str
    tokens: list[int]
    reference: list[int]

    @property
    def holds(self) -> bool:
        """Whether all is the same."""
        return (self.version, self.sha256, self.tokens) == (self.wanted, self.expected, self.reference)

    def __str__(self) -> str:
        version = f"version {self.version}"
        if self.version != self.wanted:
            version += f" instead of {self.wanted}"
        weights = f"weights bit-identical to the trainer's (sha256 {self.sha256[:16]}...)"
        if self.sha256 != self.expected:
            weights = f"weights DIFFER from the trainer's (sha256 {self.sha256[:16]}... and {self.expected[:16]}...)"
        tokens = f"generates the same {len(self.reference)} tokens"
        if self.tokens != self.reference:
            same = [mine == theirs for mine, theirs in zip(self.tokens, self.reference, strict=False)]
            tokens = f"generates OTHER tokens from number {[*same, False].index(False)} on"
        return f"{self.worker}: {version}, {weights}, {tokens}"


def prove(model: torch.nn.Module, workers: Sequence[Worker], version: Version, count: int) -> list[Verdict]:
    """Compare every worker with the trainer's model. Both sides generate with one CPU thread, so in the same order."""
    import torch

    from weight_transfer.demo.corpus import encode, prompt_of
    from weight_transfer.demo.model import fingerprint, generate

    torch.set_num_threads(1)
    expected = fingerprint(model)
    verdicts = []
    for index, worker in enumerate(workers):
        prompt = prompt_of(index)
        found = worker.fingerprint()
        verdicts.append(
            Verdict(
                worker=worker.name,
                version=found["version"],
                wanted=version,
                sha256=found["sha256"],
                expected=expected,
                tokens=worker.generate(prompt, count)["tokens"],
                reference=generate(model, encode(prompt), count),
            )
        )
    return verdicts

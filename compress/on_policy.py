"""Texts that the student writes itself, so that the teacher marks the mistakes that it will make.

Shapes: B examples in a batch, T tokens, R tokens that are predicted.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from potstill.compress.lesson import Lesson
from potstill.validate.examples import IGNORED
from potstill.validate.task import Model, quiet_transformers

BEGUN = (1 / 8, 1 / 2)  # of a text is given to be gone on with, drawn between


class Writer:
    """Replaces some batches by what the student writes to the same beginnings.

    On-policy distillation (Agarwal 2023, "On-policy distillation of language models: learning from self-generated
    mistakes", algorithm 1): the share λ of batches is sampled from the student at temperature 1, the teacher gives its
    distribution on each token of these, and no gradient passes through the sampling. They have no labels. An answer is
    written to its prompt, a text to its first part; each ends where the student ends it, or is as long as it was.
    """

    def __init__(self, student: Model, teachers: Sequence[Model], lesson: Lesson, share: float) -> None:
        """`share` is λ, above 0 and at most 1."""
        self._student, self._teachers, self._lesson, self._share = student, teachers, lesson, share

    def __call__(self, batch: dict[str, Any], step: int, device: torch.device) -> dict[str, Any]:
        """A batch of the collator, or one that the student wrote in its place; the draw depends on seed and step."""
        rng = np.random.default_rng((self._lesson.seed, step))
        if rng.random() >= self._share:
            return batch
        begun = self._beginnings(batch["items"], rng)
        written = self.write([start for start, _ in begun], [length for _, length in begun], device)
        rows = {"tokens": written}
        tensors = self._student.tensors(rows, device)
        new = [np.arange(1, len(one)) >= len(start) for one, (start, _) in zip(written, begun, strict=True)]
        keep = torch.from_numpy(np.concatenate(new)).to(device)
        return {
            "student": tensors,
            "teachers": [
                tensors if one.encode is self._student.encode else one.tensors(rows, device) for one in self._teachers
            ],
            "taught": None, "labels": torch.full((len(keep),), IGNORED, device=device), "keep": keep,
            "rows": np.zeros(0, dtype=np.int64), "part": "written", "items": batch["items"],
            "met": None,
        }  # fmt: skip

    def _beginnings(self, items: Sequence[int], rng: np.random.Generator) -> list[tuple[list[int], int]]:
        """The first tokens of some examples, and how many tokens each example has."""
        examples, found = self._lesson.train, []
        for i, tokens in zip(items, examples.rows(items)["tokens"], strict=True):
            read = 1 + int((examples.labels_of([i]) != IGNORED).argmax())
            at = read if read > 1 else max(1, round(len(tokens) * rng.uniform(*BEGUN)))
            found.append((list(tokens[: min(at, len(tokens) - 1)]), len(tokens)))
        return found

    def write(self, beginnings: Sequence[list[int]], lengths: Sequence[int], device: torch.device) -> list[list[int]]:
        """Each beginning with at least one token more, up to its length or the token that ends texts."""
        model: Any = self._student.core
        end = model.generation_config.eos_token_id
        ends = set(end if isinstance(end, list) else [end])
        width = max(map(len, beginnings))
        ids = torch.zeros((len(beginnings), width), dtype=torch.int64)
        for row, one in zip(ids, beginnings, strict=True):
            row[width - len(one) :] = torch.tensor(one)
        mask = (torch.arange(width) >= width - torch.tensor([len(one) for one in beginnings])[:, None]).long()
        more = max(length - len(one) for one, length in zip(beginnings, lengths, strict=True))
        was = model.training
        model.eval()
        try:
            with torch.no_grad(), quiet_transformers():
                given: Tensor = model.generate(
                    ids.to(device), attention_mask=mask.to(device), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                    max_new_tokens=more, pad_token_id=0,
                )  # fmt: skip
        finally:
            model.train(was)
        found = []
        for row, one, length in zip(given[:, width:].tolist(), beginnings, lengths, strict=True):
            stop = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
            found.append(one + row[: min(stop, length - len(one))])
        return found

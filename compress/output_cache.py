"""A teacher's outputs on disk: one file of fixed records, memory-mapped, safe to share and to be cut off.

Shapes: N rows, C outputs of each, K of them kept.
"""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potstill.validate.errors import InputError
from potstill.validate.files import read_json, take_space, write_json

MOST_WHOLE = 1024  # classes that are kept whole; of more, the TOP most likely and the mass of the others
TOP = 256
LEAST = float(torch.finfo(torch.float16).min)  # stands for the logarithm of 0
META = "cache.json"


class OutputCache:
    """Outputs by row number.

    Each record starts with a checksum of its row number and content. So a record that was never written, or only
    in part, is no record; several processes may write at once, and a process that is killed spoils nothing.

    float16 values: of classes the log-probabilities, to about 0.05 % of each; of embeddings the values themselves. Of
    more than `MOST_WHOLE` classes, the `TOP` largest log-probabilities, their places, and what the others hold
    together, which comes back spread evenly over them.
    """

    def __init__(self, folder: Path, rows: int, width: int, classes: bool) -> None:
        """Open the file in `folder`, or make it, with its whole size taken on the disk at once.

        Args:
            folder: named by the key of all that decides the outputs.
            rows: N.
            width: C.
            classes: whether the outputs are logits of classes, of which only differences count.

        Raises:
            InputError: the folder holds outputs of another shape.
            OSError: the disk is full.
        """
        self.kept = TOP if classes and width > MOST_WHOLE else width
        self._width, self._classes = width, classes
        fields: list[Any] = [("check", "<u4"), ("values", "<f2", (self.kept,))]
        if self.kept < width:
            fields += [("rest", "<f4"), ("places", "<u4", (self.kept,))]
        self._record = np.dtype(fields)
        self.bytes_per_row = self._record.itemsize
        folder.mkdir(parents=True, exist_ok=True)
        shape = {"rows": rows, "width": width, "classes": classes, "bytes_per_row": self.bytes_per_row}
        path = folder / "outputs.bin"
        if not (folder / META).is_file():
            take_space(path, rows * self.bytes_per_row)
            write_json(folder / META, shape)
        if read_json(folder / META) != shape:
            raise InputError(
                f"{folder} holds outputs of another shape ({json.dumps(read_json(folder / META))}); remove it"
            )
        self._file = np.memmap(path, dtype=self._record, mode="r+", shape=(rows,))

    def read(self, rows: Sequence[int] | NDArray[np.int64]) -> Tensor | None:
        """The outputs (R, C) of some rows in float32; None when one of them is not there."""
        records = self._file[np.asarray(rows)]
        if not (records["check"] == _checks(records, rows)).all():
            return None
        values = records["values"].astype(np.float32)
        return torch.from_numpy(values if self.kept == self._width else self._spread(records, values))

    def write(self, rows: Sequence[int] | NDArray[np.int64], outputs: Tensor) -> Tensor:
        """Keep outputs (R, C); they come back as `read` will give them.

        Raises:
            InputError: a value that float16 cannot hold.
        """
        records = np.zeros(len(outputs), dtype=self._record)
        values = torch.log_softmax(outputs.float(), dim=1) if self._classes else outputs.float()
        if self.kept < self._width:
            top = values.topk(self.kept, dim=1)
            others = values.scatter(1, top.indices, -torch.inf)
            records["rest"] = others.logsumexp(dim=1).clamp(min=LEAST).cpu().numpy()
            records["places"] = top.indices.cpu().numpy()
            values = top.values
        if self._classes:
            values = values.clamp(min=LEAST)
        with np.errstate(over="ignore"):  # looked for below
            records["values"] = values.cpu().numpy().astype(np.float16)
        if not np.isfinite(records["values"]).all():
            raise InputError("the teacher's outputs do not fit float16, or are not finite; say cache: false")
        records["check"] = _checks(records, rows)
        self._file[np.asarray(rows)] = records
        whole = records["values"].astype(np.float32)
        return torch.from_numpy(whole if self.kept == self._width else self._spread(records, whole))

    def filled(self) -> int:
        """How many rows are there."""
        step = 65536
        starts = range(0, len(self._file), step)
        return sum(self._filled(start, min(start + step, len(self._file))) for start in starts)

    def _filled(self, start: int, end: int) -> int:
        records = self._file[start:end]
        return int((records["check"] == _checks(records, range(start, end))).sum())

    def _spread(self, records: NDArray[Any], values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Dense log-probabilities from the largest and the mass of the others."""
        each = records["rest"] - np.log(self._width - self.kept)
        dense = np.repeat(each[:, None].astype(np.float32), self._width, axis=1)
        np.put_along_axis(dense, records["places"].astype(np.int64), values, axis=1)
        return dense


def _checks(records: NDArray[Any], rows: Sequence[int] | NDArray[np.int64]) -> NDArray[np.uint32]:
    """The checksum of each record: of its row's number and all its bytes but the checksum; never 0."""
    found = np.empty(len(records), dtype=np.uint32)
    size = records.dtype.itemsize
    data = np.ascontiguousarray(records).tobytes()
    for i, row in enumerate(rows):
        found[i] = zlib.crc32(data[i * size + 4 : (i + 1) * size], int(row) + 1) or 1
    return found

"""LMDB: one value a row, integer keys; one read transaction, buffers, no readahead, ``getmulti``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import lmdb
import numpy as np

from read_peers import Case, Rows, Ways

ZSTD = False


def write(arrays: Mapping[str, np.ndarray], folder: Path, zstd: bool) -> None:
    rows = len(next(iter(arrays.values())))
    room = 4 * sum(values.nbytes for values in arrays.values()) + rows * 256 + (64 << 20)
    with lmdb.open(str(folder), map_size=room, sync=False) as env, env.begin(write=True) as transaction:
        records = (
            (i.to_bytes(8, "big"), b"".join(values[i].tobytes() for values in arrays.values()))
            for i in range(rows)
        )
        transaction.cursor().putmulti(records, append=True)
    shapes = {name: np.array(values.shape[1:]) for name, values in arrays.items()}
    dtypes = {f"{name}.dtype": np.array(values.dtype.str) for name, values in arrays.items()}
    np.savez(folder / "shapes.npz", allow_pickle=False, **shapes, **dtypes)


@contextmanager
def opened(folder: Path, case: Case) -> Iterator[Ways]:
    with np.load(folder / "shapes.npz") as known:
        row = np.dtype([(n, str(known[f"{n}.dtype"]), tuple(known[n].tolist())) for n in case.arrays])
    out = np.empty(case.batch, row)
    bytes_of_rows = out.view(np.uint8).reshape(case.batch, -1)
    with (
        lmdb.open(
            str(folder), readonly=True, lock=False, readahead=False, meminit=False, max_spare_txns=1
        ) as env,
        env.begin(buffers=True) as transaction,
    ):

        def multi(rows: np.ndarray) -> Rows:
            keys = rows.astype(">u8").tobytes()
            asked = [keys[i : i + 8] for i in range(0, len(keys), 8)]
            found = b"".join([value for _, value in transaction.cursor().getmulti(asked)])
            values = np.frombuffer(found, row)
            return [values[name] for name in case.arrays]

        def get(rows: np.ndarray) -> Rows:
            keys = rows.astype(">u8").tobytes()
            for place in range(len(rows)):
                value = transaction.get(keys[8 * place : 8 * place + 8])
                bytes_of_rows[place] = np.frombuffer(value, np.uint8)
            return [out[name][: len(rows)] for name in case.arrays]

        yield Ways({"getmulti": multi} if case.name == "rows" else {"get": get})

"""What an enemy writes into a cache: bytes, numbers, JSON values, frames and files of a kind that no build writes.

Every function takes a ``random.Random`` that hypothesis draws, and a :class:`Tree`. Checksums and digests are made right
again more often than not: what is whole by its digests comes furthest into a reader.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import zstd  # pyright: ignore[reportAttributeAccessIssue]

from softcache.hostile import sign
from softcache.spec import digest

MANIFEST = "softcache.json"


class Tree:
    """A folder of files that is changed and put back."""

    def __init__(self, root: Path):
        self.root = root
        self.whole = {
            p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()
        }
        self.names = list(self.whole)
        self._touched: set[str] = set()

    def get(self, name: str) -> bytes:
        path = self.root / name
        return path.read_bytes() if path.is_file() else b""

    def put(self, name: str, data: bytes) -> None:
        self._clear(name)
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_bytes(data)

    def remove(self, name: str) -> None:
        self._clear(name)

    def link(self, name: str, to: str | Path) -> None:
        self._clear(name)
        (self.root / name).symlink_to(to)

    def folder(self, name: str) -> None:
        self._clear(name)
        (self.root / name).mkdir()

    def pipe(self, name: str) -> None:
        self._clear(name)
        os.mkfifo(self.root / name)

    def moved(self, folder: str, to: Path) -> None:
        """Move a folder away and put a link in its place."""
        self._touched.add(folder)
        shutil.rmtree(to, ignore_errors=True)
        (self.root / folder).rename(to)
        (self.root / folder).symlink_to(to)

    def _clear(self, name: str) -> None:
        self._touched.add(name)
        path = self.root / name
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path)

    def restore(self) -> None:
        for name in self._touched.copy():
            self._clear(name)
        for name in self._touched:
            for file, data in self.whole.items():
                if file == name or file.startswith(f"{name}/"):
                    (self.root / file).parent.mkdir(parents=True, exist_ok=True)
                    (self.root / file).write_bytes(data)
        self._touched.clear()


Mutation = Callable[[Random, Tree], None]

# -- bytes -------------------------------------------------------------------------------------------------


def twist_bytes(random: Random, data: bytes) -> bytes:
    """Flipped, cut, lengthened, doubled, zeroed, or overwritten here and there."""
    raw, way = bytearray(data), random.randrange(8)
    at = random.randrange(len(raw)) if raw else 0
    to = at + random.randrange(1, 64)
    if way == 0 and raw:
        raw[at] ^= 1 << random.randrange(8)
    elif way == 1:
        del raw[at:]
    elif way == 2:
        del raw[at:to]
    elif way == 3:
        raw[at:at] = raw[at:to] or b"\0"
    elif way == 4:
        raw[at:to] = bytes(to - at)
    elif way == 5:
        raw[at:to] = b"\xff" * (to - at)
    elif way == 6:
        raw += bytes(random.choice((1, 4, 16, 1 << 12)))
    else:
        raw[at : at + 4] = random.getrandbits(32).to_bytes(4, "little")
    return bytes(raw)


def any_file(random: Random, tree: Tree) -> None:
    name = random.choice(tree.names)
    tree.put(name, twist_bytes(random, tree.get(name)))


def no_file(random: Random, tree: Tree) -> None:
    """Missing, a folder, a pipe, a link to a secret, the place of another, or one too many."""
    name, way = random.choice(tree.names), random.randrange(8)
    if way == 0:
        tree.remove(name)
    elif way == 1:
        tree.folder(name)
    elif way == 2:
        tree.pipe(name)
    elif way == 3:
        tree.link(name, random.choice(["/etc/passwd", "/dev/zero", "/proc/self/mem", name, "../../secret"]))
    elif way == 4:
        tree.put(name, tree.get(random.choice(tree.names)))
    elif way == 5:
        tree.put(
            random.choice(["x", "a/b", "targets/x", "ids/c.0", "parts/1/identity.json", "\x1b[2J", "ä\n"]),
            b"{}",
        )
    elif way == 6:
        folder = name.split("/")[0]
        if folder != name:
            tree.moved(folder, tree.root.with_name("away"))
    else:
        tree.put(name, b"")


def no_such_file(random: Random, tree: Tree) -> None:
    """Missing, a folder, a pipe, or empty. What a user names may be a link."""
    name = random.choice(tree.names)
    change = random.choice([tree.remove, tree.folder, tree.pipe, lambda name: tree.put(name, b"")])
    change(name)


# -- JSON --------------------------------------------------------------------------------------------------

NUMBERS = [
    0, 1, -1, 2, 3, 7, 127, 128, 255, 256, 4095, 32767, -32768, 65536, 2**24, 2**31 - 1, 2**31, 2**40, 2**48, 2**63 - 1,
    2**63, 2**64, -(2**63), 10**30, 10**4000, 0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"),
]  # fmt: skip
WORDS = [
    "", "a", "x" * 300, "x" * 70_000, "../x", "/etc/passwd", "a/b", ".", "..", "\0", "\x1b[2J", "a\nb", "\u202e", "ß", "é",
    "os.system", "builtins:eval", "__import__('os').system('touch /tmp/owned')", "float64", "object", "<U4", "uint8",
    "int64", "f16", "int8", "full(u8)", "full(f16)", "topk(1)", "topk(3, at=(1, 2))", "argmax", "all", "top(2)",
    "pool(2)|int8",
    "pool(" * 900 + "1", "(" * 4000, "-" * 4000 + "1", "f16" + "|f16" * 900, "attention(tau=1)", "attention(tau=1e-300)",
    "top(2, background=99999999)", "top(99999999999)", "logits", "feature_map", "embedding", "detections", "queries",
    "crop(8)", "identity", "8: crop(4); flip", "random_resized_crop(8)|flip",
]  # fmt: skip


def nasty(random: Random) -> Any:
    way = random.randrange(10)
    if way < 4:
        return random.choice(NUMBERS)
    if way < 7:
        return random.choice(WORDS)
    return random.choice(
        [
            None, True, False, [], {}, [[]], [None], {"": {}}, [0] * 3, [1] * 100, [0] * 50_000, ["a"] * 50_000,
            [2**24] * 3, {str(i): i for i in range(2000)}, _deep(60), _deep(400),
        ]
    )  # fmt: skip


def _deep(levels: int) -> Any:
    value: Any = 1
    for i in range(levels):
        value = [value] if i % 2 else {"a": value}
    return value


def nodes(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a JSON value."""
    pairs = (
        list(value.items())
        if isinstance(value, dict)
        else list(enumerate(value))
        if isinstance(value, list)
        else []
    )
    return [(value, key) for key, _ in pairs] + [node for _, inner in pairs for node in nodes(inner)]


def twist_json(random: Random, value: Any) -> None:
    """One to three places of a JSON value become something else."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        known = nodes(value)
        if not known:
            return
        place, key = random.choice(known)
        old, way = place[key], random.randrange(9)
        if way == 0 and isinstance(place, dict):
            del place[key]
        elif way == 1 and isinstance(place, dict):
            place[random.choice(WORDS)] = place.pop(key)
        elif way == 2 and isinstance(place, dict):
            place[random.choice(WORDS)] = copy.deepcopy(old)
        elif way == 3:
            other, name = random.choice(known)
            place[key] = copy.deepcopy(other[name])
        elif way == 4 and isinstance(old, int | float) and not isinstance(old, bool):
            place[key] = random.choice(
                [old + 1, old - 1, -old, old * 2, old // 2 if old == old else 0, float(old)]
            )
        elif way == 5 and isinstance(old, list):
            old.append(copy.deepcopy(old[-1]) if old else nasty(random))
        elif way == 6 and isinstance(old, list) and old:
            del old[random.randrange(len(old))]
        else:
            place[key] = nasty(random)


def dumped(value: Any) -> bytes:
    """As canonical as it can be: half a surrogate pair, NaN and all."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode("utf-8", "surrogatepass") + b"\n"


def manifest(random: Random, tree: Tree) -> None:
    value = json.loads(tree.get(MANIFEST))
    if "identity" in value and random.random() < 0.6:
        twist_json(random, value["identity"])
    else:
        twist_json(random, value)
    if random.random() < 0.1:
        tree.put(MANIFEST, dumped(value))
    else:
        seal(tree, value)


def seal(tree: Tree, value: Any) -> None:
    """Write a manifest whose digests are right, and the identity's own file."""
    if isinstance(value, dict):
        for number, sealed in enumerate(
            [value, *(p for p in _list(value.get("parts")) if isinstance(p, dict))]
        ):
            raw = dumped(sealed.get("identity"))
            sealed["identity_file"] = {"sha256": digest(raw), "bytes": len(raw)}
            tree.put(f"parts/{number}/identity.json" if number else "receipts/identity.json", raw)
        value = signed(value)
    tree.put(MANIFEST, dumped(value))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def signed(value: dict[str, Any]) -> dict[str, Any]:
    body = {k: v for k, v in value.items() if k != "digest"}
    return body | {"digest": digest(dumped(body))}


def any_json(random: Random, tree: Tree) -> None:
    """A JSON file of any kind, by itself, signed where it was."""
    name = random.choice([n for n in tree.names if n.endswith(".json") and not n.endswith("zarr.json")])
    value = json.loads(tree.get(name))
    twist_json(random, value)
    tree.put(name, dumped(signed(value) if isinstance(value, dict) and "digest" in value else value))


def hollow(random: Random, tree: Tree) -> None:
    """Text that is no manifest, up to what is read of one at most."""
    many = random.choice((1, 1000, 100_000, 4 << 20))
    text = random.choice(
        [b"[", b'{"a":', b"[],", b"{},", b"1,", b'"', b"9", b"\\", b"\0", b"\xff", b"-", b" "]
    )
    start = random.choice(
        [b"", b"[", b'{"identity":{"version":[1,2],"x":[', b'{"format":"softcache","invalid":["']
    )
    name = random.choice([n for n in tree.names if n.endswith(".json") and "zarr" not in n])
    if random.random() < 0.3:
        tree.remove(MANIFEST)
    tree.put(name, (start + text * (many // len(text)))[: 8 << 20])


def unfinished(random: Random, tree: Tree) -> None:
    """No manifest; the identity, a receipt, or both are what they are not."""
    tree.remove(MANIFEST)
    receipts = [n for n in tree.names if n.startswith("receipts/v")]
    for name in random.choice(
        [["receipts/identity.json"], [random.choice(receipts)], random.sample(receipts, 2)]
    ):
        value = json.loads(tree.get(name))
        twist_json(random, value)
        if isinstance(value, dict) and "digest" in value:
            value = signed(value)
        tree.put(name, dumped(value))
    if random.random() < 0.3:
        constant(random, tree)


def part(random: Random, tree: Tree) -> None:
    """One more part, that was begun or is whole by its digests."""
    value = json.loads(tree.get(MANIFEST))
    another = {
        k: copy.deepcopy(value[k]) for k in ("identity", "identity_file", "constants", "files", "report")
    }
    grid = another["identity"]["grid"]
    way = random.randrange(3)
    if way == 0:  # more views
        grid["first"], grid["views"] = grid["views"], grid["views"] * random.choice((1, 2, 1000, 1 << 18))
    elif way == 1:  # another target
        another["identity"]["targets"] = {
            f"{name}2": one for name, one in another["identity"]["targets"].items()
        }
    another["constants"] = {} if random.random() < 0.7 else another["constants"]
    if random.random() < 0.6:
        twist_json(random, another)
    if random.random() < 0.3 and isinstance(another.get("identity"), dict):
        tree.put("parts/1/identity.json", dumped(another["identity"]))
        tree.put("parts/1/x", b"")  # so that what may be there is asked for
    else:
        seal(tree, value | {"parts": [another] * random.choice((1, 1, 2, 5))})


# -- numbers -----------------------------------------------------------------------------------------------


def crc(data: bytes) -> bytes:
    return struct.pack("<I", google_crc32c.value(data))


def numbers(random: Random, dtype: np.dtype) -> Any:
    """One that is at an edge, or anything."""
    if dtype.kind == "f":
        return random.choice([np.nan, np.inf, -np.inf, 0.0, -0.0, 65504.0, -1.0, 6e-8])
    info = np.iinfo(dtype)
    return random.choice(
        [info.min, info.max, 0, 1, info.max - 1, random.randint(int(info.min), int(info.max))]
    )


def _plain(tree: Tree) -> list[str]:
    return [n for n in tree.names if "/c." in n and not _sharded(tree, n)]


def _sharded(tree: Tree, name: str) -> bool:
    folder = name.rpartition("/")[0]
    return b"sharding_indexed" in tree.whole.get(f"{folder}/zarr.json", b"")


def _dtype(tree: Tree, name: str) -> np.dtype:
    return np.dtype(json.loads(tree.whole[f"{name.rpartition('/')[0]}/zarr.json"])["data_type"])


def plain(random: Random, tree: Tree) -> None:
    """Numbers of a plain file, with the right checksum: views, targets, ids and canaries."""
    groups = sorted({n.rpartition("/")[0] for n in _plain(tree)})
    group = random.choice(groups)  # by group, or there would hardly be anything but targets
    name = random.choice([n for n in _plain(tree) if n.rpartition("/")[0] == group])
    _numbers_of(random, tree, name)


def _numbers_of(random: Random, tree: Tree, name: str) -> None:
    dtype = _dtype(tree, name)
    body = tree.get(name)[:-4]
    values = np.frombuffer(body[: len(body) // dtype.itemsize * dtype.itemsize], dtype).copy()
    if random.random() < 0.2:
        values[:] = numbers(random, dtype)
    for _ in range(random.choice((1, 1, 2, 8))):
        if values.size:
            values[random.randrange(values.size)] = numbers(random, dtype)
    raw = values.tobytes()
    if random.random() < 0.1:
        raw = twist_bytes(random, raw)
    tree.put(name, raw + crc(raw))


def constant(random: Random, tree: Tree) -> None:
    """A constant of another type or shape, its file of the right size and content of some kind."""
    names = [n for n in _plain(tree) if n.split("/")[0] in ("ids", "canary", "constants")]
    name = random.choice(names)
    if random.random() < 0.5:
        _numbers_of(random, tree, name)
        return
    value = json.loads(tree.get(MANIFEST) or tree.whole[MANIFEST])
    path = name.rpartition("/")[0]
    known = value["constants"][path]
    shape, dtype = list(known["shape"]), known["dtype"]
    way = random.randrange(6)
    if way == 0:
        dtype = random.choice(
            ["uint8", "int8", "uint16", "int16", "int32", "int64", "float16", "float32", "float64"]
        )
    elif way == 1:
        shape = [1] * random.choice((1, 2, 31, 32, 33, 64, 65, 100))
    elif way == 2 and shape:
        shape[random.randrange(len(shape))] = random.choice([0, 1, 2, 5, 100, 1 << 20])
    elif way == 3:
        shape = []
    elif way == 4:
        shape = shape[::-1]
    else:
        shape.append(1)
    size = int(np.prod(shape, dtype=float)) * np.dtype(dtype).itemsize
    if size > 1 << 22:
        size = 4
    raw = (tree.get(name)[:-4] * (size // max(1, len(tree.get(name)) - 4) + 1))[:size]
    raw = raw.ljust(size, b"\0")
    if random.random() < 0.5:
        raw = random.choice([b"\0", b"\x01", b"\xff", b"\x7f"]) * size
    raw += crc(raw)
    tree.put(f"{path}/c" + ".0" * len(shape) if shape else f"{path}/c.", raw)
    value["constants"][path] = {"sha256": digest(raw), "bytes": len(raw), "dtype": dtype, "shape": shape}
    seal(tree, value)


def table(random: Random, tree: Tree) -> None:
    """``files.bin``, with the digest of what it now is in the manifest."""
    raw = twist_bytes(random, tree.get("files.bin"))
    tree.put("files.bin", raw)
    value = json.loads(tree.get(MANIFEST))
    value["files"] = {"sha256": digest(raw), "bytes": len(raw)}
    seal(tree, value)


def swap(random: Random, tree: Tree) -> None:
    """Other rows, and every digest right."""
    name = random.choice([n for n in tree.names if n.startswith(("targets/", "view/")) and "/c." in n])
    same = [n for n in tree.names if n.rpartition("/")[0] == name.rpartition("/")[0] and "/c." in n]
    tree.put(name, tree.get(random.choice(same)))
    tree._touched |= {n for n in tree.names if n.startswith("receipts/")} | {"files.bin", MANIFEST}
    sign(tree.root)


# -- shards ------------------------------------------------------------------------------------------------


def shard(random: Random, tree: Tree) -> None:
    """The index of a sharded file, or the frame of one of its rows, checksums right."""
    names = [n for n in tree.names if "/c." in n and _sharded(tree, n)]
    if not names:
        plain(random, tree)
        return
    name = random.choice(names)
    data = bytearray(tree.get(name))
    meta = json.loads(tree.whole[f"{name.rpartition('/')[0]}/zarr.json"])
    rows = meta["chunk_grid"]["configuration"]["chunk_shape"][1]
    start = len(data) - 16 * rows - 4
    index = np.frombuffer(bytes(data[start:-4]), "<u8").reshape(rows, 2).copy()
    row = random.randrange(rows)
    way = random.randrange(5)
    if way == 0:
        index[row, random.randrange(2)] = random.choice(
            [0, 1, 4, 5, start, start + 1, 2**32, 2**63, 2**64 - 1, 2**64 - 4]
        )
    elif way == 1:
        index[:] = index[row]
    else:
        offset, size = map(int, index[row])
        if offset + size <= start:
            body = frame(random, bytes(data[offset : offset + size - 4]), int(np.prod(meta["shape"][2:])))
            index[row] = start, len(body) + 4
            data[start:start] = body + crc(body)
    raw = index.tobytes()
    tree.put(name, bytes(data[: len(data) - len(raw) - 4]) + raw + crc(raw))


def frame(random: Random, body: bytes, size: int) -> bytes:
    """A zstd frame that holds less, more, or something else than it says."""
    way = random.randrange(8)
    if way == 0:
        return twist_bytes(random, body)
    if way == 1:  # honest, of another size
        return bytes(zstd.compress(bytes(random.choice([0, 1, size - 1, size + 1, size * 1000, 1 << 24])), 1))
    if way == 2:  # claims
        claim = random.choice([0, size, size + 1, 2**31, 2**40, 2**62, 2**64 - 1])
        return b"\x28\xb5\x2f\xfd\xe0" + claim.to_bytes(8, "little") + body[9:]
    if way == 3:  # runs of one byte: each three bytes become 128 KiB
        blocks = random.choice((1, 2, 1000))
        run = struct.pack("<I", (1 << 17) << 3 | 1 << 1)[:3] + b"A"
        last = struct.pack("<I", 1 << 3 | 1 << 1 | 1)[:3] + b"A"
        return b"\x28\xb5\x2f\xfd\xe0" + size.to_bytes(8, "little") + run * blocks + last
    if way == 4:  # two in one
        return body + bytes(zstd.compress(bytes(1 << 20), 1))
    if way == 5:  # one to be skipped first
        return b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"abcd" + body
    if way == 6:  # a window of 2 GiB and more
        return (
            b"\x28\xb5\x2f\xfd\xc0"
            + random.choice([b"\xf8", b"\xa8"])
            + size.to_bytes(8, "little")
            + body[9:]
        )
    return body[: random.randrange(len(body) + 1)]


OF_CACHES: dict[str, tuple[int, Mutation]] = {
    "manifest": (30, manifest),
    "plain": (14, plain),
    "constant": (14, constant),
    "shard": (12, shard),
    "unfinished": (10, unfinished),
    "part": (8, part),
    "any_file": (6, any_file),
    "no_file": (6, no_file),
    "table": (4, table),
    "hollow": (4, hollow),
    "swap": (2, swap),
}
"""How often, and what."""


def tar(random: Random, tree: Tree) -> None:
    """A tar or its index, and the tables above them signed, so that only headers and contents tell."""
    names = [n for n in tree.names if n.startswith("tars/")]
    name = random.choice(names)
    tree.put(name, twist_bytes(random, tree.get(name)))
    table = np.frombuffer(tree.get("tars.bin"), "V32,<u8,V32,<u8").copy()
    for row, one in zip(table, sorted(n for n in names if n.endswith(".tar")), strict=False):
        index = bytearray(tree.get(one.removesuffix(".tar") + ".index"))
        row[0], row[1] = np.void(bytes.fromhex(digest(tree.get(one)))), len(tree.get(one))
        index[:40] = bytes(row[0]) + int(row[1]).to_bytes(8, "little")
        tree.put(one.removesuffix(".tar") + ".index", bytes(index))
        row[2], row[3] = np.void(bytes.fromhex(digest(bytes(index)))), len(index)
    tree.put("tars.bin", table.tobytes())
    value = json.loads(tree.get("tars.json"))
    value["table"] = {"sha256": digest(table.tobytes()), "bytes": table.nbytes}
    tree.put("tars.json", dumped(signed(value)))


OF_TARS: dict[str, tuple[int, Mutation]] = {
    "tar": (40, tar),
    "any_json": (20, any_json),
    "any_file": (20, any_file),
    "no_file": (6, no_file),
    "manifest": (10, manifest),
}

# to swap rows, all digests are made again, which takes all files
OF_PULLED = {name: one for name, one in OF_CACHES.items() if name != "swap"} | {"any_json": (40, any_json)}

OF_FILES: dict[str, tuple[int, Mutation]] = {"any_file": (40, any_file), "no_such_file": (1, no_such_file)}


def choose(random: Random, table: dict[str, tuple[int, Mutation]]) -> str:
    ticket = random.randrange(sum(weight for weight, _ in table.values()))
    for name, (weight, _) in table.items():
        if ticket < weight:
            return name
        ticket -= weight
    raise AssertionError

"""docs/format.md as code, to check that page by and to port from: `minimal_reader.py CACHE [TARGET VIEW ID]`."""

import hashlib
import json
import pathlib
import re
import sys

import google_crc32c
import numpy as np
from numcodecs.zstd import decompress

ORDER = {"full": "dtype", "topk": "k at tail", "top": "n background inside", "pool": "n", "attention": "tau"}
PARTS = {"boxes": ["u2"], "reference": ["u2"], "embedding": ["i1", "scale"], "deltas": ["i1", "scale"]}
BOX = np.array([-0.5, 2 / 65535], "f4")


def unsealed(data):
    if google_crc32c.value(data[:-4]) != int.from_bytes(data[-4:], "little"):
        raise ValueError("a CRC-32C is wrong")
    return data[:-4]


def position(sample, samples, key):  # along the axis of a view
    half = 2 ** max(1, -(-(samples - 1).bit_length() // 2))
    left, right = divmod(sample, half)
    for turn in range(6):
        words = (b"s", b"feistel"), (b"i", b"%d" % turn), (b"s", b"samples"), (b"i", b"%d" % key)
        text = b"".join(letter + len(word).to_bytes(4, "little") + word for letter, word in words)
        x = right ^ int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        left, right = right, left ^ (x ^ x >> 31) % half
    place = left * half + right
    return place if place < samples else position(place, samples, key)


def codec(spec, shape, layout):  # a row's fields, name → (dtype, shape); what it has besides; int4's shape
    name, inside, behind = re.findall(r"^(\w+)(?:\((.*?)\))?(?:\|(.*))?$", spec)[0]
    words = re.findall(r"(?:(\w+)=)?(\(.*?\)|[^,\s]+)", inside)
    given = {key or ORDER[name].split()[place]: word for place, (key, word) in enumerate(words)}
    if name == "pool":
        return codec(behind, (shape[0], *(-(-side // int(given["n"])) for side in shape[1:])), layout)
    index = next(f"<u{size}" for size in (1, 2, 4) if shape[0] <= 256**size)
    if name in ("all", "top"):
        best = int(given.get("n", shape[0])) + int(given.get("inside", 0))
        strata, rest = int(given.get("background", 0)), shape[0] - best
        weight = [1] * best + [(j + 1) * rest // strata - j * rest // strata for j in range(strata)]
        row, fields = (len(weight),), {"index": (index, (len(weight),))} if name == "top" else {}
        for part, width in layout["columns"]:
            few = width <= 4 or (part == "logits" and given.get("logits") == "f16")
            dtype, *scales = PARTS.get(part, ["<f2"] if few else ["u1", "low", "step"])
            fields |= {part: (dtype, (*row, width)), **{f"{part}_{scale}": ("<f2", row) for scale in scales}}
        return fields, {"index": np.arange(shape[0]), "weight": np.array(weight, "f4")}, None
    k, at = (int(given.get("k", 0)),), (given.get("at", "1, 2, 4, 8").strip("(,)").count(",") + 1,)
    row, channel, count = ("<f2", ()), ("<f2", shape[:-1][:1] or (1,)), np.prod(shape[1:] or shape)
    known = {
        "argmax": {"index": (index, ())},
        "topk": {"index": (index, k), "step": row, "value": ("<u2", k), "tail": ("<u2", at)},
        "full": {"low": row, "step": row, "value": ("u1", shape)},
        "f16": {"value": ("<f2", shape)},
        "int8": {"scale": channel, "value": ("i1", shape)},
        "int4": {"low": channel, "step": channel, "value": ("u1", (*channel[1], -(-count // 2)))},
        "attention": {"spatial": ("<f2", shape[1:]), "channel": channel},
    }
    return known["f16" if given.get("dtype") == "f16" else name], {}, shape if name == "int4" else None


class Cache:
    def __init__(self, folder):
        self.folder, self.files, self.fields, self.targets, self.plain = pathlib.Path(folder), {}, {}, {}, ()
        self.manifest = json.loads((self.folder / "softcache.json").read_bytes())
        rest = {key: value for key, value in self.manifest.items() if key != "digest"}
        text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False) + "\n"
        found = hashlib.sha256(text.encode()).hexdigest(), rest["identity"]["version"][0]
        if found != (self.manifest["digest"], 1):
            raise ValueError("the manifest is damaged, or of another version")
        for number, part in enumerate([rest, *rest.get("parts", [])]):
            self.add(part, part["identity"], f"parts/{number}/" if number else "")
        ends, text = self.constant("ids/offsets"), self.constant("ids/bytes").tobytes()
        self.ids = [text[ends[i] : ends[i + 1]].decode() for i in range(len(ends) - 1)]

    def add(self, part, identity, home):
        recipe, self.grid, receipts = identity["recipe"], identity["grid"], home or "receipts/"
        first, fields, paths = self.grid.get("first", 0), {}, []
        if first or not home:
            fields = {"view/geometry": ("<i2", (7,))}
            fields |= {"view/ops": ("<i2", (recipe["parameters"],))} if "parameters" in recipe else {}
            fields |= {"view/partner": ("<i8", (2,)), "view/mix": ("<i2", (5,))} if "mixed" in recipe else {}
            fields |= {"view/tiles": ("<i8", (6,)), "view/mosaic": ("<i2", (6,))} if "tiled" in recipe else {}
        for name, target in identity["targets"].items():
            found, *self.targets[name] = codec(target["codec"], tuple(target["shape"]), target.get("layout"))
            fields |= {f"targets/{name}/{field}": what for field, what in found.items()}
            self.plain += (f"targets/{name}/",) * target["codec"].endswith("|plain")
        self.fields |= fields
        self.files |= {path + "/c" + ".0" * len(one["shape"]): one for path, one in part["constants"].items()}
        self.files |= {f"{receipts}identity.json": part["identity_file"], f"{home}files.bin": part["files"]}
        for view in range(first, self.grid["views"]):
            for block in range(-(-self.grid["samples"] // self.grid["block_rows"])):
                paths += [f"{a}/c.{view}.{block}" + ".0" * len(fields[a][1]) for a in sorted(fields)]
                paths += [f"{receipts}v{view:04}-b{block:06}.json"]
        table = np.frombuffer(self.file(f"{home}files.bin"), "V32, <u8").tolist()
        self.files |= {p: {"sha256": d.hex(), "bytes": n} for p, (d, n) in zip(paths, table, strict=True)}

    def file(self, path):
        data, known = (self.folder / path).read_bytes(), self.files[path]
        if (len(data), hashlib.sha256(data).hexdigest()) != (known["bytes"], known["sha256"]):
            raise ValueError(f"{path} is damaged")
        return data

    def constant(self, name):
        path = next(path for path in self.files if path.startswith(f"{name}/c."))
        dtype, shape = np.dtype(self.files[path]["dtype"]).newbyteorder("<"), self.files[path]["shape"]
        return np.frombuffer(unsealed(self.file(path)), dtype).reshape(shape)

    def rows(self, folder, view, sample):  # of `view/` or `targets/NAME/`, as encoded; samples as in `ids`
        if sample in self.manifest["invalid"]:
            raise ValueError("the image of this sample could not be read")
        block_rows = self.grid["block_rows"]
        block, place = divmod(position(sample, self.grid["samples"], self.grid["key"]), block_rows)
        for array in [array for array in self.fields if array.startswith(folder)]:
            row = np.dtype(self.fields[array])
            data = self.file(f"{array}/c.{view}.{block}" + ".0" * len(row.shape))
            if row.itemsize < 4096 or array.startswith(self.plain):
                data = unsealed(data)[place * row.itemsize : (place + 1) * row.itemsize]
            else:
                start, size = np.frombuffer(unsealed(data[-16 * block_rows - 4 :]), "<u8, <u8")[place]
                data = decompress(unsealed(data[start : start + size]))
            yield array.removeprefix(folder), np.frombuffer(data, row)[0]

    def target(self, name, view, sample):  # low + step · value; of topk how far that is below the largest
        always, shape = self.targets[name]
        row, said = always | dict(self.rows(f"targets/{name}/", view, sample)), {}
        row = {f.replace("scale", "step"): x.astype("f4") if x.dtype == "f2" else x for f, x in row.items()}
        for field in [field for field in row if not field.endswith(("low", "step"))]:
            grid = [row.get(f"{field}_{x}", row.get(x, i)) for i, x in enumerate(("low", "step"))]
            value, (low, step) = row[field], BOX if field in ("boxes", "reference") else grid
            if shape:  # two in a byte
                value = np.stack([value >> 4, value & 15], -1).reshape(len(low), -1)
                value = value[:, : np.prod(shape) // len(low)].reshape(shape)
            said[field] = value if field == "index" else (value.T * step + low).T
        return said


if __name__ == "__main__":
    cache, asked = Cache(sys.argv[1]), sys.argv[2:]
    print(len([cache.file(path) for path in cache.files]), "files, all whole:", *cache.fields)
    if asked:
        where = int(asked[1]), cache.ids.index(asked[2])
        print(dict(cache.rows("view/", *where)), cache.target(asked[0], *where))

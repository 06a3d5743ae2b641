"""What `show` tells of a cache, for a person and for a program."""

from __future__ import annotations

from typing import Any

from softcache import measure, pulled
from softcache.cache import Cache
from softcache.errors import counted
from softcache.inventory import begun
from softcache.licences import WHAT
from softcache.parts import Part
from softcache.targets import Layout


def summary(cache: Cache) -> dict[str, Any]:
    """What ``show --json`` prints."""
    total, manifest = sum(_blocks(part) for part in cache.parts), cache.manifest
    built = total if manifest else _receipts(cache, cache.parts[0])
    found = {
        "path": str(cache.path),
        "complete": cache.complete,
        "digest": manifest and manifest.digest,
        "samples": cache.samples,
        "views": cache.views,
        "blocks": {"built": built, "total": total},
        "identity": cache.identity,
        "parts": [_part(part) for part in cache.parts[1:]],
    }
    if manifest and (part := begun(cache)):
        found["begun"] = _part(part) | {"blocks": {"built": _receipts(cache, part), "total": _blocks(part)}}
    if cache.pulled:
        found["pulled"] = cache.pulled.model_dump()
        found["here"] = pulled.told(cache.pulled, cache)
    if manifest:
        found["licences"] = cache.licences
        if manifest.choice:
            found["choice"] = manifest.choice.model_dump()
        found["report"] = cache.report.model_dump()
        constants = {p: c for p, c in cache.constants.items() if "constants" in p.split("/")}
        found["constants"] = {
            p: c.model_dump(include={"dtype", "shape", "bytes"}) for p, c in constants.items()
        }
        found["invalid"] = [cache.ids[i] for i in cache.invalid]
    return found


def _blocks(part: Part) -> int:
    return (part.grid.views - part.grid.first) * part.grid.blocks_per_view


def _receipts(cache: Cache, part: Part) -> int:
    return sum(cache.store.exists(part.receipt(block)) for block in part.grid.blocks())


def _part(part: Part) -> dict[str, Any]:
    """What a cache was extended by."""
    return {
        "named": part.named,
        "teacher": part.identity.teacher.model_dump(mode="json"),
        "targets": list(part.targets),
        "views": [part.grid.first, part.grid.views],
    }


def tell(found: dict[str, Any]) -> list[str]:
    """What :func:`summary` found, in lines for a person."""
    identity = found["identity"]
    source, teacher, recipe = identity["source"], identity["teacher"], identity["recipe"]
    built, total = found["blocks"]["built"], found["blocks"]["total"]
    state = f"digest {found['digest']}" if found["complete"] else f"unfinished: {built} of {total} blocks"
    classes = counted(len(source["classes"]), "class") if source["classes"] else "no class names"
    split = f" split {source['split']}," if source["split"] else ""
    size = "x".join(map(str, teacher["input_spec"]["size"]))
    here = [f"  pulled   {found['here']}"] if found.get("here") else []
    lines = [
        f"{found['path']}: {state}",
        *here,
        f"  source   {source['layout']},{split} {counted(found['samples'], 'sample')}, {classes}",
        f"  recipe   {recipe['spec']}, {counted(found['views'], 'view')}, seed {recipe['seed']}",
        f"  teacher  {teacher['name']} at {size}, {teacher['precision']} on {teacher['processor']}",
        f"           weights {teacher['weights'] or 'unknown'} ({teacher['weights_format'] or 'not from a file'})",
    ]
    if not recipe.get("replayable", True):
        lines.insert(
            3 + len(here),
            "           NOT REPLAYABLE: what the teacher saw is not known; for reading by id and policy=frozen",
        )
    for number, member in enumerate(teacher.get("members", ())):
        lines.append(f"           {number}: {member['name']}, weights {member['weights'] or 'unknown'}")
    notes = {
        "flip_tta": "the mean over each image and its mirror image",
        "columns": "its classes were put into the source's order",
        "label_smoothing": f"trained with label smoothing {teacher.get('label_smoothing')}",
    }
    lines += [f"           {note}" for key, note in notes.items() if teacher.get(key)]
    lines += [f"  added    {_added(part)}" for part in found["parts"]]
    if more := found.get("begun"):
        told = "{built} of {total} blocks".format(**more["blocks"])
        lines.append(f"  begun    {_added(more)}: {told}; run the same extend again to go on")
    if stated := found.get("licences"):
        lines.append("  licences " + ", ".join(f"{stated[w]} ({w})" for w in WHAT if w in stated))
    lines += [f"  {line}" for line in found.get("choice", {}).get("why", ())]
    report = found.get("report", {})
    for name, target in identity["targets"].items():
        bytes_ = report.get("bytes_per_row", {}).get(name)
        fidelity = measure.words(report.get("fidelity", {}).get(name, {}))
        told = f", {bytes_:,} bytes a row; {fidelity}" if bytes_ else ""
        lines.append(
            f"  target   {name}: {target['kind']} {tuple(target['shape'])} as {target['codec']}{told}"
        )
        if layout := target.get("layout"):
            lines.append(f"           {Layout.from_identity(layout)}")
        if motion := report.get("equivariance", {}).get(name):
            lines.append(f"           moves with the view, cosine: {measure.motion_words(motion)}")
    for path, one in found.get("constants", {}).items():
        lines.append(f"  constant {path}: {one['dtype']} {tuple(one['shape'])}")
    if found["complete"]:
        lines.append(f"  shards   {measure.size(report['bytes'])} in {counted(total, 'block')}")
        if report["top1"] is not None:
            before = f"{report['teacher_top1']:.2%} before encoding"
            lines.append(
                f"  top-1    {report['top1']:.2%} of {report['labelled']:,} labelled rows ({before})"
            )
        if found["invalid"]:
            lines.append(
                f"  invalid  {counted(len(found['invalid']), 'sample')}, for example {found['invalid'][0]!r}"
            )
    return lines


def _added(part: dict[str, Any]) -> str:
    first, views = part["views"]
    what = f"views {first:,} to {views - 1:,}" if first else ", ".join(part["targets"])
    if not part["named"]:
        return what
    who = part["teacher"]
    size = "x".join(map(str, who["input_spec"]["size"]))
    return (
        f"{what} by {who['name']} at {size}, {who['precision']} on {who['processor']}, weights "
        f"{who['weights'] or 'unknown'}"
    )

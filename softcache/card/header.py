"""The head of a card that Hugging Face reads: its words for licences, sizes and tasks."""

from __future__ import annotations

from softcache.cache import Cache
from softcache.card.markup import header

# what it calls licences that have another identifier in SPDX, and those that it knows by SPDX's in small letters
_CALLED = {"odbl-1.0": "odbl", "odc-by-1.0": "odc-by", "pddl-1.0": "pddl"}
_KNOWN = frozenset(
    [
        "apache-2.0",
        "mit",
        "bsd-2-clause",
        "bsd-3-clause",
        "isc",
        "zlib",
        "unlicense",
        "mpl-2.0",
        "epl-2.0",
        "eupl-1.2",
        "agpl-3.0",
        "gpl-2.0",
        "gpl-3.0",
        "lgpl-2.1",
        "lgpl-3.0",
        "cc0-1.0",
        "cc-by-2.0",
        "cc-by-2.5",
        "cc-by-3.0",
        "cc-by-4.0",
        "cc-by-sa-3.0",
        "cc-by-sa-4.0",
        "cc-by-nc-2.0",
        "cc-by-nc-3.0",
        "cc-by-nc-4.0",
        "cc-by-nc-sa-2.0",
        "cc-by-nc-sa-3.0",
        "cc-by-nc-sa-4.0",
        "cc-by-nd-4.0",
        "cc-by-nc-nd-3.0",
        "cc-by-nc-nd-4.0",
        "cdla-permissive-1.0",
        "cdla-permissive-2.0",
        "cdla-sharing-1.0",
        "odbl",
        "odc-by",
        "pddl",
        "ofl-1.1",
        "openrail",
    ]
)
_TASKS = {
    "logits": "image-classification",
    "detections": "object-detection",
    "proposals": "object-detection",
    "queries": "object-detection",
    "probes": "object-detection",
}


def of(cache: Cache, title: str) -> str:
    """YAML, between its two lines."""
    kinds = [target.kind for target in cache.targets.values()]
    values = {
        **_called(cache.licences.get("cache", "")),
        "pretty_name": title,
        "tags": ["softcache", "knowledge-distillation", "soft-targets"],
        "size_categories": [_size_category(cache.samples)],
        "task_categories": sorted({_TASKS.get(kind, "image-feature-extraction") for kind in kinds}),
        "source_datasets": ["extended"],
    }
    return header(values)


def _called(licence: str) -> dict[str, str]:
    """The licence as Hugging Face's header has it."""
    low = licence.lower().removesuffix("-only").removesuffix("-or-later")
    known = _CALLED.get(low, low)
    if known in _KNOWN:
        return {"license": known}
    return {"license": "other", "license_name": licence} if licence else {"license": "unknown"}


def _size_category(samples: int) -> str:
    names = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
    place = sum(samples >= 10 ** (3 + i) for i in range(len(names)))
    if place == 0:
        return "n<1K"
    return f"{names[place - 1]}<n<{names[place]}" if place < len(names) else "n>1T"

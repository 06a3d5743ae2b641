"""What the numbers of a cache mean, in words that go with them where nobody has this page of ours."""

from __future__ import annotations

from softcache.codecs.pool import Pooled
from softcache.targets import Target

ABOUT = (
    "A softcache cache: what a teacher network said of many views of many images. targets/NAME/FIELD and view/FIELD are "
    "(view, sample, ...); sample i is ids[i] (MATLAB shows all axes in the opposite order, and counts from 1). The "
    "attribute 'decode' of targets/NAME says how its fields become the teacher's values; arithmetic is float32. "
    "Rows of samples that the manifest calls invalid hold zeros. view/geometry says which part of an image was seen. "
    "softcache import FILE -o FOLDER makes the cache again."
)

COLUMNS = {
    "view/geometry": ("x", "y", "width", "height", "image_width", "image_height", "mirrored"),
    "view/partner": ("sample", "view"),
    "view/mix": ("lambda/32767", "x/32767", "y/32767", "width/32767", "height/32767"),
    "view/tiles": ("sample_1", "view_1", "sample_2", "view_2", "sample_3", "view_3"),
    "view/mosaic": ("x/32767", "y/32767", "scale/4096", "grey", "width", "height"),
}

_HALVES, _CHANNELS = (
    "value",
    "scale * value, one scale for each entry of the row's first axis (of a vector: one in all)",
)
_FORMULAS = {
    "F16": lambda codec: _HALVES,
    "Full": lambda codec: (
        _HALVES if codec.dtype == "f16" else "low + step * value, one low and one step a row"
    ),
    "Int8": lambda codec: _CHANNELS,
    "Argmax": lambda codec: "index is the class of the largest logit, from 0",
    "TopK": lambda codec: (
        f"index: the {codec.k} classes of the largest logits, falling, from 0; their logits less the largest: -step * "
        f"value; -step * tail: at the temperatures T = {', '.join(f'{t:g}' for t in codec.at)} the soft mean of all "
        "other logits, T * log(mean(exp(z / T))), less the largest logit"
    ),
    "Strength": lambda codec: (
        f"value (height, width): mean over the channels of the teacher's map's |x| ** {codec.p:g}, divided by its L2 norm"
    ),
    "Anchored": lambda codec: (
        "centred logits of every class from the constants anchors/NUMBER (base, grid, list, listed: a row an image) and the "
        "corrections of this view, valid at T = 1 to 8; bit by bit in docs/format.md of softcache"
    ),
    "Head": lambda codec: (
        f"logits: class_weight * embedding + class_bias, the constants in constants/; the embedding is "
        f"{_HALVES if codec.dtype == 'f16' else 'scale * value'}"
    ),
    "Attention": lambda codec: (
        "spatial (height, width) and channel (channels): attention of the teacher's map by FGD (Yang et al. 2022), each of "
        "mean 1"
    ),
}
_PARTS = (
    "items of a row, by parts: boxes, reference: -0.5 + value * 2 / 65535 (left, top, right, bottom; 0 to 1 is the view); "
    "with NAME_low and NAME_step: NAME_low + NAME_step * NAME, of one item each; with NAME_scale: NAME_scale * NAME; logits "
    "(classes, items) with logits_rest: the logit, of a softmax the logarithm, of the score (logits / 255)^1.5, 255 "
    "standing for 254.75, and logits_rest where they are 0; others as they are. index: the items' numbers in the teacher's "
    "order, where not all are kept"
)


def formula(target: Target) -> str:
    """How the fields of a target become the teacher's values."""
    codec, before = target.codec, ""
    if isinstance(codec, Pooled):
        before = f"mean over cells of {codec.pool.n} by {codec.pool.n} places of the teacher's map: "
        codec = codec.then
    if target.layout is not None:
        return _PARTS
    told = _FORMULAS.get(type(codec).__name__)
    return before + (told(codec) if told else f"codec {target.spec}: see docs/format.md of softcache")

"""Every op has a sentence for people, which tells every option."""

from __future__ import annotations

from dataclasses import fields

import pytest

from softcache.recipe import OPS, Recipe

# For every op one spec, and then one for each of its options that differs in that option alone.
OPTIONS: dict[str, tuple[str, dict[str, str]]] = {
    "center_crop": ("center_crop(7)", {"size": "center_crop((7, 9))"}),
    "color_jitter": (
        "color_jitter(hue=0.1)",
        {
            "brightness": "color_jitter(brightness=0.2, hue=0.1)",
            "contrast": "color_jitter(contrast=0.2, hue=0.1)",
            "saturation": "color_jitter(saturation=0.2, hue=0.1)",
            "hue": "color_jitter(hue=0.2)",
        },
    ),
    "crop": ("crop(7)", {"size": "crop((7, 9))", "pad": "crop(7, pad=2)"}),
    "cutmix": (
        "resize((8, 8))|cutmix",
        {"alpha": "resize((8, 8))|cutmix(2)", "p": "resize((8, 8))|cutmix(p=0.5)"},
    ),
    "cutout": ("cutout(3)", {"size": "cutout((3, 4))"}),
    "erase": (
        "erase",
        {"p": "erase(p=1)", "scale": "erase(scale=(0.1, 0.2))", "ratio": "erase(ratio=(1, 2))"},
    ),
    "flip": ("flip", {"p": "flip(p=1)"}),
    "grayscale": ("grayscale", {"p": "grayscale(0.3)"}),
    "hsv_jitter": (
        "hsv_jitter",
        {"h": "hsv_jitter(h=0.1)", "s": "hsv_jitter(s=0.1)", "v": "hsv_jitter(v=0.1)"},
    ),
    "identity": ("identity", {}),
    "iou_crop": (
        "iou_crop",
        {
            "min_scale": "iou_crop(min_scale=0.2)",
            "max_scale": "iou_crop(max_scale=0.9)",
            "min_aspect_ratio": "iou_crop(min_aspect_ratio=0.6)",
            "max_aspect_ratio": "iou_crop(max_aspect_ratio=3)",
            "options": "iou_crop(options=(0.5, 1))",
            "trials": "iou_crop(trials=3)",
        },
    ),
    "letterbox": (
        "letterbox(8)",
        {
            "size": "letterbox((8, 9))",
            "fill": "letterbox(8, fill=0)",
            "align": "letterbox(8, align=top_left)",
            "upscale": "letterbox(8, upscale=False)",
        },
    ),
    "mix": (
        "resize((8, 8))|mix",
        {
            "mixup": "resize((8, 8))|mix(mixup=0.3)",
            "cutmix": "resize((8, 8))|mix(cutmix=0.3)",
            "p": "resize((8, 8))|mix(p=0.3)",
            "switch": "resize((8, 8))|mix(switch=0.3)",
        },
    ),
    "mixup": (
        "resize((8, 8))|mixup",
        {"alpha": "resize((8, 8))|mixup(2)", "p": "resize((8, 8))|mixup(p=0.5)"},
    ),
    "mosaic": (
        "mosaic",
        {
            "size": "mosaic(8)",
            "p": "mosaic(p=0.3)",
            "scale": "mosaic(scale=(1, 1.5))",
            "center": "mosaic(center=(0.3, 0.7))",
            "fill": "mosaic(fill=0)",
        },
    ),
    "rand_augment": ("rand_augment", {"n": "rand_augment(n=3)", "magnitude": "rand_augment(magnitude=3)"}),
    "random_affine": (
        "random_affine",
        {
            "degrees": "random_affine(degrees=3)",
            "translate": "random_affine(translate=0.3)",
            "scale": "random_affine(scale=0.3)",
            "shear": "random_affine(shear=3)",
        },
    ),
    "random_resized_crop": (
        "random_resized_crop(8)",
        {
            "size": "random_resized_crop((8, 9))",
            "scale": "random_resized_crop(8, scale=(0.3, 1))",
            "ratio": "random_resized_crop(8, ratio=(1, 2))",
        },
    ),
    "resize": ("resize(8)", {"size": "resize((8, 8))"}),
    "solarize": ("solarize", {"p": "solarize(p=0.3)", "threshold": "solarize(threshold=3)"}),
    "vflip": ("vflip", {"p": "vflip(p=0.3)"}),
    "zoom_out": ("zoom_out", {"p": "zoom_out(p=0.3)", "max": "zoom_out(max=3)", "fill": "zoom_out(fill=0)"}),
}


def sentence(spec: str) -> str:
    """That of the last op."""
    ((_, sentences),) = Recipe(spec, 0).words()
    return sentences[-1]


@pytest.mark.parametrize("name", OPS)
def test_its_sentence_tells_every_option(name: str):
    spec, options = OPTIONS[name]
    assert options.keys() == {field.name for field in fields(OPS[name])}
    told = [sentence(one) for one in (spec, *options.values())]
    assert len(set(told)) == len(told)
    for text in told:
        assert text[0].isupper() and text.endswith(".") and "\n" not in text and len(text) < 300
        assert not set(text) & set("|`<>*_[]#\\"), "it stands in Markdown as it is"


def test_what_is_said_is_what_is_done():
    assert Recipe("crop(32, pad=4)|flip", 0).words() == [
        (
            0,
            [
                "A part of 32×32 pixels is cut out at a random place, after 4 pixels of padding were put around it.",
                "With probability 0.5 it is mirrored left to right.",
            ],
        )
    ]
    assert sentence("resize((10, 20))") == "It is resized to 20×10 pixels."  # width first


def test_phases_are_told_one_by_one():
    words = Recipe("8: resize((8, 8))|flip; resize((8, 8))", 0).words()
    assert [(first, len(sentences)) for first, sentences in words] == [(0, 2), (8, 1)]

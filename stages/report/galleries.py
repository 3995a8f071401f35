"""Figures of images: mistakes, changes by fine-tuning, near-duplicates."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from numpy.typing import NDArray

from stages.common.format import plural, probability
from stages.images.batches import read_entry
from stages.images.index import Entry
from stages.images.preprocessing import Preprocessing, make_transform
from stages.network.network import Network
from stages.report.gradcam import enlarge, find_block, grad_cam
from stages.report.style import GREY, new_figure, short_names, shorten, shorten_path, wrap
from stages.scores.metrics import predicted_labels
from stages.scores.predictions import Predictions, find_changed, find_confused, find_wrong

Pixels = NDArray[np.float32]

_WIDTH, _MARGIN = 10.0, 0.15  # inches, of a figure and around it
_MOST_WRONG = 9
_MOST_PAIRS, _MOST_OF_A_PAIR = 4, 5  # of classes that are confused, and images of each
_MOST_CHANGED = 10  # fixed ones, and as many broken ones
_MOST_ALIKE = 8  # pairs


@dataclass(frozen=True)
class Album:
    """Images, and their preprocessing."""

    root: Path
    entries: list[Entry]
    preprocessing: Preprocessing

    def load(self, entries: Iterable[Entry]) -> torch.Tensor:
        """Return images preprocessed, (n, 3, crop, crop); raises what `read_entry` does."""
        transform, grey_max = make_transform(self.preprocessing, "none"), self.preprocessing.grey_max
        least = self.preprocessing.least("none")
        return torch.stack([transform(read_entry(self.root, entry, grey_max, least)) for entry in entries])

    def show(self, positions: Sequence[int]) -> Pixels:
        """Return its preprocessed images for display, (n, crop, crop, 3) in [0, 1]."""
        return as_pixels(self.load(self.entries[position] for position in positions), self.preprocessing)


def as_pixels(images: torch.Tensor, preprocessing: Preprocessing) -> Pixels:
    """Return preprocessed images (n, 3, crop, crop) for display, (n, crop, crop, 3) in [0, 1]."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    seen: Pixels = (images * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    return seen


def draw_wrong(predictions: Predictions, album: Album, network: Network) -> Figure | str:
    """Draw the fine-tuned network's mistakes, the most confident first, with Grad-CAM toward what it predicted.

    `album` has the images of `predictions`, in that order; `network` is the fine-tuned one, on the CPU.
    """
    wrong, total = find_wrong(predictions), plural(len(predictions.labels), "image")
    if not wrong:
        return f"The fine-tuned network makes no mistakes on {total}."
    positions = wrong[:_MOST_WRONG]
    predicted = predicted_labels(predictions.finetuned)[positions]
    images = album.load(album.entries[position] for position in positions)
    pixels, block = as_pixels(images, album.preprocessing), find_block(network, images.shape[-1])
    note = "Without Grad-CAM: at this size of the images, no block has maps of 7 x 7 values."
    if block is not None:
        maps = grad_cam(network.eval(), images, torch.from_numpy(predicted), block)
        heat = enlarge(maps, images.shape[-1]).numpy()
        gap = np.ones((len(pixels), pixels.shape[1], max(1, round(0.02 * len(pixels[0]))), 3), dtype=np.float32)
        warm = np.stack([lay_over(own, warmth) for own, warmth in zip(pixels, heat, strict=True)])
        pixels = np.concatenate([pixels, gap, warm], axis=2)
        note = (
            "Right of each image: Grad-CAM, where the network saw evidence for its prediction (bright: most, dark: "
            f"none), from {maps.shape[1]} x {maps.shape[2]} values after block {block + 1} of {len(network.backbone)}."
        )
    shown = "" if len(wrong) == len(positions) else f"; the {len(positions)} most confident of them"
    title = f"The fine-tuned network's {plural(len(wrong), 'mistake')} on {total}{shown}"
    names, captions = short_names(predictions.classes, 24), []
    for position, label in zip(positions, predicted, strict=True):
        surety = probability(float(predictions.finetuned[position, label]))
        true = f"true: {names[predictions.labels[position]]}"
        captions.append((f"predicted {names[label]}, {surety}", true, shorten_path(predictions.paths[position], 42)))
    return draw_sheet([(title, note, len(positions))], pixels, captions, 3, ratio=1 if block is None else 2)


def draw_confused(predictions: Predictions, album: Album) -> Figure | str:
    """Draw images from the largest cells of the fine-tuned network's confusion matrix, beside its diagonal."""
    pairs = find_confused(predictions, "finetuned")
    if not pairs:
        return f"The fine-tuned network confuses no classes on {plural(len(predictions.labels), 'image')}."
    names, total = short_names(predictions.classes, 30), np.bincount(predictions.labels)
    sections, positions = [], []
    for true, guess, found in pairs[:_MOST_PAIRS]:
        shown = found[:_MOST_OF_A_PAIR]
        rest = "" if len(shown) == len(found) else f"; the {len(shown)} most confident"
        title = f"{names[true]} taken for {names[guess]}: {len(found):,} of {total[true]:,}{rest}"
        sections.append((title, "", len(shown)))
        positions += shown
    sureties = predictions.finetuned[positions].max(axis=1).tolist()
    paths = [shorten_path(predictions.paths[position], 26) for position in positions]
    captions = list(zip(map(probability, sureties), paths, strict=True))
    return draw_sheet(sections, album.show(positions), captions, _MOST_OF_A_PAIR)


def draw_changed(predictions: Predictions, album: Album) -> Figure | str:
    """Draw the images that fine-tuning fixed and those that it broke, with both predictions."""
    groups = find_changed(predictions)
    if not any(groups):
        return f"Fine-tuning neither fixed nor broke an image, of {plural(len(predictions.labels), 'image')}."
    sections, positions = [], []
    for name, group in zip(("fixed", "broke"), groups, strict=True):
        shown = f"; the {_MOST_CHANGED} that changed most" if len(group) > _MOST_CHANGED else ""
        many = plural(len(group), "image") if group else "no image"
        sections.append((f"Fine-tuning {name} {many}{shown}", "", min(len(group), _MOST_CHANGED)))
        positions += group[:_MOST_CHANGED]
    names, captions = short_names(predictions.classes, 14), []
    for position in positions:
        before, after = (
            f"{names[predicted_labels(values[None])[0]]}, {probability(float(values.max()))}"
            for values in (predictions.head[position], predictions.finetuned[position])
        )
        true, path = names[predictions.labels[position]], shorten_path(predictions.paths[position], 26)
        captions.append((f"true: {true}", f"before: {before}", f"after: {after}", path))
    return draw_sheet(sections, album.show(positions), captions, 5)


def draw_alike(pairs: list[tuple[Entry, Entry]], album: Album) -> Figure | str:
    """Draw the least similar near-duplicates, the last ones, side by side: the most likely to be wrong."""
    if not pairs:
        return "No two images are nearly the same."
    shown = pairs[: -_MOST_ALIKE - 1 : -1]
    entries = [entry for pair in shown for entry in pair]
    more = f"; the {len(shown)} least alike" if len(pairs) > len(shown) else ""
    title = f"{plural(len(pairs), 'pair of images is', 'pairs of images are')} nearly the same{more}"
    captions = [
        (f"pair {number // 2 + 1}: {shorten(entry.class_name, 20)}", shorten_path(entry.path, 32))
        for number, entry in enumerate(entries)
    ]
    pixels = as_pixels(album.load(entries), album.preprocessing)
    return draw_sheet([(title, "", len(entries))], pixels, captions, 4)


def draw_sheet(
    sections: Sequence[tuple[str, str, int]],
    images: Iterable[Pixels],
    captions: Sequence[tuple[str, ...]],
    columns: int,
    ratio: float = 1,
) -> Figure:
    """Draw sections of images under titles, and lines under each image: the first in bold, the last, its path, small.

    A section is a title, a note below it or "", and its number of images; `images` are those of all sections;
    `captions`: as many lines for each; `columns`: images a row; `ratio`: width of an image over its height.
    """
    width = (_WIDTH - _MARGIN) / columns - _MARGIN
    image_height = width / ratio
    step = image_height + 0.15 * len(captions[0]) + 0.14
    titles = [(wrap(title, 9.5, 11), wrap(note, 9.5, 8)) for title, note, _ in sections]
    heads = [0.12 + 0.18 * len(title.splitlines()) + 0.14 * len(note.splitlines()) for title, note in titles]
    rows = [-(-count // columns) for *_, count in sections]
    height = _MARGIN + sum(heads) + sum(rows) * step
    figure, top, left = new_figure(_WIDTH, height, layout=None), height - _MARGIN, _MARGIN / _WIDTH
    left_to_draw = zip(images, captions, strict=True)
    for (title, note), head, (*_, count), row_count in zip(titles, heads, sections, rows, strict=True):
        figure.text(left, top / height, title, size=11, weight="bold", va="top")
        if note:
            figure.text(left, (top - head + 0.1) / height, note, size=8, color=GREY, va="bottom")
        top -= head
        for number, (image, lines) in enumerate(islice(left_to_draw, count)):
            x = _MARGIN + (number % columns) * (width + _MARGIN)
            y = top - (number // columns) * step - image_height
            axes = figure.add_axes((x / _WIDTH, y / height, width / _WIDTH, image_height / height))
            axes.set_axis_off()
            axes.imshow(image)
            looks = [("bold", 7.8, "black"), *[("normal", 7.8, "black")] * (len(lines) - 2), ("normal", 6.5, GREY)]
            for place, (line, (weight, size, color)) in enumerate(zip(lines, looks, strict=True)):
                text = axes.annotate(line, (0, 0), (0, -3 - 10.8 * place), "axes fraction", "offset points", va="top")
                text.set(size=size, weight=weight, color=color, annotation_clip=False)
        top -= row_count * step
    return figure


def lay_over(pixels: Pixels, heat: NDArray[np.float32]) -> Pixels:
    """Blend a heat map over the grey image; its colours increase in lightness, so it also reads in greyscale."""
    grey = pixels @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    mixed: Pixels = (0.4 * grey[..., None] + 0.6 * colormaps["inferno"](heat)[..., :3]).astype(np.float32)
    return mixed

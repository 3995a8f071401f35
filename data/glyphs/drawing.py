"""Pictures of printed letters and symbols, drawn as they are needed: the task that the bundled backbone learns.

No digit is among them, nor a letter that looks like one, so that digits are new to the backbone. The fonts are those
that matplotlib ships (DejaVu, STIX, Computer Modern).
"""

import math
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Generator, Tensor
from torch.nn import functional
from torchvision.transforms.v2.functional import pil_to_tensor

# Left out: what looks like a digit (O o Q D Θ θ σ δ φ 0, I l i j ! | / ( ) ∫ 1, Z z Շ ? 2, З Э ∃ ∋ ξ 3, Ч Կ Վ y 4,
# S s ζ 5, G b б Ь ∂ 6, B ß & ∞ Ֆ 8, g q ρ 9), and one of two that differ in size alone (C c, K К, U ∪, Σ ∑, Λ ^).
LATIN = "ACEFHJKLMNPRTUVWXYadefhkmnrt"
GREEK = "ΓΔΛΞΠΣΦΨΩαγεηλμπτχω"
CYRILLIC = "ДЖИЛЦШЮЯ"
ARMENIAN = "ԱԴԺԽՀՄՆՌՔ"
SYMBOLS = "#@+×÷=<≥≠≈±√∈⊃∀∇←→↑↓↔{}[]*~€£¥¶†♠♣♥♦"
CHARACTERS = LATIN + GREEK + CYRILLIC + ARMENIAN + SYMBOLS

FACES = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
)
# Computer Modern has other characters where Unicode has Greek and symbols.
LATIN_FACES = ("cmr10", "cmb10", "cmti10", "cmss10", "cmtt10")

CELL = 96  # pixels, each glyph's own picture
FILLED = 0.75  # of the cell: the longer side of a glyph
SPREAD = 2.5  # pixels of blur: the range in which a threshold makes strokes lighter or bolder


@dataclass(frozen=True)
class Glyphs:
    """Every character in every face that has it.

    `ink` is uint8, (glyphs, 1, CELL, CELL), blurred so that a threshold on it chooses the weight of the strokes;
    `labels` is int64, (glyphs,), a position in `CHARACTERS`.
    """

    ink: Tensor
    labels: Tensor


def load_glyphs() -> Glyphs:
    """Draw each character once in each face."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    ink, labels = [], []
    for face in (*FACES, *LATIN_FACES):
        path = folder / f"{face}.ttf"
        available = FT2Font(str(path)).get_charmap()
        for label, character in enumerate(LATIN if face in LATIN_FACES else CHARACTERS):
            if ord(character) in available:
                ink.append(pil_to_tensor(_draw_glyph(path, character)))
                labels.append(label)
    return Glyphs(torch.stack(ink), torch.tensor(labels))


def draw(glyphs: Glyphs, labels: Tensor, size: int, generator: Generator) -> Tensor:
    """Draw one picture a label: a random face, weight, slant, size, place, colour and quality.

    Args:
        glyphs: as `load_glyphs` makes them.
        labels: int64, (n,), positions in `CHARACTERS`.
        size: height and width, pixels.
        generator: a CPU generator; its state alone decides what is drawn.

    Returns:
        float32, (n, 3, size, size), from 0 to 1, on the CPU.
    """
    stroke = _shape(glyphs.ink[_choose_faces(glyphs, labels, generator)], size, generator)
    stroke = _blur(_lower_resolution(stroke, generator), generator)
    return _colour(stroke, generator)


def _draw_glyph(path: Path, character: str) -> Image.Image:
    def font(points: float) -> ImageFont.FreeTypeFont:
        return ImageFont.truetype(path, points, layout_engine=ImageFont.Layout.BASIC)

    left, top, right, bottom = font(CELL).getbbox(character)
    points = CELL * CELL * FILLED / max(right - left, bottom - top)
    left, top, right, bottom = font(points).getbbox(character)
    cell = Image.new("L", (CELL, CELL))
    place = ((CELL - left - right) / 2, (CELL - top - bottom) / 2)
    ImageDraw.Draw(cell).text(place, character, fill=255, font=font(points))
    return cell.filter(ImageFilter.GaussianBlur(SPREAD))


def _between(low: float, high: float, count: int, generator: Generator) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=generator)


def _choose_faces(glyphs: Glyphs, labels: Tensor, generator: Generator) -> Tensor:
    """Return a glyph for each label, each face with the same probability."""
    fits = (labels[:, None] == glyphs.labels).float()
    return torch.multinomial(fits, 1, generator=generator)[:, 0]


def _shape(ink: Tensor, size: int, generator: Generator) -> Tensor:
    """Turn, slant, stretch, bend and move glyphs; (n, 1, CELL, CELL) -> (n, 1, size, size), 1 where there is ink."""
    count = len(ink)
    longer_side = _between(0.35, 0.95, count, generator)  # of the picture
    angle = math.pi / 180 * _between(-20, 20, count, generator)
    slant = _between(-0.4, 0.4, count, generator)
    stretch = torch.exp(_between(-0.25, 0.25, count, generator))
    cos, sin, one, zero = angle.cos(), angle.sin(), torch.ones(count), torch.zeros(count)
    turned = torch.stack([cos, -sin, sin, cos], dim=1).view(-1, 2, 2)
    slanted = torch.stack([stretch, slant, zero, one / stretch], dim=1).view(-1, 2, 2)
    forth = turned @ slanted * (longer_side / FILLED).view(-1, 1, 1)
    room = (1 - longer_side).view(-1, 1, 1)
    shift = room * _between(-1, 1, 2 * count, generator).view(-1, 2, 1)
    back = torch.linalg.inv(forth)
    grid = functional.affine_grid(torch.cat([back, -back @ shift], dim=2), [count, 1, size, size], align_corners=False)
    # A smooth random displacement, as in Simard et al. 2003, https://doi.org/10.1109/ICDAR.2003.1227801
    amount = _between(0, 0.08, count, generator).view(-1, 1, 1, 1)
    knots = amount * torch.randn(count, 2, 5, 5, generator=generator)
    bend = functional.interpolate(knots, size=(size, size), mode="bicubic", align_corners=True)
    sampled = functional.grid_sample(ink.float() / 255, grid + bend.permute(0, 2, 3, 1), align_corners=False)
    threshold = _between(0.2, 0.5, count, generator).view(-1, 1, 1, 1)
    return ((sampled - threshold) * 6 + 0.5).clamp(0, 1)


def _lower_resolution(stroke: Tensor, generator: Generator) -> Tensor:
    """Make some of the pictures as coarse as 12 pixels, and give them their size back."""
    size = stroke.shape[-1]
    sides = (12, 16, 24, 32)
    choice = torch.randint(len(sides) + 2, (len(stroke),), generator=generator)
    result = stroke.clone()
    for number, side in enumerate(sides):
        chosen = choice == number
        if chosen.any():
            small = functional.interpolate(stroke[chosen], size=(side, side), mode="area")
            result[chosen] = functional.interpolate(small, size=(size, size), mode="bicubic").clamp(0, 1)
    return result


def _blur(stroke: Tensor, generator: Generator) -> Tensor:
    """Blur each picture by a standard deviation of its own, up to 1.5 pixels."""
    sigma = _between(0.1, 1.5, len(stroke), generator).view(-1, 1)
    kernel = torch.exp(-(torch.arange(-4, 5) ** 2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum(dim=1, keepdim=True))[:, None, None]
    # Pictures as channels, so that each has its own kernel.
    columns = functional.conv2d(stroke.transpose(0, 1), kernel, padding=(0, 4), groups=len(stroke))
    rows = functional.conv2d(columns, kernel.transpose(2, 3), padding=(4, 0), groups=len(stroke))
    return rows.transpose(0, 1)


def _colour(stroke: Tensor, generator: Generator) -> Tensor:
    """Give ink and paper a colour, light ink on dark paper as often as not; add light from one side, and noise."""
    count, size = len(stroke), stroke.shape[-1]
    light, dark = _between(0.55, 1, count, generator), _between(0, 0.45, count, generator)
    swap = torch.rand(count, generator=generator) < 0.5
    tint = _between(0, 0.4, count, generator).view(1, -1, 1) * (torch.rand(2, count, 3, generator=generator) - 0.5)
    ink = (torch.where(swap, light, dark)[:, None] + tint[0]).view(-1, 3, 1, 1)
    paper = (torch.where(swap, dark, light)[:, None] + tint[1]).view(-1, 3, 1, 1)
    towards = _between(0, 2 * math.pi, count, generator).view(-1, 1, 1)
    ramp = torch.linspace(-1, 1, size)
    slope = towards.cos() * ramp.view(1, 1, -1) + towards.sin() * ramp.view(1, -1, 1)
    shade = 1 + _between(0, 0.25, count, generator).view(-1, 1, 1, 1) * slope[:, None]
    deviation = _between(0, 0.12, count, generator).view(-1, 1, 1, 1)
    noise = deviation * torch.randn(count, 3, size, size, generator=generator)
    return ((paper + (ink - paper) * stroke) * shade + noise).clamp(0, 1)

"""A scene of two objects: what its caption says, and its picture drawn smoothly with what the caption leaves open."""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]

SIZES = {"small": 0.13, "large": 0.2}  # radius, as a fraction of the picture
COLOURS: dict[str, Colour] = {
    "red": (220, 35, 35), "orange": (250, 140, 20), "yellow": (250, 225, 40), "green": (40, 165, 60),
    "cyan": (70, 215, 235), "blue": (40, 75, 225), "purple": (135, 50, 185), "pink": (250, 130, 190)}
BACKGROUNDS: dict[str, Colour] = {
    "white": (245, 245, 245), "grey": (140, 140, 140), "black": (15, 15, 15), "teal": (0, 95, 95),
    "navy": (20, 20, 80), "beige": (225, 205, 165)}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

OVERSAMPLING = 4  # drawn this much larger, then averaged down
APART, APART_JITTER, ACROSS_JITTER = 0.24, 0.02, 0.09  # of an object's centre from the middle, fractions of the picture
TILT = math.radians(14)
TINT = 12  # of 255, per channel


@dataclass(frozen=True)
class Thing:
    """One object, as a caption names it."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """`first` stands in `relation` to `second`, in front of `background`: all that a caption can say."""

    first: Thing
    relation: str
    second: Thing
    background: str

    def swapped(self) -> "Scene":
        """The same picture, told from the other object."""
        return Scene(self.second, OPPOSITE[self.relation], self.first, self.background)

    def caption(self) -> str:
        """The scene in words."""
        return f"a {self.first} {self.relation} a {self.second} on a {self.background} background"


def _star() -> np.ndarray:
    corner = np.arange(10)
    angle = corner * math.pi / 5 - math.pi / 2
    return np.stack([np.cos(angle), np.sin(angle)], 1) * np.where(corner % 2, 0.45, 1.15)[:, None]


def _cross(arm: float = 0.36) -> np.ndarray:
    quarter = np.array([(arm, -1), (arm, -arm), (1, -arm)])
    turns = [np.array([[0, -1], [1, 0]])] * 4
    corners = [quarter := quarter @ turn.T for turn in turns]
    return np.concatenate(corners)


# Corners in units of the radius, y down; the areas are close to a circle's, so that size is not told by shape.
POLYGONS = {
    "square": np.array([(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)]),
    "triangle": np.array([(0, -1.1), (1, 0.7), (-1, 0.7)]),
    "star": _star(),
    "cross": _cross(),
}


def _polygon(name: str) -> Callable[..., None]:
    def draw(canvas: ImageDraw.ImageDraw, centre: np.ndarray, radius: float, colour: Colour, tilt: float) -> None:
        turn = np.array([[math.cos(tilt), -math.sin(tilt)], [math.sin(tilt), math.cos(tilt)]])
        canvas.polygon([tuple(point) for point in POLYGONS[name] @ turn.T * radius + centre], fill=colour)
    return draw


def _circle(canvas: ImageDraw.ImageDraw, centre: np.ndarray, radius: float, colour: Colour, tilt: float) -> None:
    canvas.ellipse([*(centre - radius), *(centre + radius)], fill=colour)


def _ring(canvas: ImageDraw.ImageDraw, centre: np.ndarray, radius: float, colour: Colour, tilt: float) -> None:
    canvas.ellipse([*(centre - radius), *(centre + radius)], outline=colour, width=round(radius * 0.42))


SHAPES: dict[str, Callable[..., None]] = {"circle": _circle, "ring": _ring} | {n: _polygon(n) for n in POLYGONS}


def _centres(relation: str, rng: np.random.Generator) -> np.ndarray:
    """(2, 2): where the two objects stand, as (x, y) fractions of the picture."""
    along = np.array([-APART, APART]) + rng.uniform(-APART_JITTER, APART_JITTER, 2)
    across = rng.uniform(-ACROSS_JITTER, ACROSS_JITTER, 2)
    if relation in ("right of", "below"):
        along = -along
    return 0.5 + np.stack([across, along] if relation in ("above", "below") else [along, across], 1)


def _tinted(colour: Colour, rng: np.random.Generator) -> Colour:
    red, green, blue = np.clip(np.add(colour, rng.integers(-TINT, TINT + 1, 3)), 0, 255).tolist()
    return red, green, blue


def draw(scene: Scene, size: int, rng: np.random.Generator) -> Image.Image:
    """The scene as size × size RGB; `rng` chooses places, tilts and tints."""
    side = size * OVERSAMPLING
    image = Image.new("RGB", (side, side), _tinted(BACKGROUNDS[scene.background], rng))
    canvas = ImageDraw.Draw(image)
    for thing, centre in zip((scene.first, scene.second), _centres(scene.relation, rng), strict=True):
        colour, tilt = _tinted(COLOURS[thing.colour], rng), rng.uniform(-TILT, TILT)
        SHAPES[thing.shape](canvas, centre * side, SIZES[thing.size] * side, colour, tilt)
    return image.reduce(OVERSAMPLING)


def jpeg(image: Image.Image) -> bytes:
    """Encoded without colour subsampling, which would smear objects this small."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=92, subsampling=0)
    return stream.getvalue()

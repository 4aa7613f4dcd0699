"""Pictures of the miniature world: one coloured shape on a 56 x 56 image, with nuisances.

Nothing here depends on a font or on floating-point randomness beyond ``numpy.random.RandomState``,
whose stream is frozen; the bytes of a JPEG are those of the installed Pillow.
"""

import hashlib
import io

import numpy as np
from PIL import Image, ImageDraw

from lever_plus.mini.vocabulary import COLOR_NAMES, COLORS, SHAPES

SIZE = 56  #: pixels, width and height
_SCALE = 4  # supersampling of the drawing
BACKGROUNDS: tuple[tuple[int, int, int], ...] = (
    (202, 202, 202),
    (150, 152, 150),
    (208, 192, 162),
    (165, 185, 205),
    (168, 190, 160),
    (205, 175, 180),
    (128, 122, 112),
    (182, 172, 205),
)

Part = tuple[np.ndarray, int]  # (points [n, 2] in units of the radius, 1 to fill or 0 to cut out)


def rng_for(*keys: int | str) -> np.random.RandomState:
    """A random stream named by its keys: equal keys, equal stream; different keys, unrelated streams."""
    digest = hashlib.sha256("/".join(str(key) for key in keys).encode()).digest()
    return np.random.RandomState(np.frombuffer(digest, dtype="<u4"))


def _ellipse(cx: float, cy: float, rx: float, ry: float, start: float = 0.0, stop: float = 2 * np.pi) -> np.ndarray:
    angle = np.linspace(start, stop, 48)
    return np.stack([cx + rx * np.cos(angle), cy + ry * np.sin(angle)], axis=1)


def _polygon(n: int) -> np.ndarray:
    angle = -np.pi / 2 + np.arange(n) * 2 * np.pi / n
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _star(n: int, inner: float) -> np.ndarray:
    points = _polygon(2 * n)
    points[1::2] *= inner
    return points


def _box(x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])


def _turn(points: np.ndarray, angle: float) -> np.ndarray:
    cos, sin = np.cos(angle), np.sin(angle)
    return points @ np.array([[cos, sin], [-sin, cos]])


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 64)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y], axis=1) / 16.5


def _shape_parts() -> dict[str, list[Part]]:
    bar = 0.3
    plus = [(_box(-bar, -1, bar, 1), 1), (_box(-1, -bar, 1, bar), 1)]
    head = np.array([[0.0, -1.0], [0.85, -0.1], [-0.85, -0.1]])
    return {
        "disc": [(_ellipse(0, 0, 0.95, 0.95), 1)],
        "ring": [(_ellipse(0, 0, 1, 1), 1), (_ellipse(0, 0, 0.52, 0.52), 0)],
        "half_disc": [(_ellipse(0, 0.45, 1.05, 1.15, np.pi, 2 * np.pi), 1)],
        "triangle": [(_polygon(3) * 1.1, 1)],
        "square": [(_box(-0.85, -0.85, 0.85, 0.85), 1)],
        "hexagon": [(_polygon(6), 1)],
        "star4": [(_star(4, 0.32) * 1.15, 1)],
        "star5": [(_star(5, 0.45) * 1.1, 1)],
        "star8": [(_star(8, 0.62) * 1.05, 1)],
        "plus": plus,
        "saltire": [(_turn(points, np.pi / 4), value) for points, value in plus],
        "tee": [(_box(-1, -1, 1, -0.4), 1), (_box(-bar, -1, bar, 1), 1)],
        "arrow": [(head, 1), (_box(-0.28, -0.15, 0.28, 1), 1)],
        "double_arrow": [(head, 1), (-head, 1), (_box(-0.28, -0.15, 0.28, 0.15), 1)],
        "chevron": [(np.array([[0, -0.9], [1, 0.2], [1, 0.9], [0, -0.15], [-1, 0.9], [-1, 0.2]]), 1)],
        "one_bar": [(_box(-1, -0.33, 1, 0.33), 1)],
        "two_bars": [(_box(-1, -0.8, 1, -0.25), 1), (_box(-1, 0.25, 1, 0.8), 1)],
        "three_bars": [(_box(-1, y - 0.19, 1, y + 0.19), 1) for y in (-0.75, 0.0, 0.75)],
        "crescent": [(_ellipse(0, 0, 1, 1), 1), (_ellipse(0.5, -0.1, 0.8, 0.8), 0)],
        "heart": [(_heart(), 1)],
        "drop": [(_ellipse(0, 0.3, 0.72, 0.7), 1), (np.array([[0, -1.1], [0.62, -0.05], [-0.62, -0.05]]), 1)],
        "ell": [(_box(-0.75, -1, -0.15, 1), 1), (_box(-0.75, 0.4, 0.85, 1), 1)],
        "you": [(_box(-0.95, -1, -0.4, 1), 1), (_box(0.4, -1, 0.95, 1), 1), (_box(-0.95, 0.45, 0.95, 1), 1)],
        "zed": [
            (_box(-0.9, -1, 0.9, -0.5), 1),
            (_box(-0.9, 0.5, 0.9, 1), 1),
            (np.array([[0.3, -0.6], [0.9, -0.6], [-0.3, 0.6], [-0.9, 0.6]]), 1),
        ],
    }


_PARTS = _shape_parts()


def render(shape: int, color: int, rng: np.random.RandomState) -> Image.Image:
    """One 56 x 56 RGB picture of shape ``shape`` (0..23) in colour ``color`` (0..7).

    Nuisances drawn from ``rng``: background (8), a clutter line, pixel noise, shift up to 5 px, rotation
    up to 0.2 rad, radius 13 to 20 px, a slight change of the colour.
    """
    big = SIZE * _SCALE
    background = np.array(BACKGROUNDS[rng.randint(len(BACKGROUNDS))]) + rng.randint(-8, 9, size=3)
    image = Image.new("RGB", (big, big), tuple(int(v) for v in background.clip(0, 255)))
    line = [tuple(int(v) for v in rng.randint(0, big, size=2)) for _ in range(2)]
    line_color = tuple(int(v) for v in rng.randint(60, 200, size=3))
    in_front = rng.random_sample() < 0.5
    if not in_front:
        ImageDraw.Draw(image).line(line, fill=line_color, width=_SCALE)

    radius, angle = rng.uniform(13, 20), rng.uniform(-0.2, 0.2)
    center = SIZE / 2 + rng.uniform(-5, 5, size=2)
    mask = Image.new("L", (big, big), 0)
    draw = ImageDraw.Draw(mask)
    for points, value in _PARTS[SHAPES[shape]]:
        placed = (_turn(points, angle) * radius + center) * _SCALE
        draw.polygon([(float(x), float(y)) for x, y in placed], fill=255 * value)
    fill = np.array(COLORS[COLOR_NAMES[color]]) + rng.randint(-10, 11, size=3)
    image.paste(tuple(int(v) for v in fill.clip(0, 255)), mask=mask)
    if in_front:
        ImageDraw.Draw(image).line(line, fill=line_color, width=_SCALE)

    pixels = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX), dtype=np.int16)
    pixels = pixels + rng.randint(-9, 10, size=pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def jpeg_bytes(image: Image.Image) -> bytes:
    """The picture as a JPEG file of quality 90."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=90)
    return buffer.getvalue()


def render_batch(shapes: np.ndarray, colors: np.ndarray, *keys: int | str) -> list[Image.Image]:
    """Pictures as they look after the JPEG round trip; picture i uses the stream named ``(*keys, i)``."""
    images = []
    for index, (shape, color) in enumerate(zip(shapes, colors, strict=True)):
        data = jpeg_bytes(render(int(shape), int(color), rng_for(*keys, index)))
        images.append(Image.open(io.BytesIO(data)).convert("RGB"))
    return images

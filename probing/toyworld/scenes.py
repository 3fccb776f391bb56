"""Procedural 3-D scenes: one to four solids on a ground plane, ray-cast with exact depth and labels."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Arrays = dict[str, Array]

SIZE = 48
"""Side of an image in pixels."""
MAX_SOLIDS = 4
SHAPES = ("sphere", "cube", "cone", "cylinder")
BACKGROUNDS = ("sky", "wall")
FLOORS = ("grass", "sand", "tiles")
CLASSES = (*SHAPES, *BACKGROUNDS, *FLOORS)
"""Names of the semantic classes, in the order of their codes; the solids come first."""
COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
SIZES = ("small", "large")
SKY_DEPTH = 100.0
"""Depth of the sky, in the scenes' unit of length."""

_RGB = np.array(
    [(214, 40, 40), (30, 140, 60), (45, 75, 215), (240, 205, 40), (150, 50, 170), (235, 235, 235)], dtype=np.float32
)
_FLOOR_RGB = np.array([(96, 150, 70), (214, 186, 130), (150, 150, 155)], dtype=np.float32)
_WALL_RGB = np.array([(186, 160, 150), (150, 165, 170), (200, 195, 170)], dtype=np.float32)
_CHUNK = 128  # scenes per random stream, few enough for the CPU cache
_TAN = float(np.tan(np.radians(30.0)))  # half the field of view
_MIN_VISIBLE = 14  # pixels of a solid that must stay unoccluded
_FAR = np.float32(1e6)


@dataclass
class Scenes:
    """A batch of rendered scenes with their descriptions.

    Arrays that describe solids have one column per solid; columns from `count` on are -1 or NaN.

    Attributes:
        images: (n, 48, 48, 3) uint8, RGB.
        depth: (n, 48, 48) float32, distance along the optical axis; the sky has `SKY_DEPTH`.
        semantic: (n, 48, 48) uint8, indices into `CLASSES`.
        instance: (n, 48, 48) uint8, 0 for stuff, k + 1 for solid k.
        count: (n,) number of solids, 1 to 4.
        shape: (n, 4) indices into `SHAPES`.
        colour: (n, 4) indices into `COLOURS`; no two solids of a scene share a colour.
        size: (n, 4) indices into `SIZES`.
        position: (n, 4, 2) image column of the solid's centre in pixels, and its distance along the optical axis.
        background: (n,) indices into `BACKGROUNDS`.
        floor: (n,) indices into `FLOORS`.
    """

    images: Array
    depth: Array
    semantic: Array
    instance: Array
    count: Array
    shape: Array
    colour: Array
    size: Array
    position: Array
    background: Array
    floor: Array

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: slice | Array) -> Self:
        """Selects scenes."""
        return type(self)(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    @property
    def inverse_depth(self) -> Array:
        """Returns 1 / depth, and 0 for the sky, (n, 48, 48) float32."""
        return np.where(self.depth >= SKY_DEPTH, 0, 1 / self.depth).astype(np.float32)


def generate(n: int, seed: int) -> Scenes:
    """Renders n scenes, determined by the seed; a longer batch starts with the same scenes."""
    chunks = [_chunk(np.random.default_rng([seed, index])) for index in range(-(-n // _CHUNK))]
    names = [field.name for field in fields(Scenes)]
    return Scenes(**{name: np.concatenate([chunk[name] for chunk in chunks])[:n] for name in names})


def _chunk(rng: np.random.Generator) -> Arrays:
    """Samples one chunk; scenes in which solids touch or are hidden get a new layout with the same content."""
    scenes = _sample_content(rng)
    layout = _sample_layout(rng, scenes)
    pending = np.arange(_CHUNK)
    result: Arrays = {}
    while len(pending):
        part = {name: value[pending] for name, value in (scenes | layout).items()}
        rendered = _render(part, rng)
        slots = np.arange(1, MAX_SOLIDS + 1)
        visible = (rendered["instance"].reshape(len(pending), -1, 1) == slots).sum(1)
        exists = slots[None] <= part["count"][:, None]
        valid = (~exists | (visible >= _MIN_VISIBLE)).all(1) & _separate(part)
        for name, value in rendered.items():
            result.setdefault(name, np.zeros((_CHUNK, *value.shape[1:]), value.dtype))[pending[valid]] = value[valid]
        pending = pending[~valid]
        for name, value in _sample_layout(rng, scenes).items():
            layout[name][pending] = value[pending]
    content = {name: scenes[name] for name in ("count", "shape", "colour", "size", "background", "floor")}
    unused = np.arange(MAX_SOLIDS)[None] >= content["count"][:, None]
    for name in ("shape", "colour", "size"):
        content[name] = np.where(unused, -1, content[name])
    result["position"][unused] = np.nan
    return result | content


def _sample_content(rng: np.random.Generator) -> Arrays:
    """Samples the content of scenes, once, so that rejected layouts do not bias it."""
    solids = (_CHUNK, MAX_SOLIDS)
    return {
        "count": rng.integers(1, MAX_SOLIDS + 1, _CHUNK),
        "shape": rng.integers(0, len(SHAPES), solids),
        "colour": rng.permuted(np.tile(np.arange(len(COLOURS)), (_CHUNK, 1)), axis=1)[:, :MAX_SOLIDS],
        "size": rng.integers(0, len(SIZES), solids),
        "background": rng.integers(0, len(BACKGROUNDS), _CHUNK),
        "floor": rng.integers(0, len(FLOORS), _CHUNK),
        "wall": rng.integers(0, len(_WALL_RGB), _CHUNK),
        "light": rng.uniform(-1, 1, (_CHUNK, 2)),
        "tint": rng.uniform(-18, 18, (_CHUNK, 3)),
        "tone": rng.uniform(0.82, 1.08, (_CHUNK, MAX_SOLIDS)),
    }


def _sample_layout(rng: np.random.Generator, scenes: Arrays) -> Arrays:
    """Samples camera and positions; solids are in separate columns of the view, in random order."""
    solids = (_CHUNK, MAX_SOLIDS)
    slots = rng.permuted(np.tile(np.arange(MAX_SOLIDS), (_CHUNK, 1)), axis=1)
    horizontal = (slots + 0.5 + rng.uniform(-0.28, 0.28, solids)) / MAX_SOLIDS * 1.8 - 0.9
    distance = rng.uniform(2.9, 6.8, solids)
    radius = np.where(scenes["size"] == 0, rng.uniform(0.42, 0.5, solids), rng.uniform(0.72, 0.84, solids))
    return {
        "height": rng.uniform(1.3, 2.4, _CHUNK),
        "pitch": np.radians(rng.uniform(6, 20, _CHUNK)),
        "back": rng.uniform(10, 15, _CHUNK),
        "x": horizontal * distance * _TAN,
        "z": distance,
        "radius": radius,
        "turn": rng.uniform(0, np.pi / 2, solids),
    }


def _separate(part: Arrays) -> NDArray[np.bool_]:
    """Checks that no two solids of a scene touch."""
    separate = np.ones(len(part["count"]), bool)
    for i in range(MAX_SOLIDS):
        for j in range(i):
            gap = np.hypot(part["x"][:, i] - part["x"][:, j], part["z"][:, i] - part["z"][:, j])
            min_gap = 1.15 * (part["radius"][:, i] + part["radius"][:, j])
            separate &= (part["count"] <= i) | (gap > min_gap)
    return separate


def _rays(part: Arrays) -> tuple[Array, Array, Array]:
    """Returns the components (n, 2304) of the viewing rays in world axes, scaled to one unit of depth."""
    step = ((np.arange(SIZE, dtype=np.float32) + 0.5) / SIZE * 2 - 1) * np.float32(_TAN)
    u, v = np.tile(step, SIZE)[None], np.repeat(-step, SIZE)[None]
    sine = np.sin(part["pitch"]).astype(np.float32)[:, None]
    cosine = np.cos(part["pitch"]).astype(np.float32)[:, None]
    return np.broadcast_to(u, (len(sine), SIZE * SIZE)), v * cosine - sine, cosine + v * sine


def _render(part: Arrays, rng: np.random.Generator) -> Arrays:
    """Ray-casts scenes: a ray is camera + t * direction, and t is the depth."""
    part = {name: value.astype(np.float32) if value.dtype == np.float64 else value for name, value in part.items()}
    n = len(part["count"])
    dx, dy, dz = _rays(part)
    height = part["height"][:, None]
    light = np.stack([part["light"][:, 0], np.full(n, 1.4, np.float32), part["light"][:, 1] * 0.5 - 0.7], axis=1)
    light /= np.linalg.norm(light, axis=1, keepdims=True)
    depth, semantic, colour = _render_background(part, dx, dy, dz, height, rng)
    instance = np.zeros((n, SIZE * SIZE), np.uint8)
    for slot in range(MAX_SOLIDS):
        for code in range(len(SHAPES)):
            rows = np.flatnonzero((part["count"] > slot) & (part["shape"][:, slot] == code))
            if not len(rows):
                continue
            solid = {name: part[name][rows, slot, None] for name in ("x", "z", "radius", "turn")}
            t, normal = _INTERSECTIONS[code](solid, height[rows], dx[rows], dy[rows], dz[rows])
            front = t < depth[rows]
            shade = 0.45 + 0.6 * np.maximum(sum(normal[k] * light[rows, k, None] for k in range(3)), 0)
            base = _RGB[part["colour"][rows, slot]] * part["tone"][rows, slot, None]
            row, pixel = np.nonzero(front)
            depth[rows[row], pixel] = t[row, pixel]
            semantic[rows[row], pixel] = code
            instance[rows[row], pixel] = slot + 1
            colour[rows[row], pixel] = base[row] * shade[row, pixel, None]
    colour += rng.normal(0, 4, colour.shape[:2]).astype(np.float32)[..., None]
    forward = part["z"] * np.cos(part["pitch"])[:, None]
    axis = forward + np.sin(part["pitch"])[:, None] * (part["height"][:, None] - part["radius"])
    column = (part["x"] / axis / _TAN + 1) * SIZE / 2
    shape = (n, SIZE, SIZE)
    return {
        "images": np.clip(colour, 0, 255).astype(np.uint8).reshape(*shape, 3),
        "depth": depth.reshape(shape),
        "semantic": semantic.reshape(shape),
        "instance": instance.reshape(shape),
        "position": np.stack([column, axis], axis=2).astype(np.float32),
    }


def _render_background(
    part: Arrays, dx: Array, dy: Array, dz: Array, height: Array, rng: np.random.Generator
) -> tuple[Array, Array, Array]:
    """Returns depth, classes and colours of ground, wall and sky."""
    n = len(height)
    ground = np.where(dy < -1e-4, -height / np.minimum(dy, -1e-4), _FAR)
    wall = np.where(part["background"][:, None] == 1, part["back"][:, None] / dz, _FAR)
    horizon = np.where(ground > 60, _FAR, ground)  # the sky begins beyond
    depth = np.minimum(horizon, wall)
    on_floor, on_wall = horizon <= wall, wall < horizon
    on_floor &= depth < _FAR
    floor = part["floor"][:, None]
    semantic = np.where(on_floor, len(SHAPES) + len(BACKGROUNDS) + floor, np.where(on_wall, 5, 4)).astype(np.uint8)
    gx, gz = dx * depth, dz * depth
    grain = rng.standard_normal(gx.shape, dtype=np.float32)
    checks = np.where((np.floor(gx) + np.floor(gz)) % 2 == 0, 26, -26)
    texture = np.select([floor == 0, floor == 1], [grain * 22, grain * 8], checks).astype(np.float32)
    solids = np.arange(MAX_SOLIDS)[None] < part["count"][:, None]
    for slot in range(MAX_SOLIDS):  # contact shadows
        x, z, radius = (part[name][:, slot, None] for name in ("x", "z", "radius"))
        near = (gx - x) ** 2 + (gz - z) ** 2 < (1.25 * radius) ** 2
        texture -= 55 * (near & solids[:, slot, None])
    ground_colour = _FLOOR_RGB[part["floor"]][:, None] + texture[..., None]
    wall_colour = _WALL_RGB[part["wall"]][:, None] - 14 * (np.floor(gx * 0.7) % 2)[..., None]
    fade = np.linspace(0, 1, SIZE, dtype=np.float32).repeat(SIZE)[None, :, None]
    sky_colour = np.array([105, 165, 225], np.float32) + fade * np.array([130, 80, 25], np.float32)
    sky_colour = np.broadcast_to(sky_colour, (n, SIZE * SIZE, 3))
    colour = np.where(on_floor[..., None], ground_colour, np.where(on_wall[..., None], wall_colour, sky_colour))
    colour = colour + part["tint"][:, None] * (semantic < 9)[..., None]
    return np.where(depth >= _FAR, np.float32(SKY_DEPTH), depth), semantic, colour.astype(np.float32)


Normal = tuple[Array, Array, Array]


def _roots(a: Array, b: Array, c: Array) -> tuple[Array, Array, NDArray[np.bool_]]:
    """Returns both solutions of a t² + 2 b t + c = 0, and whether they are real."""
    discriminant = b * b - a * c
    root = np.sqrt(np.maximum(discriminant, 0))
    safe = np.where(np.abs(a) < 1e-6, np.float32(1e-6), a)
    return (-b - root) / safe, (-b + root) / safe, discriminant > 0


def _sphere(s: Arrays, height: Array, dx: Array, dy: Array, dz: Array) -> tuple[Array, Normal]:
    ox, oy, oz = -s["x"], height - s["radius"], -s["z"]
    t, _, hit = _roots(
        dx * dx + dy * dy + dz * dz, dx * ox + dy * oy + dz * oz, ox * ox + oy * oy + oz * oz - s["radius"] ** 2
    )
    r = s["radius"]
    return np.where(hit, t, _FAR), ((ox + t * dx) / r, (oy + t * dy) / r, (oz + t * dz) / r)


def _cube(s: Arrays, height: Array, dx: Array, dy: Array, dz: Array) -> tuple[Array, Normal]:
    half = s["radius"] * np.float32(0.85)
    cosine, sine = np.cos(s["turn"]), np.sin(s["turn"])
    origin = [-s["x"] * cosine - s["z"] * sine, height - half, s["x"] * sine - s["z"] * cosine]
    ray = [dx * cosine + dz * sine, dy, -dx * sine + dz * cosine]
    entry = np.full(dx.shape, -_FAR, np.float32)
    leave = np.full(dx.shape, _FAR, np.float32)
    axis = np.zeros(dx.shape, np.int8)
    for k in range(3):
        step = np.where(np.abs(ray[k]) < 1e-6, np.float32(1e-6), ray[k])
        one, two = (-half - origin[k]) / step, (half - origin[k]) / step
        low = np.minimum(one, two)
        axis = np.where(low > entry, np.int8(k), axis)
        entry, leave = np.maximum(entry, low), np.minimum(leave, np.maximum(one, two))
    side = [np.where(axis == k, -np.sign(ray[k]), np.float32(0)) for k in range(3)]
    normal = (side[0] * cosine - side[2] * sine, side[1], side[0] * sine + side[2] * cosine)
    return np.where(entry < leave, entry, _FAR), normal


def _cylinder(s: Arrays, height: Array, dx: Array, dy: Array, dz: Array) -> tuple[Array, Normal]:
    radius, top = s["radius"] * np.float32(0.72), s["radius"] * np.float32(2.0)
    t, _, hit = _roots(dx * dx + dz * dz, -dx * s["x"] - dz * s["z"], s["x"] ** 2 + s["z"] ** 2 - radius**2)
    y = height + t * dy
    t = np.where(hit & (y > 0) & (y < top), t, _FAR)
    lid = (top - height) / np.where(np.abs(dy) < 1e-6, np.float32(1e-6), dy)
    inside = (lid * dx - s["x"]) ** 2 + (lid * dz - s["z"]) ** 2 < radius**2
    lid = np.where(inside & (lid > 0), lid, _FAR)
    on_lid = lid < t
    nx, nz = (t * dx - s["x"]) / radius, (t * dz - s["z"]) / radius
    return np.minimum(t, lid), (np.where(on_lid, 0, nx), np.where(on_lid, np.float32(1), 0), np.where(on_lid, 0, nz))


def _cone(s: Arrays, height: Array, dx: Array, dy: Array, dz: Array) -> tuple[Array, Normal]:
    top = s["radius"] * np.float32(2.2)
    slope = s["radius"] / top  # radius = slope * (top - y)
    oy = height - top
    a = dx * dx + dz * dz - (slope * dy) ** 2
    b = -dx * s["x"] - dz * s["z"] - slope**2 * dy * oy
    c = s["x"] ** 2 + s["z"] ** 2 - (slope * oy) ** 2
    best = np.full(dx.shape, _FAR, np.float32)
    one, two, hit = _roots(a, b, c)
    for t in (one, two):
        y = height + t * dy
        best = np.where(hit & (t > 0) & (y > 0) & (y < top) & (t < best), t, best)
    nx, nz = best * dx - s["x"], best * dz - s["z"]
    norm = np.maximum(np.sqrt(nx * nx + nz * nz), 1e-6)
    scale = 1 / np.sqrt(1 + slope**2)
    return best, (nx / norm * scale, slope * scale, nz / norm * scale)


_INTERSECTIONS = (_sphere, _cube, _cone, _cylinder)


def batches(scenes: Scenes, batch: int, steps: int, seed: int) -> Iterator[Scenes]:
    """Yields `steps` batches of shuffled scenes, over as many epochs as needed."""
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(len(scenes)) for _ in range(-(-steps * batch // len(scenes)))])
    for step in range(steps):
        yield scenes[order[step * batch : (step + 1) * batch]]

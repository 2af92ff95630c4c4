"""Songs with known stems, made from a seed: `song(7)` is the same song everywhere.

    python -m tests.tools.synth song.wav [--seed N] [--seconds N]

writes the mix of one. A song is an easy one: no stem is buried, each has its range and its side.

A band plays a chord progression, in sections that thin out and come back:

    plan ─┬─ drums ──┐
          ├─ bass ───┤
          ├─ other ──┼─ equalizer, reverb, level ── stems ── their sum is the mix
          └─ vocals ─┘

The drums, the timbres, the grooves and the vowels are tables. A pattern is a bar of
16 steps: `.` is a rest, `-` prolongs the note before, and any other sign begins a note.

Shapes: `[T]` mono and `[2, T]` stereo samples at 44.1 kHz. The parts draw from generators of their
own, so that a change to the drums leaves the singer alone.
"""

from __future__ import annotations

import argparse
import math
import wave
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.random import Generator

RATE = 44_100  # Hz
SOURCES = ("drums", "bass", "other", "vocals")
STEPS = 16  # of a bar of four beats
SECTION = 2  # bars
FADE = 441  # samples: a song neither starts nor ends with a click
HIGHEST = 15_000  # Hz: no harmonic is above
SPEAKER = 5_000  # Hz: a guitar's goes no higher
HELD = 1e9  # seconds: a decay that never comes

Array = np.ndarray
Range = tuple[float, float]


# --- The plan that the four parts share ----------------------------------------------------------

SCALES = ((0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10), (0, 2, 3, 5, 7, 9, 10))  # semitones
PROGRESSIONS = (  # degrees of the scale, a bar each
    (0, 4, 5, 3),
    (0, 5, 3, 4),
    (5, 3, 0, 4),
    (0, 3, 4, 3),
    (0, 0, 3, 4),
    (1, 4, 0, 0),
    (0, 6, 5, 6),
    (0, 2, 3, 4),
)
# Who plays in a section, by the initials of the sources; most of the time everybody does.
CASTS = ("dbov", "dbov", "dbov", "dbov", "dbov", "dbov", "dbo", "bov", "dbv", "dov")


@dataclass(frozen=True)
class Plan:
    """A song before a note is played: times in seconds, pitches in semitones (69 is 440 Hz)."""

    length: int  # samples
    step: float  # seconds of a sixteenth
    swing: float  # by which every other sixteenth is late, in steps
    key: float
    scale: Sequence[int]
    chords: Sequence[int]  # degrees, a bar each
    casts: Sequence[str]  # of the sections

    @property
    def bars(self) -> int:
        return math.ceil(self.length / RATE / (STEPS * self.step))

    def playing(self, source: str) -> list[int]:
        """The bars in which `source` plays."""
        return [bar for bar in range(self.bars) if source[0] in self.casts[bar // SECTION]]

    def time(self, bar: int, step: float) -> float:
        """Seconds at which a step of a bar begins."""
        late = self.swing if step % 2 == 1 else 0.0
        return (STEPS * bar + step + late) * self.step

    def chord(self, bar: int) -> int:
        return self.chords[bar % len(self.chords)]

    def pitch(self, degree: int) -> float:
        """Semitones of a degree of the scale, which may be below 0 or above 6."""
        return self.key + 12 * (degree // 7) + self.scale[degree % 7]


def make_plan(rng: Generator, seconds: float) -> Plan:
    step = 60 / rng.uniform(76, 150) / 4
    sections = math.ceil(seconds / (STEPS * step) / SECTION)
    casts = [CASTS[index] for index in rng.integers(len(CASTS), size=sections)]
    casts[int(rng.integers(max(1, sections - 1)))] = "dbov"  # nobody is silent all the time
    return Plan(
        length=int(seconds * RATE),
        step=step,
        swing=float(rng.choice([0, 0, rng.uniform(0.1, 0.35)])),
        key=36 + rng.integers(12) + rng.normal(0, 0.1),  # no band is quite in tune
        scale=choice(rng, SCALES),
        chords=choice(rng, PROGRESSIONS),
        casts=casts,
    )


def choice(rng: Generator, options: Sequence) -> object:
    """One of `options`, which numpy would make an array of."""
    return options[rng.integers(len(options))]


class Event(NamedTuple):
    sign: str
    step: int
    steps: int


def events(pattern: str) -> Iterator[Event]:
    """The notes of a bar."""
    for step, sign in enumerate(pattern):
        if sign not in ".-":
            rest = pattern[step + 1 :]
            yield Event(sign, step, 1 + len(rest) - len(rest.lstrip("-")))


# --- Sounds --------------------------------------------------------------------------------------


def hertz(semitones: float | Array) -> float | Array:
    return 440 * 2 ** ((semitones - 69) / 12)


def decibels(value: float | Array) -> float | Array:
    """The factor of a gain in decibels."""
    return 10 ** (value / 20)


def silence(length: int) -> Array:
    return np.zeros((2, length), np.float32)


def place(track: Array, sound: Array, seconds: float) -> None:
    """Add `sound` to `track` from a time on, as far as the track goes."""
    at = max(0, int(seconds * RATE))
    part = track[:, at : at + sound.shape[-1]]
    part += sound[..., : part.shape[-1]]


def panned(sound: Array, place: float) -> Array:
    """Stereo of equal power, from -1 (left) to 1 (right)."""
    angle = (place + 1) * math.pi / 4
    gains = np.array([[math.cos(angle)], [math.sin(angle)]], np.float32) * math.sqrt(2)
    return gains * sound


def band(frequencies: Array, low: float | Array, high: float | Array, order: int = 4) -> Array:
    """Gains of a band-pass with edges in hertz."""
    ratio = np.maximum(frequencies, 1) / low, frequencies / high
    return 1 / np.sqrt((1 + ratio[0] ** (-2 * order)) * (1 + ratio[1] ** (2 * order)))


def filtered_noise(rng: Generator, length: int, low: float, high: float) -> Array:
    """Noise between two edges in hertz, with a deviation of 1."""
    spectrum = np.fft.rfft(rng.standard_normal(length))
    spectrum *= band(np.fft.rfftfreq(length, 1 / RATE), low, high)
    noise = np.fft.irfft(spectrum, length)
    return noise / noise.std()


# --- Drums ---------------------------------------------------------------------------------------


class Tone(NamedTuple):
    """Ranges of a tone that falls to its pitch."""

    hz: Range
    fall: Range  # how much higher it starts, as a factor
    ring: Range  # seconds in which it decays to 1/e
    partials: Sequence[float] = (1,)  # their frequencies, as factors


class Noise(NamedTuple):
    """Ranges of a band of noise."""

    low: Range  # Hz
    high: Range
    decay: Range  # seconds to 1/e
    share: Range  # of the sound, from 0 to 1


class Drum(NamedTuple):
    """The ranges from which a drum of a kit is drawn."""

    tone: Tone
    noise: Noise
    level: float
    pan: float = 0.0


METAL = (1.0, 1.34, 1.48, 1.93, 2.54, 2.63, 3.1, 3.42)  # no two partials of a cymbal agree

DRUMS = {
    "kick": Drum(
        Tone((44, 60), (3.0, 7.0), (0.08, 0.18)),
        Noise((800, 3000), (4000, 9000), (0.004, 0.02), (0.05, 0.25)),
        level=1.5,
    ),
    "snare": Drum(
        Tone((150, 260), (1.1, 1.6), (0.03, 0.12), (1, 1.6, 2.2)),
        Noise((250, 1500), (6000, 14000), (0.05, 0.18), (0.45, 0.85)),
        level=1.0,
        pan=0.1,
    ),
    "clap": Drum(
        Tone((300, 400), (1.0, 1.0), (0.01, 0.02)),
        Noise((700, 1100), (2500, 6000), (0.05, 0.12), (0.95, 1.0)),
        level=0.9,
        pan=0.2,
    ),
    "rim": Drum(
        Tone((400, 900), (1.0, 1.2), (0.01, 0.03), (1, 2.3)),
        Noise((1500, 3000), (6000, 9000), (0.005, 0.02), (0.2, 0.5)),
        level=0.6,
        pan=0.3,
    ),
    "hat": Drum(
        Tone((2800, 4200), (1.0, 1.0), (0.015, 0.05), METAL),
        Noise((5000, 8500), (14000, 18000), (0.015, 0.06), (0.5, 0.9)),
        level=0.35,
        pan=0.4,
    ),
    "open": Drum(
        Tone((2800, 4200), (1.0, 1.0), (0.1, 0.3), METAL),
        Noise((5000, 8000), (14000, 18000), (0.12, 0.35), (0.5, 0.9)),
        level=0.35,
        pan=0.4,
    ),
    "ride": Drum(
        Tone((2200, 3500), (1.0, 1.0), (0.25, 0.6), METAL),
        Noise((4000, 7000), (12000, 17000), (0.1, 0.4), (0.2, 0.5)),
        level=0.25,
        pan=0.5,
    ),
    "shaker": Drum(
        Tone((3000, 4000), (1.0, 1.0), (0.01, 0.02)),
        Noise((4500, 8000), (10000, 16000), (0.02, 0.05), (0.95, 1.0)),
        level=0.3,
        pan=0.6,
    ),
    "crash": Drum(
        Tone((2200, 3200), (1.0, 1.0), (0.3, 0.7), METAL),
        Noise((2500, 5000), (12000, 18000), (0.25, 0.7), (0.6, 0.9)),
        level=0.35,
        pan=0.5,
    ),
    "tom": Drum(
        Tone((75, 130), (1.2, 1.8), (0.1, 0.3), (1, 1.5)),
        Noise((300, 900), (2000, 6000), (0.02, 0.06), (0.1, 0.3)),
        level=1.1,
        pan=0.5,
    ),
    "low": Drum(
        Tone((55, 85), (1.2, 1.8), (0.15, 0.35), (1, 1.5)),
        Noise((300, 900), (2000, 6000), (0.02, 0.06), (0.1, 0.3)),
        level=1.2,
        pan=0.5,
    ),
}

# X is an accent, x a hit, o a soft one.
GROOVES = (
    {"kick": "X.......X.x.....", "snare": "....X.......X...", "hat": "x.x.x.x.x.x.x.x."},
    {"kick": "X.....x.X.......", "snare": "....X.......X..o", "hat": "X.o.X.o.X.o.X.o."},
    {"kick": "X...X...X...X...", "clap": "....X.......X...", "open": "..x...x...x...x.",
     "shaker": "oxoxoxoxoxoxoxox"},
    {"kick": "X..x..x.....x...", "snare": "....X..o.o..X...", "hat": "xoxoxoxoxoxoxoxo"},
    {"kick": "X.........x.....", "snare": "........X.......", "hat": "x.o.x.o.x.oox.o."},
    {"kick": "X..X..X...X.....", "clap": "........X.......", "hat": "xxxoxxxoxxxxxoxo"},
    {"kick": "X...x...X...x...", "rim": "x..x..x...x..x..", "shaker": "xoxoxoxoxoxoxoxo"},
    {"kick": "X.x.......xx....", "snare": "....X..o.o..X..o", "ride": "x.x.x.x.x.x.x.x."},
    {"kick": "X.....X.........", "snare": "....X.......X...", "ride": "x...x.x.x...x.x."},
    {"kick": "X.......X.......", "tom": "..x..x....x..x..", "snare": "....x.......x...",
     "hat": "x...x...x...x..."},
)  # fmt: skip
ACCENTS = {"X": 1.0, "x": 0.7, "o": 0.3}
FALL = 0.03  # seconds in which a pitch falls
FILLS = ("snare", "snare", "tom", "low")


def strike(drum: Drum, rng: Generator) -> Array:
    """One sound of a drum, with values drawn from its ranges."""
    hz, fall, ring = (rng.uniform(*values) for values in drum.tone[:3])
    low, high, decay, share = (rng.uniform(*values) for values in drum.noise)
    length = int(RATE * min(2.5, 0.02 + 6 * max(ring, decay)))
    time = np.arange(length) / RATE
    # The pitch falls within FALL: the integral of hz * (1 + (fall - 1) * exp(-time / FALL)).
    cycles = hz * (time + (fall - 1) * FALL * (1 - np.exp(-time / FALL)))
    tone = sum(np.sin(2 * np.pi * cycles * factor) for factor in drum.tone.partials)
    tone *= np.exp(-time / ring) / len(drum.tone.partials) ** 0.5
    hiss = filtered_noise(rng, length, low, high) * np.exp(-time / decay) * 0.5
    sound = (1 - share) * tone + share * hiss
    sound *= np.minimum(1, time / 5e-4) * np.minimum(1, (length / RATE - time) / 0.01)
    return (drum.level * np.tanh(rng.uniform(1, 3) * sound)).astype(np.float32)


def drums(plan: Plan, rng: Generator) -> Array:
    track = silence(plan.length)
    side = rng.choice([-1, 1])  # the drummer's view or the listener's
    kit = {
        name: [panned(strike(drum, copy), side * drum.pan) for copy in twins(rng)]
        for name, drum in DRUMS.items()
    }
    groove = choice(rng, GROOVES)
    bars = plan.playing("drums")
    for bar in bars:
        last = (bar + 1) % SECTION == 0
        patterns = with_fill(groove, rng) if last and rng.random() < 0.6 else dict(groove)
        if bar - 1 not in bars or (not last and rng.random() < 0.3):
            patterns["crash"] = "X" + "." * (STEPS - 1)
        for name, pattern in patterns.items():
            for sign, step, _ in events(pattern):
                level = ACCENTS[sign] * rng.uniform(0.8, 1.1)
                late = rng.normal(0, 0.003)
                place(track, level * choice(rng, kit[name]), plan.time(bar, step) + late)
    return track


def twins(rng: Generator) -> list[Generator]:
    """Two generators that draw the same ranges at first: no drummer hits twice alike."""
    seed = int(rng.integers(2**32))
    return [np.random.default_rng(seed), np.random.default_rng(seed)]


def with_fill(groove: dict[str, str], rng: Generator) -> dict[str, str]:
    """The groove with a roll over the drums in its last beats."""
    start = STEPS - int(rng.choice([2, 4, 8]))
    fill = {name: pattern[:start] + "." * (STEPS - start) for name, pattern in groove.items()}
    for step in range(start, STEPS):
        if rng.random() < 0.8:
            name = FILLS[(step - start) * len(FILLS) // (STEPS - start)]
            pattern = fill.get(name, "." * STEPS)
            fill[name] = pattern[:step] + choice(rng, "Xxx") + pattern[step + 1 :]
    return fill


# --- Notes of the bass and the other instruments -------------------------------------------------

BITS = 12  # of the index into a cycle


@cache
def cycle(slope: float, even: float, harmonics: int) -> Array:
    """A cycle of a tone: harmonic k has the amplitude `k ** -slope`, times `even` for even k."""
    k = np.arange(1, harmonics + 1)
    spectrum = np.zeros(2 ** (BITS - 1) + 1, complex)
    # Phases that grow with the square of k spread a cycle's energy: strings do not click.
    spectrum[1 : harmonics + 1] = k**-slope * np.where(k % 2, 1, even) * np.exp(1j * k**2 / 5)
    wave = np.fft.irfft(spectrum)
    return (wave / np.sqrt((wave**2).mean())).astype(np.float32)


def oscillate(wave: Array, hz: float, length: int, start: float) -> Array:
    """`wave` repeated at `hz`, from a part `start` of its cycle on.

    The phase is a 32-bit integer that wraps around, so it is exact however long the note is.
    """
    phase = np.arange(length, dtype=np.uint32) * np.uint32(hz / RATE * 2**32)
    phase += np.uint32(start * 2**32)
    return wave[phase >> np.uint32(32 - BITS)]


class Layer(NamedTuple):
    """A part of a timbre: a tone with its own decay."""

    level: float
    slope: float
    decay: float = HELD  # seconds to 1/e
    even: float = 1.0
    ratio: float = 1.0  # of its frequency to that of the note


class Timbre(NamedTuple):
    layers: Sequence[Layer]
    attack: float = 0.004  # seconds
    release: float = 0.06
    detune: float = 0.0  # cents between the two voices of each side
    drive: float = 0.0  # of the amplifier
    styles: str = ""  # initials of its styles, see `STYLES`


SINE = 20.0  # a slope that leaves only the fundamental

TIMBRES = {
    "organ": Timbre([Layer(1 / r, SINE, ratio=r) for r in (1, 2, 3, 4, 6, 8)], 0.01, styles="hs"),
    "reed organ": Timbre([Layer(1, 1.2, even=0.4)], 0.05, 0.1, 4, styles="h"),
    "saw pad": Timbre([Layer(1, 1.3)], 0.25, 0.4, 12, styles="h"),
    "bright saws": Timbre([Layer(0.8, 1.0), Layer(0.5, 0.8, 0.3)], 0.01, 0.1, 16, styles="hsa"),
    "strings": Timbre([Layer(1, 1.5), Layer(0.2, 0.7)], 0.15, 0.25, 8, styles="h"),
    "soft pad": Timbre([Layer(1, 2.5), Layer(0.3, SINE, ratio=2)], 0.4, 0.5, 6, styles="h"),
    "square": Timbre([Layer(1, 1.1, even=0.05, decay=1.5)], 0.005, 0.05, 5, styles="as"),
    "brass": Timbre([Layer(1, 1.6), Layer(0.5, 0.6, 0.4)], 0.04, 0.08, 5, 1.5, styles="s"),
    "piano": Timbre([Layer(1, 2.0, 1.0), Layer(0.7, 1.1, 0.25)], 0.002, 0.15, 1.5, styles="sahc"),
    "electric piano": Timbre(
        [Layer(1, 3.0, 1.2), Layer(0.25, SINE, 0.12, ratio=14), Layer(0.3, 1.5, 0.3)],
        styles="sha",
    ),
    "steel guitar": Timbre([Layer(0.6, 1.6, 0.7), Layer(0.8, 0.8, 0.12)], 0.002, styles="cca"),
    "nylon guitar": Timbre([Layer(1, 2.2, 0.5), Layer(0.5, 1.4, 0.1)], 0.003, styles="ca"),
    "crunch guitar": Timbre([Layer(1, 1.6, 1.5)], 0.003, 0.05, 3, 2.5, styles="cs"),
    "lead guitar": Timbre([Layer(1, 1.5, 3.0)], 0.003, 0.08, 2, 5.0, styles="a"),
    "bells": Timbre([Layer(0.6**i, SINE, 1.2 / r, 1, r) for i, r in enumerate((1, 2.76, 5.4, 8.9))],
                    0.001, 0.3, styles="a"),
    "marimba": Timbre([Layer(1, SINE, 0.3), Layer(0.4, SINE, 0.08, ratio=3.93)], 0.002, styles="a"),
    "clavinet": Timbre([Layer(1, 0.9, 0.4, even=0.5)], 0.001, 0.02, 0, 1.0, styles="sa"),
}  # fmt: skip

BASSES = {
    "sub": Timbre([Layer(1, SINE), Layer(0.1, SINE, ratio=2)], 0.01, 0.05),
    "finger": Timbre([Layer(1, 2.6, 0.8), Layer(0.4, 1.6, 0.15)], 0.006, 0.05),
    "pick": Timbre([Layer(1, 1.8, 0.7), Layer(0.5, 0.9, 0.06)], 0.002, 0.04, 0, 1.0),
    "slap": Timbre([Layer(1, 2.0, 0.5), Layer(1, 0.6, 0.05)], 0.001, 0.03),
    "upright": Timbre([Layer(1, 2.8, 0.35), Layer(0.3, 1.4, 0.05)], 0.008, 0.06),
    "saw": Timbre([Layer(1, 1.6), Layer(0.4, 0.9, 0.12)], 0.004, 0.04, 4),
    "square": Timbre([Layer(1, 1.6, even=0.1)], 0.004, 0.04),
    "fuzz": Timbre([Layer(1, 1.4, 1.5)], 0.003, 0.05, 0, 6.0),
    "booming": Timbre([Layer(1, SINE, 0.9), Layer(0.2, 2.0, 0.1)], 0.003, 0.1, 0, 2.0),
}


def note(timbre: Timbre, hz: float, seconds: float, rng: Generator) -> Array:
    """One note, `[2, T]`, of which the release lies after `seconds`."""
    length = int((seconds + timbre.release) * RATE)
    time = np.arange(length, dtype=np.float32) / RATE
    sound = silence(length)
    for layer in timbre.layers:
        pitch = hz * layer.ratio
        if pitch > HIGHEST:
            continue
        wave = layer.level * cycle(layer.slope, layer.even, int(min(HIGHEST / pitch, 300)))
        sound += unison(wave, pitch, timbre.detune, length, rng) * np.exp(-time / layer.decay)
    left = length / RATE - time
    return sound * np.minimum(1, np.minimum(time / timbre.attack, left / timbre.release))


def unison(wave: Array, hz: float, detune: float, length: int, rng: Generator) -> Array:
    """The same on both sides, or two voices on each, `detune` cents apart."""
    if not detune:
        return oscillate(wave, hz, length, rng.random())
    cents = detune * np.array([[-1.0, 0.6], [1.0, -0.6]])
    pitches = hz * 2 ** (cents * rng.uniform(0.7, 1.3) / 1200)
    return np.stack(
        [sum(oscillate(wave, pitch, length, rng.random()) for pitch in side) for side in pitches]
    )


def amplified(track: Array, drive: float) -> Array:
    """Distort a track like an overdriven amplifier and its speaker."""
    if not drive:
        return track
    loud = np.tanh(track * drive / (3 * track.std() + 1e-9))
    size = 2 ** math.ceil(math.log2(track.shape[-1]))
    speaker = band(np.fft.rfftfreq(size, 1 / RATE), 20, SPEAKER, order=2)
    return np.fft.irfft(np.fft.rfft(loud, size) * speaker, size)[:, : track.shape[-1]]


# --- Bass ----------------------------------------------------------------------------------------

# r root, o its octave, f the fifth of the chord, t its third, n the degree above.
BASS_LINES = (
    "r---r---r---r---",
    "r-r-r-r-r-r-r-r-",
    "r-----r-r---f---",
    "..r-..r-..r-..r-",
    "r--o..r-f--o..f-",
    "r---t---f---n---",
    "r---------------",
    "r-------o-----f-",
    "rr.o.r.or.o.f.n.",
    "r..r..r...r..f..",
)
INTERVALS = {"r": 0, "o": 7, "f": 4, "t": 2, "n": 1}  # degrees of the scale
HIGHEST_ROOT = 43  # semitones: a G at 98 Hz


def bass(plan: Plan, rng: Generator) -> Array:
    track = silence(plan.length)
    timbre: Timbre = choice(rng, list(BASSES.values()))
    lines = [choice(rng, BASS_LINES) for _ in range(2)]
    legato = rng.uniform(0.5, 1.0)
    for bar in plan.playing("bass"):
        root = plan.chord(bar) % 7
        root -= 7 * (plan.pitch(root) > HIGHEST_ROOT)
        for sign, step, steps in events(lines[bar % 4 == 3]):
            pitch = plan.pitch(root + INTERVALS[sign])
            sound = note(timbre, hertz(pitch), legato * steps * plan.step, rng)
            place(track, rng.uniform(0.75, 1.1) * sound, plan.time(bar, step))
    return amplified(track, timbre.drive)


# --- Other ---------------------------------------------------------------------------------------

STABS = (
    "x-----x-----x---",
    "..x-..x-..x-..x-",
    "x---x---x---x---",
    "x--x--x-..x--x--",
    "....x-......x-..",
    "x-x-..x-x-..x-x-",
)
STRUMS = ("x---x-x-..x-x-x-", "x---x---x-x-x-x-", "x-xxx-xxx-xxx-xx", "x-------x---x-x-")
ARPEGGIOS = ("x-x-x-x-x-x-x-x-", "xxxxxxxxxxxxxxxx", "x--x--x-x--x--x-", "x---x---x---x---")
STYLES = {"h": ("x---------------", "x-------x-------"), "s": STABS, "c": STRUMS, "a": ARPEGGIOS}
CHORDS = ((0, 2, 4), (0, 2, 4), (0, 2, 4, 6), (0, 4, 7), (0, 4, 7, 9))  # degrees above the root


def other(plan: Plan, rng: Generator) -> Array:
    """Two or three instruments, of which the first always plays and the rest most of the time."""
    names = rng.permutation(list(TIMBRES))[: rng.integers(2, 4)]
    bars = plan.playing("other")
    track, side = silence(plan.length), int(rng.choice([-1, 1]))
    for index, name in enumerate(names):
        heard = [bar for bar in bars if index == 0 or (bar // SECTION + index) % 3]
        part = accompaniment(plan, TIMBRES[name], heard, rng)
        level = decibels(rng.uniform(-4, 2)) / (part.std() + 1e-9) if heard else 0.0
        side = -side  # the middle is for the singer
        track += level * balanced(part, side * rng.uniform(0.5, 0.9))
    return track


def balanced(track: Array, place: float) -> Array:
    """A stereo track moved to the left (-1) or the right (1)."""
    return track * np.array([[min(1, 1 - place)], [min(1, 1 + place)]], np.float32)


def accompaniment(plan: Plan, timbre: Timbre, bars: Sequence[int], rng: Generator) -> Array:
    """Chords, strummed or not, or arpeggios, whichever suits the timbre."""
    track = silence(plan.length)
    style = choice(rng, timbre.styles)
    pattern, chord = choice(rng, STYLES[style]), choice(rng, CHORDS)
    octave = 7 * int(rng.choice([2, 3] if style == "a" else [2]))
    order = rng.permutation(8)
    for bar in bars:
        degrees = [plan.chord(bar) % 7 + octave + degree for degree in chord]
        for index, (_, step, steps) in enumerate(events(pattern)):
            heard = degrees if style != "a" else [run(degrees, int(order[index % 8]))]
            level = rng.uniform(0.7, 1.1)
            for string, degree in enumerate(heard):
                sound = note(timbre, hertz(plan.pitch(degree)), steps * plan.step, rng)
                late = string * 0.012 if style == "c" else rng.uniform(0, 0.008)
                place(track, level * sound, plan.time(bar, step) + late)
    return amplified(track, timbre.drive)


def run(degrees: Sequence[int], index: int) -> int:
    """Note `index` of a chord that goes on in the next octave."""
    return degrees[index % len(degrees)] + 7 * (index // len(degrees) % 2)


# --- Vocals --------------------------------------------------------------------------------------

HOP = 256  # samples: the singer's mouth moves once in 6 ms
WINDOW = 4 * HOP
BREATH = 0.35  # seconds
# Hz of five formants of a man's vowels.
VOWELS = (
    (650, 1080, 2650, 2900, 3250),
    (400, 1700, 2600, 3200, 3580),
    (290, 1870, 2800, 3250, 3540),
    (400, 800, 2600, 2800, 3000),
    (350, 600, 2700, 2900, 3300),
    (500, 1500, 2500, 3300, 3750),
)
WIDTHS = (80, 90, 120, 130, 140)  # Hz
GAINS = (0, -8, -16, -19, -24)  # dB
# Edges in Hz, seconds, and level: s, sh, f, t, k, and no noise at all (l, m, n, vowels).
CONSONANTS = (
    (5000, 12000, 0.10, 0.5),
    (2300, 7000, 0.10, 0.5),
    (1500, 12000, 0.07, 0.2),
    (3000, 9000, 0.03, 0.6),
    (1200, 3500, 0.03, 0.6),
    (1000, 2000, 0.05, 0.0),
    (1000, 2000, 0.05, 0.0),
)
# Steps that syllables take.
DELIVERIES = ((2, 2, 4, 4, 8), (4, 4, 6, 8, 12), (1, 2, 1, 2, 2, 4), (2, 2, 2, 4, 6))


class Syllable(NamedTuple):
    start: float  # seconds
    seconds: float
    pitch: float  # semitones
    first: bool  # of its phrase: after a breath


def melody(plan: Plan, rng: Generator, lowest: int) -> Iterator[Syllable]:
    """Phrases of a section, less a pause: chord tones on the beat, and steps between."""
    delivery = choice(rng, DELIVERIES)
    degree = 2 * 7
    for bar in plan.playing("vocals")[::SECTION]:
        step, end = int(rng.choice([0, 2, 4])), SECTION * STEPS - int(rng.choice([4, 6, 8, 12]))
        first = True
        while step < end:
            steps = min(int(choice(rng, delivery)), end - step)
            root = plan.chord(bar + step // STEPS)
            degree = next_degree(degree, root, step % 4 == 0, rng)
            degree -= 7 * (plan.pitch(degree) > lowest + 17)
            degree += 7 * (plan.pitch(degree) < lowest)
            gap = rng.uniform(0.02, 0.08)
            yield Syllable(plan.time(bar, step), steps * plan.step - gap, plan.pitch(degree), first)
            step, first = step + steps, False


def next_degree(degree: int, root: int, on_beat: bool, rng: Generator) -> int:
    """A small step from `degree`; on the beat to the nearest tone of the chord."""
    degree += int(rng.choice([-2, -1, -1, 0, 1, 1, 2]))
    if on_beat and (degree - root) % 7 not in (0, 2, 4):
        degree += int(rng.choice([-1, 1]))
    return degree


def smooth(curve: Array, seconds: float) -> Array:
    """A curve `[N]` of frames, averaged over a time."""
    size = 2 * max(1, int(seconds * RATE / HOP / 2)) + 1
    window = np.hanning(size + 2)[1:-1]
    padded = np.pad(curve, size // 2, mode="edge")
    return np.convolve(padded, window / window.sum(), mode="valid")


class Mouth(NamedTuple):
    """Curves of a singer, a value per frame of `HOP` samples."""

    pitch: Array  # semitones
    voice: Array  # loudness of the vocal folds
    breath: Array  # and of the air
    hiss: Array  # loudness of a consonant's noise
    edges: Array  # [2, N]: Hz of that noise
    formants: Array  # [5, N]: Hz


def articulate(plan: Plan, rng: Generator, sung: Sequence[Syllable], size: float) -> Mouth:
    """From syllables to the movements of a mouth; `size` scales the formants (1: a man's)."""
    frames = plan.length // HOP + 1
    time = np.arange(frames) * HOP / RATE
    pitch, age = np.full(frames, sung[0].pitch), np.full(frames, 0.0)
    voice, breath, hiss = np.zeros((3, frames))
    edges = np.ones((2, frames)) * [[2000], [8000]]
    formants = np.ones((5, frames)) * np.array(VOWELS[5])[:, None]
    airy = rng.uniform(0.02, 0.2)

    def frame(seconds: float) -> int:
        return max(0, int(seconds * RATE / HOP))

    for start, seconds, semitones, first in sung:
        low, high, duration, level = choice(rng, CONSONANTS)
        begin, vowel, end = frame(start - duration), frame(start), frame(start + seconds)
        pitch[vowel:], age[vowel:] = semitones, time[vowel:] - start
        voice[vowel:end] = rng.uniform(0.7, 1.0)
        voice[begin:vowel] *= 0.2
        breath[vowel:end] = airy
        hiss[begin:vowel] = level * rng.uniform(0.5, 1.2)
        edges[:, begin:vowel] = [[low], [high]]
        formants[:, begin:] = np.array(choice(rng, VOWELS))[:, None]
        if first:
            breath[frame(start - BREATH - 0.1) : frame(start - 0.1)] = rng.uniform(0.1, 0.4)
    vibrato = rng.uniform(0.1, 0.5) * np.clip((age - 0.2) / 0.3, 0, 1)
    wobble = vibrato * np.sin(2 * np.pi * rng.uniform(4.5, 6.5) * time)
    drift = smooth(rng.normal(0, 0.4, frames), 0.15)
    return Mouth(
        smooth(pitch, 0.07) + wobble + drift,
        smooth(voice, 0.05),
        smooth(breath, 0.08),
        smooth(hiss, 0.015),
        edges,
        size * np.stack([smooth(curve, 0.09) for curve in formants]),
    )


def shaped(x: Array, gains: Array) -> Array:
    """`x` `[T]` through a filter that moves: `gains` `[N, WINDOW / 2 + 1]`, a row each `HOP`."""
    frames = len(gains)
    padded = np.pad(x, (WINDOW // 2, frames * HOP + WINDOW - len(x)))
    window = np.hanning(WINDOW + 1)[:-1].astype(np.float32)
    cut = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[: frames * HOP : HOP]
    pieces = np.fft.irfft(np.fft.rfft(cut * window) * gains, WINDOW) * (window / 1.5)
    out = np.zeros((frames + 3, HOP))
    for index in range(4):
        out[index : index + frames] += pieces[:, index * HOP : (index + 1) * HOP]
    return out.reshape(-1)[WINDOW // 2 :][: len(x)]


def sing(mouth: Mouth, rng: Generator, length: int) -> Array:
    """The sound of vocal folds and air through moving formants, `[T]`."""
    samples = np.arange(length) / HOP
    frames = np.arange(len(mouth.pitch))

    def curve(values: Array) -> Array:
        return np.interp(samples, frames, values)

    hz = hertz(curve(mouth.pitch))
    folds = cycle(rng.uniform(0.9, 1.4), 1.0, int(HIGHEST / hz.max()))
    phase = np.cumsum(hz / RATE)
    source = folds[(phase * 2**BITS).astype(np.int64) % 2**BITS] * curve(mouth.voice)
    noise = rng.standard_normal(length)
    bins = np.fft.rfftfreq(WINDOW, 1 / RATE).astype(np.float32)
    open_mouth = resonances(mouth.formants.astype(np.float32), bins)
    closed = band(bins, *mouth.edges[:, :, None].astype(np.float32), order=2)
    return shaped(source + noise * curve(mouth.breath), open_mouth) + shaped(
        0.3 * noise * curve(mouth.hiss), closed
    )


def resonances(formants: Array, bins: Array) -> Array:
    """Gains `[N, F]` of a mouth with `formants` `[5, N]` at the frequencies `bins` `[F]`."""
    gains = np.full((formants.shape[1], len(bins)), 0.02, np.float32)
    for hz, width, gain in zip(formants, WIDTHS, GAINS):
        gains += np.float32(decibels(gain)) / (1 + ((bins - hz[:, None]) / width) ** 2)
    return gains


def vocals(plan: Plan, rng: Generator) -> Array:
    """A singer, and sometimes a second one a third above, or the same twice."""
    woman = rng.random() < 0.5
    size = rng.uniform(1.08, 1.25) if woman else rng.uniform(0.92, 1.08)
    sung = list(melody(plan, rng, lowest=55 if woman else 46))
    track = panned(voice(plan, rng, sung, size), rng.uniform(-0.1, 0.1))
    if rng.random() < 0.25:
        interval = float(rng.choice([0.1, 3, 4, 7, 12]))
        above = [syllable._replace(pitch=syllable.pitch + interval) for syllable in sung]
        track += panned(0.5 * voice(plan, rng, above, size), rng.uniform(-0.3, 0.3))
    return track


def voice(plan: Plan, rng: Generator, sung: Sequence[Syllable], size: float) -> Array:
    sound = sing(articulate(plan, rng, sung, size), rng, plan.length)
    # A compressor: singers are kept level, more than any other part.
    return np.tanh(sound / (4 * sound.std())).astype(np.float32)


# --- The mix -------------------------------------------------------------------------------------

LEVELS = {"drums": 0.5, "bass": 0.0, "other": -0.5, "vocals": 0.0}  # dB
SPREAD = 1.0  # dB: deviation of the levels
WETNESS = {"drums": (0.0, 0.1), "bass": (0.0, 0.02), "other": (0.05, 0.2), "vocals": (0.05, 0.2)}
# Hz: a mixing engineer leaves each part the range in which it is needed.
RANGES = {"drums": (35, 17_000), "bass": (35, 1200), "other": (220, 9000), "vocals": (110, 11_000)}
PLAYERS = {"drums": drums, "bass": bass, "other": other, "vocals": vocals}


def room(rng: Generator, wetness: float) -> Array:
    """Impulse response of a room, `[2, T]`: the direct sound, and noise that decays."""
    seconds = rng.uniform(0.2, 1.0)  # to -60 dB
    length, delay = int(RATE * seconds), int(RATE * rng.uniform(0.005, 0.04))
    time = np.arange(length) / RATE
    tail = rng.standard_normal((2, length)) * np.exp(-6.9 * time / seconds)
    tail *= wetness / np.sqrt((tail**2).sum(axis=1, keepdims=True))
    response = np.pad(tail, ((0, 0), (delay, 0)))
    response[:, 0] = 1
    return response


def equalizer(rng: Generator, frequencies: Array) -> Array:
    """Gains of a tilt and of three bells, at random, as no two recordings sound alike."""
    octaves = np.log2(np.maximum(frequencies, 20) / 1000)
    gains = rng.normal(0, 0.4) * octaves
    bells = rng.uniform(-4, 3.5, 3), rng.uniform(0.4, 1.5, 3), rng.normal(0, 2, 3)
    for centre, width, gain in zip(*bells):
        gains += gain * np.exp(-(((octaves - centre) / width) ** 2))
    return decibels(gains)


def produced(track: Array, rng: Generator, wetness: float, limits: Range) -> Array:
    """A track with the sound of an equalizer and a room, within limits in hertz."""
    length = track.shape[-1]
    response = room(rng, wetness)
    size = 2 ** math.ceil(math.log2(length + response.shape[-1]))
    spectrum = np.fft.rfft(track, size) * np.fft.rfft(response.astype(np.float32), size)
    frequencies = np.fft.rfftfreq(size, 1 / RATE)
    spectrum *= equalizer(rng, frequencies) * band(frequencies, *limits)
    return np.fft.irfft(spectrum, size)[:, :length]


def song(seed: int, seconds: float = 20.0) -> dict[str, Array]:
    """A song of `seconds`: its stems by name, float32 `[2, T]`, of which the sum is the mix.

    The sum stays within -1 and 1, and every stem is heard.
    """
    plan = make_plan(np.random.default_rng([seed, 0]), seconds)
    stems = {
        source: stem(source, plan, np.random.default_rng([seed, index]))
        for index, source in enumerate(SOURCES, start=1)
    }
    rng = np.random.default_rng([seed, 9])
    peak = np.abs(sum(stems.values())).max() / rng.uniform(0.5, 0.95)
    return {source: (track / peak).astype(np.float32) for source, track in stems.items()}


def stem(source: str, plan: Plan, rng: Generator) -> Array:
    """Return a source as it is in the mix, before the level of the whole is set."""
    track = PLAYERS[source](plan, rng)
    track = produced(track, rng, rng.uniform(*WETNESS[source]), RANGES[source])
    level = decibels(rng.normal(LEVELS[source], SPREAD)) / track.std()
    edge = np.minimum(1, np.arange(plan.length) / FADE)
    return track * (level * edge * edge[::-1])


def write_wav(path: Path, sound: Array) -> None:
    """Write `sound` `[2, T]` as 16 bit."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(np.round(sound.T * 32767).astype("<i2").tobytes())


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the mix of a song as WAV.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of the song (default: 0)")
    parser.add_argument("--seconds", type=float, default=20.0, help="its length (default: 20)")
    options = parser.parse_args()
    write_wav(options.out, sum(song(options.seed, options.seconds).values()))


if __name__ == "__main__":
    main()

"""One palette for page and plots; plots become SVG that follows the theme, and PNG in the light one.

A figure is drawn with marker colours (`SENTINEL`) that no drawing library rounds or renames; in the
SVG text each marker is then replaced by a CSS variable. The palette is safe for the common forms of
colour blindness, and series also differ by line style or marker.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.figure import Figure

WIDE_IN, NARROW_IN = 7.6, 3.7
PNG_DPI = 192  # twice the 96 pixels per inch of a screen


@dataclass(frozen=True)
class Palette:
    """The colours of one theme, by role."""

    page: str
    surface: str
    ink: str
    muted: str
    rule: str
    joint: str
    alone: str
    central: str
    nonprivate: str
    reference: str
    stage1: str
    stage2: str
    stage3: str
    stage4: str
    stage5: str
    warn: str
    warn_surface: str

    @property
    def stages(self) -> tuple[str, ...]:
        """Colours of stacked stages, in order."""
        return self.stage1, self.stage2, self.stage3, self.stage4, self.stage5

    @property
    def series(self) -> tuple[str, ...]:
        """Colours of lines that have no role of their own, in order."""
        return self.joint, self.alone, self.central, self.nonprivate, self.stage3, self.ink

    def css(self) -> Markup:
        """The roles as CSS custom properties."""
        text = "".join(f"--{name.replace('_', '-')}:{value};" for name, value in asdict(self).items())
        return Markup(text)  # noqa: S704 - constants of this module


LIGHT = Palette(
    page="#f6f5f1",
    surface="#ffffff",
    ink="#1b2430",
    muted="#5a6573",
    rule="#dedcd4",
    joint="#0b5cad",
    alone="#b8560a",
    central="#0b7a63",
    nonprivate="#8a4a9e",
    reference="#4d5967",
    stage1="#0b5cad",
    stage2="#6ba6da",
    stage3="#c99a1c",
    stage4="#8e99a6",
    stage5="#8a4a9e",
    warn="#9a2a12",
    warn_surface="#fdeee8",
)
DARK = Palette(
    page="#11151b",
    surface="#181e26",
    ink="#e7ebf0",
    muted="#a3afbd",
    rule="#2f3843",
    joint="#6cb2f7",
    alone="#f0a05a",
    central="#4fc9ab",
    nonprivate="#cf9be3",
    reference="#b4bfcc",
    stage1="#4c97e0",
    stage2="#a5cff5",
    stage3="#e3bd57",
    stage4="#77838f",
    stage5="#cf9be3",
    warn="#ffab91",
    warn_surface="#3a1d16",
)
SENTINEL = Palette(*(f"#fe01{number:02x}" for number in range(len(fields(Palette)))))

STYLE: Any = {
    "font.family": ["DejaVu Sans"],
    "font.size": 8.0,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 8.0,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "path.simplify": True,
    "figure.constrained_layout.w_pad": 0.09,
    "figure.constrained_layout.h_pad": 0.09,
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "accord",
    "savefig.facecolor": "none",
}

Draw = Callable[[Palette, float], Figure]
"""Draws one plot with a palette at a width in inches."""


@dataclass(frozen=True)
class Plot:
    """One plot in the two widths of the page (screen and phone), and as a file."""

    name: str
    wide: Markup
    narrow: Markup
    png: bytes


def render(name: str, draw: Draw, title: str) -> Plot:
    """Draw a plot three times: two themed SVGs and a light PNG. Equal input gives equal bytes."""
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        return Plot(
            name=name,
            wide=_svg(draw(SENTINEL, WIDE_IN), f"{name}-w", title),
            narrow=_svg(draw(SENTINEL, NARROW_IN), f"{name}-n", title),
            png=_png(draw(LIGHT, WIDE_IN)),
        )


def _png(figure: Figure) -> bytes:
    """The figure on the light surface."""
    buffer = io.BytesIO()
    figure.savefig(
        buffer,
        format="png",
        dpi=PNG_DPI,
        facecolor=LIGHT.surface,
        metadata={"Software": None},
        pad_inches=0.1,
    )
    return buffer.getvalue()


def _svg(figure: Figure, prefix: str, title: str) -> Markup:
    """The figure as an inline SVG element: own ids, theme variables, no namespaces, no metadata."""
    buffer = io.StringIO()
    empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=empty, facecolor="none")
    text = buffer.getvalue()
    text = text[text.index("<svg") :].rstrip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", text).replace("xlink:href", "href")
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    box = re.search(r'viewBox="([^"]*)"', text)
    head = f'<svg viewBox="{box[1] if box else "0 0 540 300"}" role="img" aria-label="{escape(title)}">'
    text = head + text[text.index(">") + 1 :]
    for role, marker in asdict(SENTINEL).items():
        text = text.replace(marker, f"var(--{role.replace('_', '-')})")
    return Markup(text)  # noqa: S704 - matplotlib escapes all text that it puts into an SVG

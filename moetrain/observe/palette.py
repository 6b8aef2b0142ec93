"""The colors of every picture: the page (report/page/style.css has the same), the PNGs of a report, run.png.

Colors of lines stay apart under each of the three kinds of color blindness: Okabe and Ito's without yellow and black.
Where they are used up, lines differ by their dashes.
"""

SERIES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
DASHES = ("", "7 3", "2 2.5", "9 3 2 3")  # lengths of strokes and gaps, as in SVG
ORDERED = ("#43257a", "#2f62a8", "#1b8a8a", "#5da53a", "#c9a200")  # layers and ranks, from the first to the last
TONES = {"main": "#28354d", "home": "#c65a35", "planned": "#177a68"}
HEAT = ("#2a4b8d", "#93b4de", "#f3f2ee", "#f0a67c", "#ad2f1b")


def line_style(index: int) -> dict[str, object]:
    """Color and dashes of the line number `index`, as arguments of matplotlib's `plot`."""
    dashes = [float(length) for length in DASHES[index // len(SERIES) % len(DASHES)].split()]
    return {"color": SERIES[index % len(SERIES)], "linestyle": (0, tuple(dashes)) if dashes else "-"}

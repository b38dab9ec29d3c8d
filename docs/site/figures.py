# SPDX-License-Identifier: Apache-2.0
"""Draw the figures of the methods' pages: `python docs/site/figures.py` writes
`docs/methods/*.svg`. matplotlib comes with the extra `demo`.
"""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

FOLDER = Path(__file__).parents[1] / "methods"
SKILLS = ["#4c72b0", "#dd8452", "#55a868", "#c44e52"]
PLAIN, DARK = "#d9dee8", "#5a6372"


class Drawing:
    """A canvas with the few shapes that the figures are made of."""

    def __init__(self, width, height):
        self.figure, self.axes = plt.subplots(figsize=(width, height))
        self.axes.set(xlim=(0, width), ylim=(0, height), aspect="equal")
        self.axes.axis("off")

    def box(self, x, y, width, height, color=PLAIN, label="", alpha=1.0, size=11):
        """Draw a filled rectangle with a label in its middle."""
        patch = Rectangle(
            (x, y), width, height, facecolor=color, edgecolor="white", lw=1.2, alpha=alpha
        )
        self.axes.add_patch(patch)
        self.text(x + width / 2, y + height / 2, label, size)

    def text(self, x, y, label, size=11, color="#20242c", **options):
        """Write a label, centered at a point."""
        options = {"ha": "center", "va": "center", **options}
        self.axes.text(x, y, label, fontsize=size, color=color, **options)

    def arrow(self, x, y, x2, y2):
        """Draw an arrow from one point to another."""
        style = {"arrowstyle": "-|>", "color": DARK, "lw": 1.2}
        self.axes.annotate("", (x2, y2), (x, y), arrowprops=style)

    def save(self, name):
        """Write the figure as SVG."""
        self.figure.savefig(FOLDER / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
        plt.close(self.figure)


def pair(d, x, y, color, a, b, alpha=1.0):
    """Draw `A` (wide, under) and `B` (tall, beside it) of a low-rank pair."""
    d.box(x, y, 1.2, 0.3, color, a, alpha, size=9)
    d.box(x + 0.45, y + 0.36, 0.3, 1.2, color, b, alpha, size=9)


def poly():
    """Draw the inventory, a table of tasks and the mixture of one task."""
    d = Drawing(9.6, 3.4)
    d.text(2.4, 3.2, "inventory of a layer: skills, shared by all tasks")
    for i, color in enumerate(SKILLS):
        pair(d, i * 1.25, 1.2, color, f"$A_{i + 1}$", f"$B_{i + 1}$")
    d.text(6.6, 3.2, "one row of weights a task")
    rows = [(0.1, 0.7, 0.1, 0.1), (0.5, 0.0, 0.5, 0.0), (0.0, 0.3, 0.1, 0.6)]
    for row, weights in enumerate(rows):
        y = 2.5 - row * 0.45
        d.text(5.45, y + 0.2, f"task {row}", 10, ha="right")
        for i, weight in enumerate(weights):
            label = f"{weight:.1f}"
            d.box(5.6 + i * 0.5, y, 0.46, 0.4, SKILLS[i], label, 0.25 + 0.75 * weight, size=9)
    d.arrow(7.75, 2.25, 8.25, 2.25)
    pair(d, 8.3, 1.5, "#8f7f98", "$A_w$", "$B_w$")
    d.text(8.9, 3.2, "the mixture")
    d.text(4.8, 0.6, r"task 1:  $A_w = 0.5\,A_1 + 0.5\,A_3$,   $B_w = 0.5\,B_1 + 0.5\,B_3$", 12)
    d.text(4.8, 0.15, r"$y = W x + \frac{1}{r}\, B_w A_w x$", 13)
    d.save("poly")


def vblora():
    """Draw the bank, and a factor whose tiles are sums of picked vectors."""
    d = Drawing(9.6, 3.4)
    d.text(1.3, 3.2, "one vector bank for all layers")
    for i in range(8):
        d.box(0.1, 2.7 - i * 0.33, 2.4, 0.29, SKILLS[i % 4], "", 0.45 + 0.06 * i)
    d.text(5.9, 3.2, "a row of $A$: tiles from the bank")
    for i, (first, second) in enumerate([(0, 2), (3, 1), (2, 3), (1, 0)]):
        d.box(4.0 + i * 1.0, 2.05, 0.95, 0.5, SKILLS[first], "", 0.8)
        d.box(4.0 + i * 1.0, 2.05, 0.95, 0.2, SKILLS[second], "", 0.8)
    d.arrow(2.6, 2.4, 3.9, 2.4)
    d.text(3.25, 2.65, "pick $k$", 10)
    d.text(6.0, 1.45, r"tile $= \sum_{j \in \mathrm{top}\,k} w_j\, v_j$", 13)
    d.text(6.0, 0.85, "an adapter is the indices $j$ and weights $w_j$ of its tiles", 11)
    d.text(6.0, 0.25, r"$y = W x + B A x$", 13)
    d.save("vblora")


def lokr():
    """Draw a Kronecker product as scaled copies of `W2`."""
    d = Drawing(9.6, 3.4)
    d.text(0.9, 3.2, "$W_1$ (a × b)")
    for i in range(2):
        for j in range(2):
            alpha = (0.9, 0.35, 0.55, 0.75)[2 * i + j]
            d.box(0.4 + j * 0.52, 2.2 - i * 0.52, 0.5, 0.5, SKILLS[0], "", alpha)
    d.text(2.1, 2.2, r"$\otimes$", 18)
    d.text(3.3, 3.2, "$W_2$ (c × d)")
    shade = [(0.9, 0.5, 0.2), (0.3, 0.8, 0.6), (0.6, 0.25, 0.95)]
    for i in range(3):
        for j in range(3):
            d.box(2.75 + j * 0.36, 2.35 - i * 0.36, 0.34, 0.34, SKILLS[1], "", shade[i][j])
    d.text(4.6, 2.2, "=", 16)
    d.text(6.9, 3.2, r"$\Delta W$ (ac × bd): a scaled copy of $W_2$ in each block")
    for bi in range(2):
        for bj in range(2):
            scale = (0.9, 0.35, 0.55, 0.75)[2 * bi + bj]
            for i in range(3):
                for j in range(3):
                    x, y = 5.6 + bj * 1.15 + j * 0.36, 2.55 - bi * 1.15 - i * 0.36
                    d.box(x, y, 0.34, 0.34, "#8f6f64", "", scale * shade[i][j])
    d.text(4.8, 0.25, r"$\Delta W x = \mathrm{vec}(W_2\, X\, W_1^\top)$: never built", 12)
    d.save("lokr")


def lora():
    """Draw a frozen weight and a low-rank pair beside it."""
    d = Drawing(7.2, 2.6)
    d.box(0.6, 0.7, 1.5, 1.5, PLAIN, "$W$\nfrozen")
    d.text(2.45, 1.45, "+", 16)
    d.box(2.8, 0.7, 0.35, 1.5, SKILLS[0], "$B$")
    d.box(3.3, 1.85, 1.5, 0.35, SKILLS[1], "$A$")
    d.text(3.6, 0.2, r"$y = W x + \frac{\alpha}{r}\, B A x$", 13)
    d.text(5.6, 1.45, "rank $r$:\n$r\\,(in + out)$ numbers", 11)
    d.save("lora")


def loha():
    """Draw the Hadamard product of two low-rank pairs."""
    d = Drawing(7.2, 2.6)
    for x, colors, n in ((0.4, SKILLS[:2], 1), (3.2, SKILLS[2:], 2)):
        d.box(x, 0.8, 0.3, 1.4, colors[0], f"$A_{n}$", size=10)
        d.box(x + 0.4, 1.9, 1.4, 0.3, colors[1], f"$B_{n}$", size=10)
    d.text(2.7, 1.5, r"$\odot$", 18)
    d.text(6.1, 1.5, "rank up to $r^2$", 11)
    d.text(3.2, 0.2, r"$\Delta W = \frac{\alpha}{r}\,(A_1 B_1) \odot (A_2 B_2)$", 13)
    d.save("loha")


if __name__ == "__main__":
    plt.rcParams["svg.hashsalt"] = "peft"  # the same file from the same drawing
    for draw in (poly, vblora, lokr, lora, loha):
        draw()

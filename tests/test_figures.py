"""Figures: alt text is not optional, both themes are there, the method keeps its colour."""

import io
import re

import matplotlib.colors
import matplotlib.pyplot as plt
import pytest

from lib import figures


def line(axes):
    axes.plot([0, 1], [0, 1], color=figures.colour("BNGD"), label="BNGD")
    axes.set(xlabel="step", ylabel="loss", title="a line")


def make(**changes):
    options = {"name": "a-line", "alt": "a straight line that rises", "caption": "A line."} | changes
    return figures.show(line, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"alt": ""}, "alt must describe"), ({"alt": "figure 1"}, "alt must describe"), ({"caption": " "}, "caption must"),
     ({"name": "A line"}, "name must be lower-case")],
)  # fmt: skip
def test_a_figure_without_words_is_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_both_themes_are_on_the_page_with_the_same_alt_text():
    page = make(alt='rises from "0" to <1>')._repr_html_()
    assert page.count('alt="rises from &quot;0&quot; to &lt;1&gt;"') == 2
    assert page.count("only-light") == page.count("only-dark") == 1
    assert 'id="fig-a-line"' in page


def test_the_two_pictures_differ_and_a_repeated_drawing_is_the_same():
    one, two = make(), make()
    assert one.pictures["light"] != one.pictures["dark"]
    assert one.pictures == two.pictures


def test_the_dark_picture_is_what_drawing_in_the_dark_style_gives():
    def annotated(axes):
        line(axes)
        axes.axhline(0.5, color=figures.ink(), ls=":")
        axes.legend()

    with plt.rc_context(figures.style("dark")):
        figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
        annotated(axes)
        stream = io.BytesIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
        plt.close(figure)
    shown = figures.show(annotated, name="a-line", alt="a straight line that rises", caption="A line.")
    names = rb"\bm[0-9a-f]{10}\b"  # of markers, hashed from their style
    assert re.sub(names, b"", shown.pictures["dark"]) == re.sub(names, b"", stream.getvalue())


def test_a_mesh_in_pixels_is_drawn_in_both_themes():
    themes = []

    def mesh(axes):
        themes.append(figures.ink())
        axes.pcolormesh([[0, 1], [2, 3]], cmap=figures.class_colours(), rasterized=True)

    figures.show(mesh, name="a-mesh", alt="four cells in four colours", caption="A mesh.")
    assert len(set(themes)) == len(themes) == 2


def test_a_method_without_a_colour_is_refused():
    with pytest.raises(ValueError, match="method must be one of GD, BNGD"):
        figures.colour("Adam")


def test_the_methods_shown_together_in_chapter_3_are_told_apart_in_grey():
    """Relative luminance of the classes of the phase diagram differs by at least 0.05: legible in print."""
    for theme in ("light", "dark"):
        rgb = [matplotlib.colors.to_rgb(c) for c in figures.CLASS_COLOURS[theme]]
        luminance = sorted(0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in rgb)
        assert min(b - a for a, b in zip(luminance, luminance[1:], strict=False)) >= 0.05


def test_an_error_while_drawing_leaves_no_open_figure():
    def broken(axes):
        raise RuntimeError("drawing failed")

    before = plt.get_fignums()
    with pytest.raises(RuntimeError, match="drawing failed"):
        figures.show(broken, name="broken", alt="a figure that never appears", caption="None.")
    assert plt.get_fignums() == before

"""Figures: the pixels and outlines of each panel say what was selected."""

from __future__ import annotations

import dataclasses
import io
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from consensusdrop_kernels import viz

GRID = (4, 6)
PANELS = ["image", "encoder saliency", "query saliency", "consensus", "kept", "merged"]


def make_row(index, seed=0, **changes):
    """A row on a 40 x 60 image, each dropped token merged into one of the kept."""
    rng = np.random.default_rng(seed)
    index = np.asarray(index)
    kept = index[index >= 0]
    assign = rng.integers(0, len(kept), 24)
    assign[kept] = np.arange(len(kept))
    row = viz.SelectionRow(
        image=np.random.default_rng(9).integers(0, 200, (40, 60, 3)).astype(np.uint8),
        visual=rng.random(24, np.float32),
        textual=rng.random(24, np.float32),
        fused=rng.random(24, np.float32),
        index=index,
        assign=assign,
        size=np.bincount(assign, minlength=len(index)).astype(np.float32),
        grid=GRID,
        question="what color is the star ?",
        answers="all 24 tokens: red",
    )
    return dataclasses.replace(row, **changes)


def panel(figure, name, row=0):
    return [axes for axes in figure.axes if axes.get_label() == name][row]


def outlined(axes):
    """Tokens that have a rectangle around them, by its place in the 40 x 60 image."""
    return [int(r.get_y() // 10 * 6 + r.get_x() // 10) for r in axes.patches]


def patch_of(picture, token):
    y, x = divmod(token, 6)
    return picture[10 * y : 10 * y + 10, 10 * x : 10 * x + 10]


def test_every_row_has_every_panel_under_its_question():
    rows = [make_row([1, 5, 9]), make_row([2, 5, 9], seed=1, question="is there a red star ?")]
    figure = viz.selection_figure(rows)
    assert [axes.get_label() for axes in figure.axes] == PANELS * 2
    texts = [text.get_text() for text in figure.texts]
    assert texts.index("what color is the star ?") < texts.index("is there a red star ?")
    assert texts.count("all 24 tokens: red") == 2
    assert set(PANELS) <= set(texts)


@pytest.mark.parametrize(
    ("name", "field"),
    [("encoder saliency", "visual"), ("query saliency", "textual"), ("consensus", "fused")],
)
def test_score_panels_show_their_own_score_on_the_grid(name, field):
    row = make_row([1, 5, 9])
    (shown,) = panel(viz.selection_figure([row]), name).images
    np.testing.assert_array_equal(shown.get_array(), getattr(row, field).reshape(GRID))


def test_one_outlier_does_not_darken_the_rest():
    score = np.linspace(0, 1, 24, dtype=np.float32)
    score[0] = 1000
    (shown,) = panel(viz.selection_figure([make_row([1], visual=score)]), PANELS[1]).images
    assert shown.norm(0.9) > 0.001
    lowest, highest = shown.get_clim()
    assert lowest < highest < 1000


def test_minus_infinity_in_a_score_is_left_out_of_its_range():
    fused = np.linspace(0, 1, 24, dtype=np.float32)
    fused[3] = -np.inf
    (shown,) = panel(viz.selection_figure([make_row([1], fused=fused)]), "consensus").images
    assert np.isfinite(shown.get_clim()).all()


def test_without_a_question_the_query_panel_is_empty():
    figure = viz.selection_figure([make_row([1, 5], textual=None)])
    assert len(panel(figure, "query saliency").images) == 0
    assert len(panel(figure, "consensus").images) == 1


@pytest.mark.parametrize("index", [[0, 7, 8, 23], [3, 4, -1, -1], list(range(24))])
def test_kept_patches_keep_their_pixels_and_the_others_are_dark_and_grey(index):
    row = make_row(index)
    (shown,) = panel(viz.selection_figure([row]), "kept").images
    for token in range(24):
        before, after = patch_of(row.image, token), patch_of(shown.get_array(), token)
        if token in index:
            np.testing.assert_array_equal(before, after)
        else:
            assert after.max() <= 50
            assert (np.ptp(after, axis=2) == 0).all()


def test_an_image_whose_patches_are_no_whole_pixels_is_shared_out_whole():
    row = make_row([0, 23], image=np.full((41, 61, 3), 200, np.uint8))
    bright = (viz.dim_dropped(row) == 200).all(2)
    assert bright[:10, :10].all()
    assert bright[-10:, -10:].all()
    assert abs(bright.sum() - 2 * 41 * 61 / 24) < 25


@pytest.mark.parametrize("index", [[0, 7, 8, 23], [3, 4, -1, -1]])
def test_merged_panel_outlines_exactly_the_kept(index):
    figure = viz.selection_figure([make_row(index)])
    assert outlined(panel(figure, "merged")) == [token for token in index if token >= 0]
    assert outlined(panel(figure, "kept")) == []


def test_questions_on_one_image_frame_what_only_they_keep():
    rows = [make_row([1, 5, 9]), make_row([2, 5, 9, -1], seed=1)]
    figure = viz.selection_figure(rows)
    assert outlined(panel(figure, "kept", 0)) == [1]
    assert outlined(panel(figure, "kept", 1)) == [2]
    assert "dark: dropped; red: this question only" in [t.get_text() for t in figure.texts]


def test_questions_on_different_images_are_not_compared():
    other = make_row([2, 5, 9], image=np.zeros((40, 60, 3), np.uint8))
    figure = viz.selection_figure([make_row([1, 5, 9]), other])
    assert outlined(panel(figure, "kept", 0)) == outlined(panel(figure, "kept", 1)) == []


def test_a_group_has_one_hue_and_another_group_another():
    from matplotlib.colors import rgb_to_hsv

    assign = np.arange(24) % 2
    flat = np.full((40, 60, 3), 100, np.uint8)
    row = make_row([0, 1], image=flat, assign=assign, size=np.full(2, 12, np.float32))
    tint = viz.tint_merged(row) / 255
    hues = [rgb_to_hsv(patch_of(tint, token)[..., :]).mean((0, 1))[0] for token in range(24)]
    np.testing.assert_allclose(hues[::2], hues[0])
    np.testing.assert_allclose(hues[1::2], hues[1])
    assert abs(hues[0] - hues[1]) > 0.2


def test_lone_tokens_keep_their_pixels_and_lost_ones_are_white():
    assign = np.full(24, -1)
    assign[[4, 10, 11]] = 0, 1, 1
    row = make_row([4, 10], assign=assign, size=np.float32([1, 2]))
    tint = viz.tint_merged(row)
    np.testing.assert_array_equal(patch_of(tint, 4), patch_of(row.image, 4))
    assert (patch_of(tint, 0) == 255).all()
    assert (patch_of(tint, 11) != patch_of(row.image, 11)).any()
    assert (patch_of(tint, 11) < 255).any()


def test_the_saved_picture_has_the_image_in_it():
    from PIL import Image

    red = np.zeros((40, 60, 3), np.uint8)
    red[..., 0] = 200
    file = io.BytesIO()
    viz.selection_figure([make_row([1, 5], image=red)]).savefig(file, format="png")
    picture = np.asarray(Image.open(file).convert("RGB"))
    share = (picture == (200, 0, 0)).all(2).mean()
    assert share > 0.05
    assert (picture[:3] == 255).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"visual": np.zeros(23)}, r"visual must have one value .* 4 x 6 grid, got shape \[23\]"),
        ({"textual": np.zeros((4, 6))}, r"textual must .* got shape \[4, 6\]"),
        ({"assign": np.zeros(25, int)}, "assign must have one value"),
        ({"size": np.ones(5)}, "index and size must have one value for each slot"),
        ({"image": np.zeros((40, 60))}, r"image must be \[H, W, 3\], got \[40, 60\]"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_row([1, 5, 9], **changes)


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="at least one SelectionRow"):
        viz.selection_figure([])


def test_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"consensusdrop_kernels\[viz\]"):
        viz.selection_figure([make_row([1])])


def test_drawing_leaves_pyplot_alone_and_importing_leaves_matplotlib_alone():
    code = (
        "import io, sys; from consensusdrop_kernels import viz; import numpy as np\n"
        "assert 'matplotlib' not in sys.modules\n"
        "one = np.zeros(1, np.float32)\n"
        "row = viz.SelectionRow(np.zeros((8, 8, 3), np.uint8), one, one, one,"
        " np.zeros(1, int), np.zeros(1, int), one + 1, (1, 1))\n"
        "viz.selection_figure([row]).savefig(io.BytesIO())\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)

"""Tests of timm_aig.figures."""
import math
import sys
from itertools import combinations

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image

from timm_aig.analysis import figures
from timm_aig.analysis.figures import (
    plot_accuracy_macs,
    plot_block_rates,
    plot_blocks_run,
    plot_contact_sheet,
    plot_execution_rates,
    plot_rates_over_epochs,
)


def test_the_heatmap_is_a_png_and_nothing_else_is_left(tmp_path):
    rates = torch.rand(3, 4)
    rates[1] = math.nan
    path = plot_execution_rates(rates, list('abcd'), ['x', '$y$', '$z'], tmp_path / 'rates.png', downsampling=['b'])
    with Image.open(path) as image:
        image.load()
        assert image.format == 'PNG' and min(image.size) > 200
    assert [file.name for file in tmp_path.iterdir()] == ['rates.png']


def test_the_heatmap_of_a_thousand_classes_stays_of_a_readable_size(tmp_path):
    names = [str(i) for i in range(1000)]
    path = plot_execution_rates(torch.rand(1000, 9), names[:9], names, tmp_path / 'rates.png')
    with Image.open(path) as image:
        assert max(image.size) < 5000


def test_names_that_do_not_fit_the_rates_are_refused(tmp_path):
    with pytest.raises(ValueError, match='3 class_names'):
        plot_execution_rates(torch.rand(2, 4), list('abcd'), list('xyz'), tmp_path / 'rates.png')
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    with pytest.raises(ImportError, match=r"pip install 'timm_aig\[train\]'"):
        plot_execution_rates(torch.rand(1, 1), ['a'], ['x'], tmp_path / 'rates.png')


@pytest.mark.parametrize('epochs,blocks', [(1, 1), (20, 33), (300, 9)])
def test_the_rates_over_epochs_are_a_png_and_nothing_else_is_left(tmp_path, epochs, blocks):
    rates = torch.rand(epochs, blocks)
    rates[0] = math.nan
    path = plot_rates_over_epochs(rates, [f'layer1.{i}' for i in range(blocks)], tmp_path / 'rates.png')
    with Image.open(path) as image:
        image.load()
        assert image.format == 'PNG' and min(image.size) > 200
    assert [file.name for file in tmp_path.iterdir()] == ['rates.png']


@pytest.mark.parametrize('count,static', [(1, None), (1, ('static parent', 1., 94.)), (30, ('static parent', 1., 94.))])
def test_accuracy_against_macs_is_a_png_and_nothing_else_is_left(tmp_path, count, static):
    points = [(f'epoch {i + 1}', 1 - i / 100, 90 + i / 10) for i in range(count)]
    path = plot_accuracy_macs(points, static, tmp_path / 'accuracy.png')
    with Image.open(path) as image:
        image.load()
        assert image.format == 'PNG' and min(image.size) > 200
    assert [file.name for file in tmp_path.iterdir()] == ['accuracy.png']


@pytest.fixture
def texts(monkeypatch):
    """Boxes in pixels of all that is written on the last picture, laid out as it would be saved, and the figure's."""
    saved = []
    monkeypatch.setattr(figures, '_save', lambda figure, *args: saved.append(figure))

    def _texts():
        figure = saved[-1]
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        written = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
        unseen = {id(label) for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)
                  for tick in axis.get_major_ticks() for label in (tick.label1, tick.label2)
                  if not axes.axison or not min(axis.get_view_interval()) <= tick.get_loc() <= max(
                      axis.get_view_interval())}
        in_view = [t for t in written if id(t) not in unseen]
        return [(t.get_text(), t.get_window_extent(canvas.get_renderer())) for t in in_view], figure.bbox

    return _texts


def assert_legible(boxes, whole):
    for text, box in boxes:
        assert whole.x0 - 1 <= box.x0 and box.x1 <= whole.x1 + 1, text
        assert whole.y0 - 1 <= box.y0 and box.y1 <= whole.y1 + 1, text
        assert min(box.width, box.height) >= 8 / 800 * whole.width * .8, text  # where the picture is 800 wide
    for (a, box), (b, other) in combinations(boxes, 2):
        overlap = min(box.x1, other.x1) - max(box.x0, other.x0), min(box.y1, other.y1) - max(box.y0, other.y0)
        assert min(overlap) <= .5, (a, b)


def make_groups(classes, count):
    """Groups of very unequal sizes with long names, the last ones of one class."""
    members = list(range(classes))
    first = members[:classes - count + 1]
    rest = [[i] for i in members[len(first):]]
    return {f'{"group of similar classes"} {i}': group for i, group in enumerate([first, *rest])}


@pytest.mark.parametrize('classes, blocks, groups', [
    (10, 15, 4), (10, 3, 10), (50, 152, 30), (100, 15, 30), (100, 152, 1), (1000, 15, 12), (1000, 152, 30)])
def test_nothing_written_on_the_pictures_overlaps_or_is_cut(tmp_path, texts, classes, blocks, groups):
    groups = make_groups(classes, min(groups, classes))
    names = [f'a rather long name of class {i}' for i in range(classes)]
    block_names = [f'layer{i // 40 + 1}.{i % 40}' for i in range(blocks)]
    marked = block_names[::40]
    rates = torch.rand(classes, blocks)
    plot_execution_rates(rates, block_names, names, tmp_path / 'a.png', marked, groups)
    boxes, whole = texts()
    assert {name[:23] for name in groups} <= {text[:23] for text, _ in boxes}
    assert_legible(boxes, whole)
    plot_execution_rates(rates, block_names, names, tmp_path / 'a.png', marked)
    assert_legible(*texts())
    plot_block_rates(rates, torch.full((classes,), 5), block_names, tmp_path / 'b.png', marked)
    assert_legible(*texts())
    plot_blocks_run(torch.randint(1, 9, (classes, blocks + 1)), groups, tmp_path / 'c.png')
    assert_legible(*texts())


@pytest.mark.parametrize('rows, images, size', [(1, 1, (28, 28)), (20, 10, (28, 28)), (20, 5, (640, 480))])
def test_nothing_written_on_a_contact_sheet_overlaps_or_is_cut(tmp_path, texts, rows, images, size):
    extremes = [(Image.new('L', size), 152)] * images
    plot_contact_sheet(
        [(f'a rather long name {i}', extremes, extremes[:3]) for i in range(rows)], tmp_path / 'sheet.png')
    assert_legible(*texts())


def test_a_contact_sheet_shows_each_image_above_its_number(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(figures, '_save', lambda figure, *args: shown.append(figure.axes[0]))

    def plain(grey):
        return Image.new('L', (28, 28), grey), grey

    plot_contact_sheet([('a', [plain(10), plain(60)], [plain(110)]), ('b', [], [plain(160)])], tmp_path / 'sheet.png')
    axes = shown[0]
    sheet = axes.images[0].get_array()
    assert [text.get_text() for text in axes.texts] == ['10', '60', '110', '160']
    for text in axes.texts:
        x, y = map(round, text.get_position())
        assert sheet[y - 5, x].tolist() == [int(text.get_text())] * 3
    assert [label.get_text() for label in axes.get_yticklabels()] == ['a', 'b']


def test_the_heatmap_has_each_rate_in_its_place_and_groups_order_the_rows(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(figures, '_save', lambda figure, *args: shown.append(figure.axes[0]))
    rates = torch.tensor([[0., .5], [1., .25], [math.nan, .75]])
    plot_execution_rates(rates, ['x', 'y'], ['a', 'b', 'c'], tmp_path / 'a.png', groups={'two': [2, 0], 'one': [1]})
    axes = shown[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ['c', 'a', 'b']
    colours = axes.images[0].get_array()
    assert colours[0, 0, 3] == 0  # no images, no colour
    assert tuple(colours[1, 0, :3]) == (68, 1, 84) and tuple(colours[2, 0, :3]) == (253, 231, 36)  # viridis' ends
    assert {'0.75', '0.00', '0.50', '1.00', '0.25'} <= {t.get_text() for t in axes.texts}


def test_the_error_bars_are_wilsons_over_all_images_and_the_ranges_those_of_the_classes(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(figures, '_save', lambda figure, *args: shown.append(figure.axes[0]))
    rates = torch.tensor([[.5, 1.], [.1, 0.], [math.nan, math.nan]], dtype=torch.float64)
    plot_block_rates(rates, torch.tensor([30, 10, 0]), ['x', 'y'], tmp_path / 'a.png')
    ranges, bars = (c.get_segments() for c in shown[0].collections)
    assert [segment[:, 1].tolist() for segment in ranges] == [[.1, .5], [0, 1]]
    low, high = figures.wilson_interval(torch.tensor([16, 30]), 40)
    assert [s[:, 1].tolist() for s in bars] == [pytest.approx(pair) for pair in zip(low.tolist(), high.tolist())]


def test_the_histograms_are_shares_of_each_group(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(figures, '_save', lambda figure, *args: shown.append(figure.axes))
    table = torch.tensor([[0, 3, 1], [2, 2, 0], [0, 0, 5]])
    plot_blocks_run(table, {'$x': [0, 1], 'y': [2]}, tmp_path / 'a.png')
    assert [[bar.get_height() for bar in axes.patches] for axes in shown[0]] == [[.25, .625, .125], [0, 0, 1]]
    assert [axes.get_title(loc='left') for axes in shown[0]] == ['$x, mean 0.9', 'y, mean 2.0']


@pytest.mark.parametrize('pixels', [800, 4000])
def test_a_picture_is_as_wide_as_asked(tmp_path, pixels):
    path = plot_block_rates(torch.rand(2, 3), torch.tensor([1, 2]), list('abc'), tmp_path / 'a.png', pixels=pixels)
    with Image.open(path) as image:
        assert image.size == (pixels, pixels // 2)


def test_more_groups_than_can_be_named_are_refused(tmp_path):
    groups = {str(i): [i] for i in range(31)}
    with pytest.raises(ValueError, match='groups must be at most 30, not 31'):
        plot_blocks_run(torch.ones(31, 4), groups, tmp_path / 'a.png')
    with pytest.raises(ValueError, match='groups must be at most 30, not 31'):
        plot_execution_rates(torch.ones(31, 2), ['a', 'b'], list(groups), tmp_path / 'a.png', groups=groups)
    assert not list(tmp_path.iterdir())

"""Pictures: what is drawn where, and that all text is legible, whole and free of overlaps."""
import math
import sys
from itertools import combinations

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image

from timm_aig.analysis import figures
from timm_aig.analysis.figures import (
    plot_accuracy_macs,
    plot_blocks_run,
    plot_contact_sheet,
    plot_execution_rates,
    plot_rates_over_epochs,
)

TITLE = 'cifar_resnet32_aig.fmnist_t06 on fashion_mnist validation (10,000 images), 60% of the MACs'


def test_a_picture_is_a_png_of_the_width_asked_for_and_nothing_else_is_left(tmp_path):
    rates = torch.rand(3, 4)
    rates[1] = math.nan
    path = plot_execution_rates(rates, list('abcd'), ['x', '$y$', '$z'], tmp_path / 'rates.png', ['b'], pixels=800)
    with Image.open(path) as image:
        image.load()
        assert image.format == 'PNG' and image.width == 800
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


@pytest.fixture
def drawn(monkeypatch):
    """Gives the last figure, which is not saved, laid out as it would be."""
    saved = []
    monkeypatch.setattr(figures, '_save', lambda figure, *args: saved.append(figure))

    def _drawn():
        FigureCanvasAgg(saved[-1]).draw()
        return saved[-1]

    return _drawn


def line_boxes(text):
    """Each line of a text and the box that it fills, about."""
    box, lines = Text.get_window_extent(text), text.get_text().split('\n')
    centre = (box.x0 + box.x1) / 2
    for i, line in enumerate(lines):
        half = box.width / 2 * (len(line) / max(map(len, lines)) if text.get_ha() == 'center' else 1)
        step = box.height / len(lines)
        yield line, Bbox([[centre - half, box.y1 - (i + 1) * step], [centre + half, box.y1 - i * step]])


def assert_legible(figure):
    """All text is inside the picture, large enough where it is 800 pixels wide, and overlaps no other text."""
    written = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
    unseen = {id(label) for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)
              for tick in axis.get_major_ticks() for label in (tick.label1, tick.label2)
              if not axes.axison or not min(axis.get_view_interval()) <= tick.get_loc() <= max(
                  axis.get_view_interval())}
    whole = figure.bbox
    boxes = [box for t in written if id(t) not in unseen for box in line_boxes(t)]
    for text, box in boxes:
        assert whole.x0 - 1 <= box.x0 and box.x1 <= whole.x1 + 1, text
        assert whole.y0 - 1 <= box.y0 and box.y1 <= whole.y1 + 1, text
        assert min(box.width, box.height) >= 8 / 800 * whole.width * .7, text
    for (a, box), (b, other) in combinations(boxes, 2):
        overlap = min(box.x1, other.x1) - max(box.x0, other.x0), min(box.y1, other.y1) - max(box.y0, other.y0)
        assert min(overlap) <= .5, (a, b)
    return [text for text, _ in boxes]


def make_groups(classes, count):
    """Groups of very unequal sizes with long names, the last ones of one class."""
    members = list(range(classes))
    first = members[:classes - count + 1]
    rest = [[i] for i in members[len(first):]]
    return {f'{"group of similar classes"} {i}': group for i, group in enumerate([first, *rest])}


@pytest.mark.parametrize('classes, blocks, groups', [
    (10, 15, 4), (10, 54, 10), (50, 3, 30), (1000, 152, 30)])
def test_text_is_legible_on_the_pictures_of_the_gates(tmp_path, drawn, classes, blocks, groups):
    groups = make_groups(classes, min(groups, classes))
    names = [f'a rather long name of class {i}' for i in range(classes)]
    block_names = [f'layer{i // 18 + 1}.{i % 18}' for i in range(blocks)]
    marked = block_names[::18]
    rates, macs = torch.rand(classes, blocks), [3.6e6] * blocks
    plot_execution_rates(rates, block_names, names, tmp_path / 'a.png', marked, groups, title=TITLE, macs=macs)
    text = assert_legible(drawn())
    assert {name[:23] for name in groups} <= {name[:23] for name in text}
    plot_execution_rates(rates, block_names, names, tmp_path / 'a.png', marked)
    assert_legible(drawn())
    plot_blocks_run(torch.randint(1, 9, (classes, blocks + 1)), groups, tmp_path / 'c.png', title=TITLE)
    assert_legible(drawn())


@pytest.mark.parametrize('epochs, blocks', [(1, 1), (20, 33), (300, 9)])
def test_text_is_legible_on_the_rates_over_epochs_and_epochs_count_from_one(tmp_path, drawn, epochs, blocks):
    rates = torch.rand(epochs, blocks)
    rates[0] = math.nan
    plot_rates_over_epochs(rates, [f'layer1.{i}' for i in range(blocks)], tmp_path / 'rates.png', TITLE)
    assert_legible(drawn())
    ticks = drawn().axes[0].get_xticklabels()
    assert ticks[0].get_text() == '1' and all(t.get_text() == str(int(t.get_position()[0]) + 1) for t in ticks)


@pytest.mark.parametrize('rows, images, size', [(1, 1, (28, 28)), (20, 10, (28, 28)), (20, 5, (640, 480))])
def test_text_is_legible_on_a_contact_sheet(tmp_path, drawn, rows, images, size):
    extremes = [(Image.new('L', size), 152)] * images
    plot_contact_sheet(
        [(f'a rather long name {i}', extremes, extremes[:3]) for i in range(rows)], tmp_path / 'a.png', title=TITLE)
    assert_legible(drawn())


def test_every_model_in_the_accuracy_picture_has_a_line_with_its_points_and_a_name_in_the_legend(tmp_path, drawn):
    curve = [('one checkpoint at many budgets', share, 94 - 9 * (share - .7) ** 2) for share in (.4, .5, .6, .8, 1.)]
    seeds = [('trained with $three seeds', .597, top1) for top1 in (93.7, 93.9, 94.1)]
    others = [(f'static model number {i} in $', .59 + i / 50, 94.2 - i / 30) for i in range(7)]
    plot_accuracy_macs([*curve, *seeds], others, tmp_path / 'a.png', TITLE)
    figure = drawn()
    assert_legible(figure)
    (legend,) = figure.legends
    of_model = {}
    for name, *point in [*curve, *seeds, *others]:
        of_model.setdefault(name, []).append(point)
    assert [text.get_text() for text in legend.get_texts()] == list(of_model)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert {name: line.get_xydata().tolist() for name, line in lines.items()} == of_model
    styles = {(line.get_color(), line.get_linestyle()) for line in lines.values()}
    assert len(styles) == len(lines) == 9


def test_an_accuracy_picture_has_the_colours_that_it_is_given(tmp_path, drawn):
    colours = {'adaptive': '#123456', 'static': '#654321'}
    plot_accuracy_macs([('adaptive', .5, 94.)], [('static', 1., 95.)], tmp_path / 'a.png', colours=colours)
    assert {line.get_label(): line.get_color() for line in drawn().axes[0].lines} == colours


def test_a_contact_sheet_shows_each_image_above_its_number(tmp_path, drawn):
    def plain(grey):
        return Image.new('L', (28, 28), grey), grey

    plot_contact_sheet([('a', [plain(10), plain(60)], [plain(110)]), ('b', [], [plain(160)])], tmp_path / 'sheet.png')
    axes = drawn().axes[0]
    sheet = axes.images[0].get_array()
    assert [text.get_text() for text in axes.texts] == ['10', '60', '110', '160']
    for text in axes.texts:
        x, y = map(round, text.get_position())
        assert sheet[y - 5, x].tolist() == [int(text.get_text())] * 3
    assert [label.get_text() for label in axes.get_yticklabels()] == ['a', 'b']


def test_the_heatmap_has_each_rate_in_its_place_and_groups_order_the_rows(tmp_path, drawn):
    rates = torch.tensor([[0., .5], [1., .25], [math.nan, .75]])
    plot_execution_rates(rates, ['x', 'y'], ['a', 'b', 'c'], tmp_path / 'a.png', groups={'two': [2, 0], 'one': [1]})
    axes = drawn().axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ['c', 'a', 'b']
    colours = axes.images[0].get_array()
    assert colours[0, 0, 3] == 0  # no images, no colour
    assert tuple(colours[1, 0, :3]) == (68, 1, 84) and tuple(colours[2, 0, :3]) == (253, 231, 36)  # viridis' ends
    assert {'75', '0', '50', '100', '25'} <= {t.get_text() for t in axes.texts}


def test_the_mean_row_weighs_classes_by_their_images_and_the_bars_are_the_macs(tmp_path, drawn):
    rates = torch.tensor([[0., .5], [1., .1], [math.nan, math.nan]])
    plot_execution_rates(
        rates, ['layer1.0', 'layer2.3'], ['a', 'b', 'c'], tmp_path / 'a.png', macs=[3e6, 5e6],
        images=torch.tensor([3, 1, 0]))
    _, mean, bars, _ = drawn().axes
    assert [text.get_text() for text in mean.texts] == ['25', '40']
    assert [bar.get_height() for bar in bars.patches] == [3, 5]
    assert [tick.get_text() for tick in bars.get_xticklabels()] == ['0\nlayer1', '3\nlayer2']


def test_the_histograms_are_shares_of_each_group_over_whole_numbers_of_blocks(tmp_path, drawn):
    table = torch.tensor([[0, 3, 1], [2, 2, 0], [0, 0, 5]])
    plot_blocks_run(table, {'$x': [0, 1], 'y': [2]}, tmp_path / 'a.png')
    panels = drawn().axes
    assert [axes.patches[0].get_data().values.tolist() for axes in panels] == [[25, 62.5, 12.5], [0, 0, 100]]
    assert [axes.get_title(loc='left') for axes in panels] == ['$x, mean 0.9', 'y, mean 2.0']
    assert panels[0].get_xticks().tolist() == [0, 1, 2]

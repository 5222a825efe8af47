"""scripts/draw_results.py draws every picture that it is named for from the CSV files."""
import shutil

import draw_results
from PIL import Image


def test_it_draws_the_pictures_of_the_readme(tmp_path, monkeypatch):
    shutil.copytree(draw_results.ROOT / 'results', tmp_path / 'results')
    shipped = {file.name for file in draw_results.ROOT.glob('*.png')}
    monkeypatch.setattr(draw_results, 'ROOT', tmp_path)
    assert draw_results.main([]) == 0
    pictures = list(tmp_path.glob('*.png'))
    assert {file.name for file in pictures} == shipped
    for file in pictures:
        with Image.open(file) as picture:
            assert picture.width == 1600 and len(picture.convert('RGB').getcolors(2 ** 24)) > 50  # not blank

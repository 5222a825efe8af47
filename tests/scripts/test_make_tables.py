"""The READMEs show what the CSV files say, and link to what exists."""
import re
import shutil

import make_tables
import pytest

ROOT = make_tables.ROOT
TEXTS = {name: (ROOT / name).read_text(encoding='utf-8') for name in make_tables.READMES}


def headings(text):
    """Anchors of a Markdown file, as GitHub makes them."""
    titles = re.findall(r'^#+ (.+)$', re.sub(r'```.*?```', '', text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-') for title in titles}


@pytest.fixture
def checkout(tmp_path):
    """A folder with the READMEs and the CSV files."""
    shutil.copytree(ROOT / make_tables.RESULTS, tmp_path / make_tables.RESULTS)
    for name in make_tables.READMES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_every_table_is_in_a_readme_and_equals_its_csv_file():
    shown = [name for text in TEXTS.values() for _, name, _, _ in make_tables.MARKED.findall(text)]
    assert sorted(set(shown)) == sorted(make_tables.TABLES)
    assert make_tables.main(['--check']) == 0


def test_a_changed_result_is_found_and_then_written(checkout):
    file = checkout / make_tables.RESULTS / 'fmnist.csv'
    file.write_text(file.read_text().replace('94.63', '94.64'))
    args = ['--root', str(checkout)]
    readme = checkout / make_tables.RESULTS / 'README.md'
    before = readme.read_text()
    assert make_tables.main([*args, '--check']) == 1
    assert readme.read_text() == before
    assert make_tables.main(args) == 0
    assert '| 94.64 |' in readme.read_text()
    assert make_tables.main([*args, '--check']) == 0


def test_an_unknown_table_is_bad_input(checkout, capsys):
    with open(checkout / 'README.md', 'a') as file:
        file.write('<!-- table: typo -->\n<!-- end -->\n')
    assert make_tables.main(['--root', str(checkout)]) == 2
    assert capsys.readouterr().err == "error: no table or column 'typo'.\n"


@pytest.mark.parametrize(('values', 'expected'), [
    (dict(a='1', low='2', high='3'), '1 (2-3)'),
    (dict(a='1', low='', high=''), '1'),
    (dict(a='', low='2', high='3'), ''),
])
def test_a_cell_leaves_out_what_has_no_value(values, expected):
    assert make_tables.cell('{a}[ ({low}-{high})]', values) == expected


@pytest.mark.parametrize('name', make_tables.READMES)
def test_every_relative_link_of_a_readme_leads_somewhere(name):
    links = re.findall(r'\]\((?!https?:)([^)\s]+)\)', TEXTS[name])
    assert links
    for link in links:
        path, _, anchor = link.partition('#')
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        if anchor:
            assert anchor in headings(target.read_text(encoding='utf-8')), link

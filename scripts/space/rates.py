"""Execution rates by class beside a model, as analyze.py writes them: a table, or a picture."""
import csv
from pathlib import Path
from typing import List, NamedTuple, Optional

from huggingface_hub import hf_hub_download
from images import read_image
from PIL import Image

__all__ = ['Rates', 'download', 'find_rates']

HERE = Path(__file__).resolve().parent
MAX_CSV = 10_000_000  # characters


class Rates(NamedTuple):
    """One of both, or none."""
    table: Optional[List[List[float]]] = None  # by class and gated block
    picture: Optional[Image.Image] = None


def find_rates(name: str, blocks: List[str], classes: int) -> Rates:
    """The execution rates that come with a model.

    Args:
        name: Name that the model was loaded by.
        blocks: Names of its gated blocks.
        classes: Number of its classes.

    Raises:
        ValueError: A table of another form, or a picture that cannot be read.
    """
    if table := _find_file(name, 'rates.csv'):
        return Rates(table=_read_table(table, blocks, classes))
    if picture := _find_file(name, 'execution_rates.png'):
        return Rates(picture=read_image(picture)[0])
    return Rates()


def download(place: str, filename: str) -> Path:
    """A file of user/name[@revision] on the Hub."""
    repo_id, _, revision = place.partition('@')
    return Path(hf_hub_download(repo_id, filename, revision=revision or None))


def _find_file(name: str, filename: str) -> Optional[Path]:
    """A file beside a model: in hub_configs for a shipped one, else in its folder or repository."""
    source, _, place = name.partition(':')
    if source == 'hf-hub':
        try:
            return download(place, filename)
        except Exception:  # not there, or the Hub does not answer: the page works without it
            return None
    folders = [Path(place)] if source == 'local-dir' else [
        root / 'hub_configs' / name for root in (HERE, HERE.parent.parent)]  # a Space and a checkout
    return next((folder / filename for folder in folders if (folder / filename).is_file()), None)


def _read_table(path: Path, blocks: List[str], classes: int) -> List[List[float]]:
    """Execution rates [classes, blocks] from a CSV with a row for each class and a column for each block.

    Raises:
        ValueError: The file has another form.
    """
    with open(path, newline='', encoding='utf-8') as file:
        rows = list(csv.DictReader(file.read(MAX_CSV).splitlines()))
    try:
        rates = [[float(row[block] or 'nan') for block in blocks] for row in rows]
    except (KeyError, TypeError) as e:
        raise ValueError(f'{path} has no column for each block.') from e
    if len(rates) != classes or any(not 0 <= rate <= 1 for row in rates for rate in row if rate == rate):
        raise ValueError(f'{path} has no row of rates in [0, 1] for each class.')
    return rates

"""scripts/prepare_fashion_mnist.py, on stand-ins for the files of the data set."""
import gzip
import struct

import pytest
from prepare_fashion_mnist import main
from torchvision.datasets import FashionMNIST


@pytest.fixture
def source(tmp_path):
    """Four files of two training images and one test image."""
    folder = tmp_path / 'source'
    folder.mkdir()
    for name, _ in FashionMNIST.resources:
        count = 2 if name.startswith('train') else 1
        if 'images' in name:
            content = struct.pack('>iiii', 2051, count, 28, 28) + bytes(count * 28 * 28)
        else:
            content = struct.pack('>ii', 2049, count) + bytes(count)
        (folder / name).write_bytes(gzip.compress(content))
    return folder


def test_torchvision_reads_what_it_lays_out(source, tmp_path, capsys):
    root = tmp_path / 'data'
    assert main([str(root), '--source', str(source)]) == 0
    assert capsys.readouterr().out.startswith('2 training and 1 test images')
    assert len(FashionMNIST(str(root), train=True)) == 2


@pytest.mark.parametrize('fault', ['missing', 'other', 'torn'])
def test_a_missing_other_or_torn_file_is_named_and_nothing_is_written(source, tmp_path, capsys, fault):
    file = source / 'train-labels-idx1-ubyte.gz'
    whole = file.read_bytes()
    file.unlink()
    if fault != 'missing':
        file.write_bytes(gzip.compress(b'other') if fault == 'other' else whole[:-9])
    assert main([str(tmp_path / 'data'), '--source', str(source)]) == 2
    assert f"error: --source {file} " in capsys.readouterr().err
    assert not list((tmp_path / 'data').iterdir())

"""The scripts start as the README starts them: by their name."""
import os
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / 'scripts'


def test_every_script_that_names_its_interpreter_can_be_executed():
    scripts = [path for path in SCRIPTS.glob('*.py') if path.read_text(encoding='utf-8').startswith('#!')]
    assert len(scripts) > 10 and all(os.access(path, os.X_OK) for path in scripts)

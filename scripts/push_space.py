#!/usr/bin/env python3
"""Publish scripts/space/app.py as a Hugging Face Space, in one commit, which also updates one.

The Space gets this checkout's package, so that it shows what was tested here, the shipped models with their heatmaps,
the samples, requirements.txt and a README.md. Text of your own in the README.md of a Space stays, and so does front
matter that is not set here.

The token is that of `hf auth login`, or HF_TOKEN.
"""
import argparse
import json
import re
import sys
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, SpaceCard, SpaceCardData
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from timm_aig import InputError

EXAMPLES = """examples:
  scripts/push_space.py user/adaptive-resnets --dry-run
  scripts/push_space.py user/adaptive-resnets --private
  scripts/push_space.py user/adaptive-resnets --package 'timm_aig @ git+https://github.com/user/timm_aig'

exit code: 0 done, 1 the Hub refuses, 2 bad input"""

CHECKOUT = Path(__file__).resolve().parent.parent
TITLE = 'Adaptive ResNets, block by block'
TEXT = f"""# {TITLE}

Which blocks of an adaptive ResNet (ConvNet-AIG, package `timm_aig`) run for an image, at any budget, and what that
saves. `app.py` is `scripts/space/app.py`, unchanged; `scripts/push_space.py` made and updates this Space.
"""
# Of PyTorch, the wheels for CPUs: a tenth of the size, and what is timed is a CPU.
CPU_WHEELS = '--extra-index-url https://download.pytorch.org/whl/cpu'


def parse_args(argv: Optional[List[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('repo_id', metavar='SPACE', help='user/name, created if missing')
    parser.add_argument(
        '--package', metavar='REQUIREMENT', help='let the Space install timm_aig by this line of requirements.txt '
        'instead (the shipped models must be in it)')
    parser.add_argument('--private', action='store_true', help='make a new Space private')
    parser.add_argument('--message', default='Update the page', help='of the commit (default: %(default)s)')
    parser.add_argument('--dry-run', action='store_true', help='show everything, send nothing')
    parser.add_argument('--json', action='store_true', help='print the result as JSON')
    args = parser.parse_args(argv)
    validate_repo_id(args.repo_id)
    if args.repo_id.count('/') != 1:
        raise InputError(f'SPACE must be user/name, not {args.repo_id!r}.')
    if args.package is not None and not re.match(r'timm[-_.]aig\b[^\r\n]*$', args.package):
        raise InputError(f'--package must be a requirement of timm_aig, one line, not {args.package!r}.')
    return args


def collect_files(package: Optional[str]) -> Dict[str, Any]:
    """Path in the Space -> file here, or the content itself; all but README.md."""
    page = CHECKOUT / 'scripts' / 'space'
    files: Dict[str, Any] = {'LICENSE': CHECKOUT / 'LICENSE'}
    files.update((str(file.relative_to(page)), file) for file in [*page.glob('*.py'), *page.glob('examples/*')])
    configs = CHECKOUT / 'hub_configs'
    of_package = [*(CHECKOUT / 'timm_aig').rglob('*.py'), *configs.glob('*.json'), *configs.glob('*.safetensors')]
    for file in sorted([*([] if package else of_package), *configs.glob('*/rates.csv')]):
        files[str(file.relative_to(CHECKOUT))] = file
    files['requirements.txt'] = requirements(package)
    return files


def requirements(package: Optional[str]) -> bytes:
    """requirements.txt: the package, or what it needs. A Space installs Gradio itself, by its README.md."""
    needed = [package] if package else [line for line in requires('timm_aig') or [] if 'extra ==' not in line]
    return '\n'.join([CPU_WHEELS, *needed, '']).encode()


def make_card(existing: Optional[str]) -> SpaceCard:
    """README.md with the settings of the Space, or the one that is there with those settings updated."""
    data = SpaceCardData(
        title=TITLE, sdk='gradio', sdk_version=version('gradio'), python_version='3.11', app_file='app.py',
        license='apache-2.0', short_description='Which blocks of a ResNet run for an image', pinned=False)
    if existing is None:
        return SpaceCard(f'---\n{data}\n---\n\n{TEXT}')
    card = SpaceCard(existing)
    settings = data.to_dict()
    for name in ('sdk', 'sdk_version', 'python_version', 'app_file'):
        card.data[name] = settings.pop(name)
    for name, value in settings.items():
        card.data[name] = card.data.get(name, value)
    return SpaceCard(f'---\n{card.data}\n---\n{card.text}')


def look_up(api: HfApi, repo_id: str, dry_run: bool) -> Tuple[Optional[bool], Any, Optional[str]]:
    """Whether the Space exists (None if the Hub cannot be asked), what is known of it, and its README.md."""
    try:
        info = api.space_info(repo_id)
    except RepositoryNotFoundError:
        return False, None, None
    except Exception as e:
        if dry_run and not isinstance(e, (HfHubHTTPError, ValueError)):  # no connection, or HF_HUB_OFFLINE
            return None, None, None
        raise
    card = None
    if any(file.rfilename == 'README.md' for file in info.siblings or []):
        path = api.hf_hub_download(repo_id, 'README.md', repo_type='space', revision=info.sha)
        card = Path(path).read_text(encoding='utf-8-sig')
    return True, info, card


def stale(info: Any, files: Dict[str, Any]) -> List[str]:
    """What an earlier version of this script left in the Space; files of its owner are not touched."""
    ours = re.compile(r'space_\w+\.py|(space_)?examples/.*|timm_aig/.*|hub_configs/.*')
    names = [file.rfilename for file in info.siblings or []] if info else []
    return [name for name in names if ours.fullmatch(name) and name not in files]


def main(argv: Optional[List[str]] = None) -> int:
    try:
        return push(parse_args(argv))
    except (InputError, HFValidationError) as e:
        print(f'error: {e}', file=sys.stderr)
        return 2
    except Exception as e:
        print(f'error: {type(e).__name__}: {e}', file=sys.stderr)
        return 1


def push(args: argparse.Namespace) -> int:
    api = HfApi(library_name='timm_aig', library_version=version('timm_aig'))
    exists, info, existing = look_up(api, args.repo_id, args.dry_run)
    if exists and args.private and not info.private:
        raise InputError(f'--private: {args.repo_id} exists and is public.')
    card = make_card(existing)
    files = {**collect_files(args.package), 'README.md': str(card).encode()}
    deleted = stale(info, files)
    sizes = {name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in files.items()}
    result = dict(repo_id=args.repo_id, exists=exists, private=bool(info.private) if info else args.private or None,
                  files=sizes, deleted=deleted, url=None)
    if not args.json:
        show(result, str(card) if args.dry_run else None)
    if not args.dry_run:
        card.validate(repo_type='space')  # by the Hub, before anything is there
        if not exists:
            api.create_repo(args.repo_id, repo_type='space', space_sdk='gradio', private=args.private or None)
        commit = api.create_commit(
            args.repo_id, [*(CommitOperationAdd(name, file) for name, file in files.items()),
                           *map(CommitOperationDelete, deleted)],
            commit_message=args.message, repo_type='space', parent_commit=info.sha if info else None)
        result['url'] = commit.commit_url
    print(json.dumps(result, indent=2) if args.json else result['url'] or 'Nothing was sent.')
    return 0


def show(result: Dict[str, Any], card: Optional[str]) -> None:
    """What will be sent, and where to."""
    visibility = {True: 'private', False: 'public', None: "the namespace's default visibility"}[result['private']]
    state = {True: 'there already', False: 'new', None: 'the Hub cannot be asked whether it exists'}[result['exists']]
    print(f"{ENDPOINT}/spaces/{result['repo_id']} ({state}, {visibility})")
    for name, size in result['files'].items():
        print(f'  + {name:60} {size / 1e3:10.1f} kB')
    for name in result['deleted']:
        print(f'  - {name}')
    if card is not None:
        print(f'\nREADME.md:\n{card}')


if __name__ == '__main__':
    sys.exit(main())

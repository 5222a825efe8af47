#!/usr/bin/env python3
"""Publish the page scripts/space as a Hugging Face Space, or update one, in one commit.

The Space gets this checkout's package, the shipped models with their heatmaps, the sample images, requirements.txt and
a README.md. In the README.md of an existing Space your own text and front matter are kept.

The token is the one of `hf auth login`, or HF_TOKEN.
"""
import argparse
import re
import sys
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from _args import create_parser
from _common import run_script
from _push import add_push_args, publish

EXAMPLES = """examples:
  scripts/push_space.py user/adaptive-resnets --dry-run
  scripts/push_space.py user/adaptive-resnets --private
  scripts/push_space.py user/adaptive-resnets --package 'timm_aig @ git+https://github.com/user/timm_aig'"""


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = create_parser(__doc__, EXAMPLES)
    add_push_args(parser, 'Update the page')
    parser.add_argument(
        '--package', metavar='REQUIREMENT', help='line of requirements.txt that installs timm_aig with the shipped '
        "models (default: upload this checkout's)")
    return parser.parse_args(argv)


if __name__ == '__main__':
    parse_args()  # --help and wrong flags end here, before the slow imports

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, SpaceCard, SpaceCardData
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from timm_aig import InputError
from timm_aig.hub.push import Upload, check_repo_id
from timm_aig.hub.timeout import hub_timeout

CHECKOUT = Path(__file__).resolve().parent.parent
TITLE = 'Adaptive networks, block by block'
TEXT = f"""# {TITLE}

Which blocks of an adaptive network (ConvNet-AIG, package `timm_aig`) run for an image, at any budget, how much that
saves, and whether a second stage is needed. `app.py` is `scripts/space/app.py` of the package;
`scripts/push_space.py` updates this Space.
"""
CPU_WHEELS = '--extra-index-url https://download.pytorch.org/whl/cpu'  # a tenth of the size of PyPI's
# Files that this script uploads, or uploaded in an earlier version.
OURS = re.compile(r'space_\w+\.py|(space_)?examples/.*|timm_aig/.*|hub_configs/.*')


def collect_files(package: Optional[str]) -> Dict[str, Any]:
    """All files but README.md: path in the Space -> local file, or the content itself."""
    page, configs = CHECKOUT / 'scripts' / 'space', CHECKOUT / 'hub_configs'
    files: Dict[str, Any] = {'LICENSE': CHECKOUT / 'LICENSE'}
    files.update((str(file.relative_to(page)), file) for file in [*page.glob('*.py'), *page.glob('examples/*')])
    checkout = list(configs.glob('*/rates.csv'))
    if not package:
        checkout += [*(CHECKOUT / 'timm_aig').rglob('*.py'), *configs.glob('*.json'), *configs.glob('*.safetensors')]
    files.update((str(file.relative_to(CHECKOUT)), file) for file in sorted(checkout))
    # A Space installs Gradio itself, in the version that its README.md asks for.
    needed = [package] if package else [line for line in requires('timm_aig') or [] if 'extra ==' not in line]
    files['requirements.txt'] = '\n'.join([CPU_WHEELS, *needed, '']).encode()
    return files


def make_card(existing: Optional[str]) -> SpaceCard:
    """README.md with the settings of the Space; in an existing one only what the page needs to run is changed."""
    data = SpaceCardData(
        title=TITLE, sdk='gradio', sdk_version=version('gradio'), python_version='3.11', app_file='app.py',
        license='apache-2.0', short_description='Which blocks of a network run for an image', pinned=False)
    if existing is None:
        return SpaceCard(f'---\n{data}\n---\n\n{TEXT}')
    card = SpaceCard(existing)
    for name, value in data.to_dict().items():
        if name in ('sdk', 'sdk_version', 'python_version', 'app_file') or name not in card.data:
            card.data[name] = value
    return SpaceCard(f'---\n{card.data}\n---\n{card.text}')


def look_up(api: HfApi, repo_id: str, dry_run: bool) -> Tuple[Optional[bool], Any, Optional[str]]:
    """Whether the Space exists (None if the Hub does not answer a dry run), the Hub's data on it, and its README.md."""
    try:
        info = api.space_info(repo_id)
    except RepositoryNotFoundError:
        return False, None, None
    except Exception as e:
        if not dry_run or isinstance(e, HfHubHTTPError):
            raise
        return None, None, None
    card = None
    if any(file.rfilename == 'README.md' for file in info.siblings or []):
        path = api.hf_hub_download(repo_id, 'README.md', repo_type='space', revision=info.sha)
        card = Path(path).read_text(encoding='utf-8-sig')
    return True, info, card


def push(args: argparse.Namespace) -> Upload:
    """Publish the Space, unless it is a dry run."""
    api = HfApi(library_name='timm_aig', library_version=version('timm_aig'))
    with hub_timeout(args.timeout):
        exists, info, existing = look_up(api, args.repo_id, args.dry_run)
        private = bool(info.private) if info else args.private or None
        if args.private and not private:
            raise InputError(f'is set, but {args.repo_id} exists and is public.', 'private')
        card = make_card(existing)
        files = {**collect_files(args.package), 'README.md': str(card).encode()}
        names = [file.rfilename for file in info.siblings or []] if info else []
        deleted = [name for name in names if OURS.fullmatch(name) and name not in files]
        sizes = {name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in files.items()}
        url = None
        if not args.dry_run:
            if not exists:
                api.create_repo(args.repo_id, repo_type='space', space_sdk='gradio', private=private)
            additions = [CommitOperationAdd(name, file) for name, file in files.items()]
            url = api.create_commit(
                args.repo_id, [*additions, *map(CommitOperationDelete, deleted)], commit_message=args.message,
                repo_type='space', parent_commit=info.sha if info else None).commit_url
    return Upload(args.repo_id, exists, private, files=sizes, deleted=deleted, card=str(card), url=url)


def run(args: argparse.Namespace) -> None:
    check_repo_id(args.repo_id)
    if args.package is not None and not re.match(r'timm[-_.]aig\b[^\r\n]*$', args.package):
        raise InputError(f'must be a requirement of timm_aig, one line, not {args.package!r}.', 'package')
    publish(args, push, args)


def main(argv: Optional[List[str]] = None) -> int:
    return run_script(run, parse_args(argv))


if __name__ == '__main__':
    sys.exit(main())

#!/usr/bin/env python3
"""Publish the page scripts/space as a Hugging Face Space, or update one, in one commit.

The Space gets this checkout's package, the shipped models with their heatmaps, the sample images, requirements.txt and
a README.md. In the README.md of an existing Space your own text and front matter are kept.

The token is the one of `hf auth login`, or HF_TOKEN.
"""
import argparse
import re
import sys
from contextlib import suppress
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any, Dict, List, Optional

from _args import create_parser
from _common import run_script
from _push import add_push_args, publish

EXAMPLES = """examples:
  scripts/push_space.py user/adaptive-resnets --dry-run
  scripts/push_space.py user/adaptive-resnets --private"""


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = create_parser(__doc__, EXAMPLES)
    add_push_args(parser, 'Update the page')
    return parser.parse_args(argv)


if __name__ == '__main__':
    parse_args()  # --help and wrong flags end here, before the slow imports

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, SpaceCard, SpaceCardData
from huggingface_hub.errors import RepositoryNotFoundError

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
PAGE = ('*.py', '*.css', '*.html', 'examples/*.png', 'examples/README.md')  # files of scripts/space
CPU_WHEELS = '--extra-index-url https://download.pytorch.org/whl/cpu'  # a tenth of the size of PyPI's
# Files that this script uploads, or uploaded in an earlier version.
OURS = re.compile(r'space_\w+\.py|(space_)?examples/.*|timm_aig/.*|hub_configs/.*')


def collect_files() -> Dict[str, Any]:
    """All files but README.md: path in the Space -> local file, or the content itself."""
    page, configs = CHECKOUT / 'scripts' / 'space', CHECKOUT / 'hub_configs'
    package = [*(CHECKOUT / 'timm_aig').rglob('*.py'), CHECKOUT / 'LICENSE']
    package += [file for pattern in ('*.json', '*.safetensors', '*/rates.csv') for file in configs.glob(pattern)]
    needed = [line for line in requires('timm_aig') or [] if 'extra ==' not in line]  # a Space installs Gradio itself
    return {
        **{str(file.relative_to(page)): file for pattern in PAGE for file in sorted(page.glob(pattern))},
        **{str(file.relative_to(CHECKOUT)): file for file in sorted(package)},
        'requirements.txt': '\n'.join([CPU_WHEELS, *needed, '']).encode()}


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


def read_readme(api: HfApi, repo_id: str, info: Any) -> Optional[str]:
    """README.md of an existing Space."""
    if not any(file.rfilename == 'README.md' for file in info.siblings or []):
        return None
    path = api.hf_hub_download(repo_id, 'README.md', repo_type='space', revision=info.sha)
    return Path(path).read_text(encoding='utf-8-sig')


def push(args: argparse.Namespace) -> Upload:
    """Publish the Space, unless it is a dry run."""
    api = HfApi(library_name='timm_aig', library_version=version('timm_aig'))
    info = None
    with hub_timeout(args.timeout):
        with suppress(RepositoryNotFoundError):
            info = api.space_info(args.repo_id)
        private = bool(info.private) if info else args.private or None
        if args.private and not private:
            raise InputError(f'is set, but {args.repo_id} exists and is public.', 'private')
        card = make_card(info and read_readme(api, args.repo_id, info))
        files = {**collect_files(), 'README.md': str(card).encode()}
        names = [file.rfilename for file in info.siblings or []] if info else []
        deleted = [name for name in names if OURS.fullmatch(name) and name not in files]
        sizes = {name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in files.items()}
        url = None
        if not args.dry_run:
            if not info:
                api.create_repo(args.repo_id, repo_type='space', space_sdk='gradio', private=private)
            additions = [CommitOperationAdd(name, file) for name, file in files.items()]
            url = api.create_commit(
                args.repo_id, [*additions, *map(CommitOperationDelete, deleted)], commit_message=args.message,
                repo_type='space', parent_commit=info and info.sha).commit_url
    return Upload(args.repo_id, bool(info), private, files=sizes, deleted=deleted, card=str(card), url=url)


def run(args: argparse.Namespace) -> None:
    check_repo_id(args.repo_id)
    publish(args, push, args)


def main(argv: Optional[List[str]] = None) -> int:
    return run_script(run, parse_args(argv))


if __name__ == '__main__':
    sys.exit(main())

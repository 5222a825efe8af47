"""What push_to_hub.py and push_space.py share: arguments, the form of the result, errors of the Hub."""
import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Callable

from _args import add_args, number

if TYPE_CHECKING:
    from timm_aig.hub.push import Upload


def add_push_args(parser: argparse.ArgumentParser, message: str) -> None:
    arg = parser.add_argument
    arg('repo_id', metavar='REPO', help='user/name, created if missing')
    arg('--private', action='store_true', help='make a new repository private')
    arg('--message', default=message, help='commit message (default: %(default)s)')
    arg('--timeout', type=number('(0, inf)'), default=60., metavar='S',
        help='seconds to wait for a Hub that stalls; uploads are tried up to six times (default: %(default)g)')
    arg('--dry-run', action='store_true', help='check everything and show the README.md, upload nothing')
    add_args(parser, 'json')


def publish(args: argparse.Namespace, push: Callable[..., 'Upload'], *push_args: Any, **kwargs: Any) -> None:
    """Call push with these arguments, and print what it uploaded.

    Raises:
        OSError: The Hub refused, stalled or cannot be reached.
    """
    from huggingface_hub.constants import ENDPOINT

    from timm_aig import InputError

    try:
        upload = push(*push_args, **kwargs)
    except InputError:
        raise
    except Exception as e:  # of the Hub, and of the connection to it
        cause = f' ({e.__cause__})' if e.__cause__ else ''
        refused = getattr(getattr(e, 'response', None), 'status_code', None) == 401
        advice = ' Log in with `hf auth login`, or set HF_TOKEN.' if refused else ''
        raise OSError(f'{type(e).__name__}: {e}{cause}{advice}') from e
    if args.json:
        print(json.dumps(asdict(upload), indent=2))
        return
    visibility = {True: 'private', False: 'public', None: "the namespace's default visibility"}[upload.private]
    branch = f'{upload.revision or "main"}{" (new)" if upload.new_revision else ""}'
    print(f'{upload.repo_id} on {ENDPOINT} ({"existing" if upload.exists else "new"}, {visibility}), '
          f'{"pull request to" if upload.create_pr else "branch"} {branch}')
    for name, size in upload.files.items():
        print(f'  + {name:60} {size / 1e3:10.1f} kB')
    for name in upload.deleted:
        print(f'  - {name}')
    print(upload.url or f'\nREADME.md:\n{upload.card}')

"""push_to_hub: publish a model on the Hugging Face Hub, in one commit."""
import json
import os
import re
import shutil
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch.nn as nn
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id
from timm.utils import unwrap_model

from .. import __version__
from ..config import InputError
from .card import checked_results, make_card
from .save import save_pretrained
from .timeout import hub_timeout

__all__ = ['TIMEOUT', 'Upload', 'check_repo_id', 'look_up', 'push_to_hub', 'send']

TIMEOUT = 60.  # seconds


@dataclass(frozen=True)
class Upload:
    """What push_to_hub sent, or would send without dry_run."""
    repo_id: str
    exists: bool = False  # before the push
    private: Optional[bool] = None  # None for the namespace's default
    revision: Optional[str] = None  # branch, None for main
    new_revision: bool = False  # the branch did not exist
    create_pr: bool = False
    files: Dict[str, int] = field(default_factory=dict)  # size in bytes, by name
    deleted: Sequence[str] = ()  # names of files
    card: str = field(default='', repr=False)  # README.md
    url: Optional[str] = None  # of the commit or pull request, None with dry_run


def push_to_hub(
        model: nn.Module,
        repo_id: str,
        *,
        results: Optional[Dict[str, Any]] = None,
        pictures: Sequence[Union[str, os.PathLike]] = (),
        model_config: Optional[Dict[str, Any]] = None,
        commit_message: str = 'Add model',
        private: Optional[bool] = None,
        revision: Optional[str] = None,
        create_pr: bool = False,
        token: Optional[str] = None,
        timeout: float = TIMEOUT,
        dry_run: bool = False,
) -> Upload:
    """Publish a model, so that `timm.create_model('hf-hub:user/name', pretrained=True)` loads it.

    Uploads model.safetensors, config.json, results.json, pictures and a model card. All files are written and checked
    locally first, then arrive in one commit or not at all. In a model card that is already there only the generated
    part is updated. If a push fails, push again: files that have arrived are not uploaded twice.

    Args:
        model: As for save_pretrained.
        repo_id: 'user/name', created if missing.
        results: Content of a results.json or a hub_config, for the card.
        pictures: Files to show on the card, such as execution_rates.png.
        model_config: More entries for config.json, such as label_names.
        commit_message: First line of the commit message.
        private: Visibility of a new repository, None for the namespace's default.
        revision: Branch to commit to, created from main if missing. None for main.
        create_pr: Open a pull request instead.
        token: Access token, None for HF_TOKEN or the one saved by `hf auth login`.
        timeout: Seconds to wait for a Hub that stalls, see hub_timeout. Uploads are tried up to six times.
        dry_run: Write and check everything, upload nothing.

    Returns:
        What was sent, with the URL of the commit.

    Raises:
        InputError: An argument, the model or the results cannot be published.
        huggingface_hub.errors.HfHubHTTPError: The Hub refused a request.
        TimeoutError: The Hub stalled.
    """
    check_repo_id(repo_id)
    api = open_api(token)
    with tempfile.TemporaryDirectory() as temporary, hub_timeout(timeout):
        folder = save_pretrained(model, Path(temporary, 'model'), model_config)
        upload, head, old_card = look_up(api, Upload(repo_id, private=private, revision=revision, create_pr=create_pr))
        card = _write_card(unwrap_model(model), folder, upload, old_card, results, pictures)
        files = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
        upload = replace(upload, files=files, card=card)
        if dry_run:
            return upload
        return replace(upload, url=send(api, upload, head, folder, commit_message))


def open_api(token: Optional[str]) -> HfApi:
    """The Hub, for requests of timm_aig. A token that would be shown in an error is an InputError."""
    if token is not None and not re.fullmatch(r'[\x21-\x7e]+', token):
        raise InputError('must be printable characters without spaces (it is not shown here).', 'token')
    return HfApi(token=token, library_name='timm_aig', library_version=__version__)


def send(api: HfApi, upload: Upload, head: Optional[str], folder: Path, commit_message: str) -> str:
    """Commit the files of a folder, after look_up. Returns the URL of the commit or pull request."""
    if not upload.exists:
        api.create_repo(upload.repo_id, private=upload.private)
    if upload.new_revision:
        api.create_branch(upload.repo_id, branch=str(upload.revision), revision=head)
    files = sorted(file for file in folder.rglob('*') if file.is_file())
    commit = api.create_commit(
        upload.repo_id, [CommitOperationAdd(file.relative_to(folder).as_posix(), file) for file in files],
        commit_message=commit_message, revision=upload.revision, create_pr=upload.create_pr, parent_commit=head)
    return commit.pr_url or commit.commit_url


def check_repo_id(repo_id: str) -> None:
    """Check that a repository id is 'user/name'.

    Raises:
        InputError: It is not.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as e:
        raise InputError(f"must be 'user/name', not {repo_id!r}. {e}", 'repo_id') from e
    if repo_id.count('/') != 1:
        raise InputError(f"must be 'user/name', not {repo_id!r}.", 'repo_id')


def look_up(api: HfApi, upload: Upload) -> Tuple[Upload, Optional[str], Optional[str]]:
    """Read the state of the repository.

    Returns:
        The upload with what is known now, the commit to build on, and the model card of that commit.
    """
    new_revision = False
    try:
        try:
            info = api.model_info(upload.repo_id, revision=upload.revision)
        except RevisionNotFoundError:
            new_revision = True
            info = api.model_info(upload.repo_id)
    except RepositoryNotFoundError:
        return replace(upload, new_revision=upload.revision not in (None, 'main')), None, None
    if upload.private and not info.private:
        raise InputError(f'is True, but {upload.repo_id} exists and is public.', 'private')
    card = None
    if any(file.rfilename == 'README.md' for file in info.siblings or []):
        path = api.hf_hub_download(upload.repo_id, 'README.md', revision=info.sha)
        card = Path(path).read_bytes().decode('utf-8-sig')
    return replace(upload, exists=True, private=bool(info.private), new_revision=new_revision), info.sha, card


def _write_card(
        model: nn.Module,
        folder: Path,
        upload: Upload,
        old_card: Optional[str],
        results: Optional[Dict[str, Any]],
        pictures: Sequence[Union[str, os.PathLike]],
) -> str:
    """Write the model card, its pictures and results.json into the folder, return the card."""
    config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    results = checked_results(results or {}, config['architecture'])
    names: List[str] = []
    for picture in map(Path, pictures):
        if (folder / picture.name).exists():
            raise InputError(f'must have file names that nothing else has, {picture.name} is taken.', 'pictures')
        shutil.copyfile(picture, folder / picture.name)
        names.append(picture.name)
    if results:
        (folder / 'results.json').write_text(json.dumps(results, indent=2) + '\n', encoding='utf-8')
    card = make_card(model, upload.repo_id, config, results, names, old_card, upload.revision)
    (folder / 'README.md').write_text(card, encoding='utf-8', newline='')
    return card

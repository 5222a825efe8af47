"""save_pretrained and push_to_hub: an adaptive model as a folder, or a repository, that timm and transformers load."""
import copy
import json
import os
import re
import shutil
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Union

import timm
import torch
import torch.nn as nn
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.models import is_model
from timm.models._hub import save_config_for_hf
from timm.utils import unwrap_model

from .. import __version__
from ..blocks import gated_blocks
from ..budget import budget_table
from ..passes import forward_gates

__all__ = ['Upload', 'push_to_hub', 'save_pretrained']

FILES = ('model.safetensors', 'config.json')
STALE = ('pytorch_model.bin',)  # weights that an older timm left: loads without network may fall back to them


def save_pretrained(
        model: nn.Module,
        folder: Union[str, os.PathLike],
        model_config: Optional[Dict[str, Any]] = None,
) -> Path:
    """Save a model so that `timm.create_model('local-dir:folder', pretrained=True)` rebuilds it.

    Writes `model.safetensors` and `config.json`, each whole or not at all, after timm has rebuilt the model from them
    with the same weights, logits and gates. The offset of set_gate_offset and the table of calibrate_budget are saved
    too.

    Args:
        model: Model made by timm.create_model, or converted from one; may be wrapped by DDP, torch.compile or an EMA.
        folder: Where to, created if missing.
        model_config: More entries of config.json, such as label_names.

    Returns:
        The folder.

    Raises:
        ValueError: timm would not rebuild this model, a weight is not finite, or label_names is not one for each class.
        OSError: The folder cannot be written to; what it held is untouched.
    """
    model = unwrap_model(model)
    _require_rebuildable(model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix='.saving-') as saving:
        try:
            save_file(_tensors(model), Path(saving, 'model.safetensors'), metadata={'format': 'pt'})
        except SafetensorError as e:  # safetensors' own for a full disk too
            raise OSError(f'cannot write to {folder}: {e}') from e
        _write_config(model, Path(saving, 'config.json'), model_config)
        _require_reload(model, saving)
        # safetensors makes files that only their owner may read
        shutil.copymode(Path(saving, 'config.json'), Path(saving, 'model.safetensors'))
        for name in FILES:
            os.replace(Path(saving, name), folder / name)
    return folder


def _require_rebuildable(model: nn.Module) -> None:
    arch = getattr(model, 'pretrained_cfg', {}).get('architecture')
    if not arch or not is_model(arch) or (gated_blocks(model) and not arch.endswith('_aig')):
        raise ValueError(
            f'model ({type(model).__name__}, architecture {arch!r}) cannot be rebuilt from timm\'s registry: '
            f'only models made by timm.create_model can be saved.')
    if not hasattr(model, 'num_classes'):
        raise ValueError(f'model ({type(model).__name__}) is a backbone without a head, save the whole model instead.')


def _tensors(model: nn.Module) -> Dict[str, torch.Tensor]:
    """The state dict as tensors of their own, contiguous, on the CPU."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if tensor.is_meta or (tensor.is_floating_point() and not tensor.isfinite().all()):
            raise ValueError(f'{name} has no values or values that are not finite, nothing was saved.')
        tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return tensors


def _write_config(model: nn.Module, path: Path, model_config: Optional[Dict[str, Any]]) -> None:
    """timm's config.json, in a form that transformers' TimmWrapper takes too."""
    save_config_for_hf(model, str(path), model_config=model_config)
    config = json.loads(path.read_text(encoding='utf-8'))
    names = config['pretrained_cfg'].get('label_names')
    fit = names is None or len(names) == config['num_classes']  # not after reset_classifier
    for name in ('label_names', 'label_descriptions'):  # timm reads them in both places, transformers in the first
        labels = config['pretrained_cfg'].pop(name, None)
        if labels is not None and fit:
            config.setdefault(name, labels)
    labels = config.get('label_names')
    if labels is not None and len(labels) != config['num_classes']:
        raise ValueError(f'label_names has {len(labels)} names, the model {config["num_classes"]} classes.')
    args = config.setdefault('model_args', {})
    args.pop('num_classes', None)  # transformers passes it by itself, timm takes it from pretrained_cfg
    args.pop('gate_offset', None)
    args.pop('gate_budgets', None)
    if budget_table(model):
        args['gate_budgets'] = [point.to_dict() for point in budget_table(model)]
    path.write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')


def _require_reload(model: nn.Module, folder: Union[str, os.PathLike]) -> None:
    """Check that a user of timm gets this model from a folder."""
    try:
        with torch.random.fork_rng(devices=[]):  # saving draws no random numbers of the caller's
            reloaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    except Exception as e:
        raise ValueError(f'timm cannot rebuild this model ({type(model).__name__}): {e}') from e
    saved = copy.deepcopy(model).cpu().float().to(memory_format=torch.contiguous_format).eval()
    for block in gated_blocks(saved).values():
        block.execution = 'auto'  # how it runs here is not saved
    expected, weights = saved.state_dict(), reloaded.state_dict()
    differing = sorted(
        key for key in expected.keys() | weights.keys()
        if key not in expected or key not in weights or not torch.equal(expected[key], weights[key]))
    if differing:
        raise ValueError(f'timm rebuilds another model: {len(differing)} tensors differ, {", ".join(differing[:3])}...')
    channels, *size = reloaded.pretrained_cfg['input_size']
    if not reloaded.pretrained_cfg.get('fixed_input_size'):
        size = [min(s, 64) for s in size]
    x = torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected_outputs = forward_gates(saved, x)
        if not expected_outputs[0].isfinite().all():
            raise ValueError('the logits of this model are not finite.')
        for name, a, b in zip(('logits', 'gates'), expected_outputs, forward_gates(reloaded, x)):
            if not torch.equal(a, b):
                raise ValueError(
                    f'timm rebuilds a model with other {name}: this one was changed after timm.create_model in a way '
                    f'that config.json cannot say.')


@dataclass(frozen=True)
class Upload:
    """What push_to_hub sends, or would send with dry_run.

    Args:
        repo_id: Of the repository.
        exists: Whether it exists already, None if the Hub could not be asked (dry_run only).
        private: Visibility, None for the namespace's default.
        revision: Branch of the commit, None for main.
        new_revision: The branch does not exist yet.
        create_pr: The commit is a pull request.
        files: Bytes of each file, by its name.
        deleted: Files that the commit deletes.
        card: The model card, README.md.
        url: Of the commit or the pull request, None with dry_run.
    """
    repo_id: str
    exists: Optional[bool] = False
    private: Optional[bool] = None
    revision: Optional[str] = None
    new_revision: bool = False
    create_pr: bool = False
    files: Dict[str, int] = field(default_factory=dict)
    deleted: Sequence[str] = ()
    card: str = field(default='', repr=False)
    url: Optional[str] = None


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
        dry_run: bool = False,
) -> Upload:
    """Publish a model on the Hugging Face Hub, where `timm.create_model('hf-hub:user/name', pretrained=True)` loads it.

    Weights as safetensors, config.json, results.json, pictures and a model card. All of it is written and verified
    locally first and arrives in one commit, or not at all. A card that is there already is updated in its generated
    part; an old pytorch_model.bin is deleted.

    Args:
        model: As for save_pretrained.
        repo_id: 'user/name', created if missing.
        results: What is known of the model, for the card: content of a results.json, of a hub_config, or both.
        pictures: PNG files for the repository and the card, such as execution_rates.png.
        model_config: More entries of config.json, such as label_names.
        commit_message: First line of the commit.
        private: Visibility of a new repository, None for the namespace's default.
        revision: Branch to commit to, created from main if missing; None for main.
        create_pr: Open a pull request instead.
        token: Access token, None for HF_TOKEN or that of `hf auth login`.
        dry_run: Write and verify everything, upload nothing.

    Returns:
        What was sent, with the commit's url.

    Raises:
        ValueError: An argument, the model or the results cannot be published.
        huggingface_hub.errors.HfHubHTTPError: The Hub refused.
    """
    validate_repo_id(repo_id)
    if repo_id.count('/') != 1:
        raise ValueError(f"repo_id must be 'user/name', not {repo_id!r}.")
    if token is not None and not re.fullmatch(r'[\x21-\x7e]+', token):
        raise ValueError('token must be printable characters without spaces (it is not shown here).')
    api = HfApi(token=token, library_name='timm_aig', library_version=__version__)
    with tempfile.TemporaryDirectory() as temporary:
        folder = save_pretrained(model, Path(temporary, 'model'), model_config)
        target = _look_up(api, Upload(repo_id, private=private, revision=revision, create_pr=create_pr), dry_run)
        card = _write_card(unwrap_model(model), folder, target, results, pictures)
        files = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
        upload = replace(target.upload, files=files, card=card)
        if dry_run:
            return upload
        return replace(upload, url=_commit(api, upload, folder, commit_message, target.head))


def _write_card(
        model: nn.Module,
        folder: Path,
        target: '_Target',
        results: Optional[Dict[str, Any]],
        pictures: Sequence[Union[str, os.PathLike]],
) -> str:
    """Put the card and what it shows into the folder."""
    from .card import checked_results, make_card  # nobody else needs its imports
    config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    results = checked_results(results or {}, config['architecture'])
    names = []
    for picture in map(Path, pictures):
        if picture.read_bytes()[:8] != b'\x89PNG\r\n\x1a\n':
            raise ValueError(f'pictures must be PNG files, {picture} is none.')
        shutil.copyfile(picture, folder / picture.name)
        names.append(picture.name)
    if results:
        (folder / 'results.json').write_text(json.dumps(results, indent=2) + '\n', encoding='utf-8')
    card = make_card(model, target.upload.repo_id, config, results, names, target.card, target.upload.revision)
    (folder / 'README.md').write_text(card, encoding='utf-8', newline='')
    return card


@dataclass(frozen=True)
class _Target:
    """What is in the repository: the upload completed, the commit to build on, the card there."""
    upload: Upload
    head: Optional[str] = None
    card: Optional[str] = None


def _look_up(api: HfApi, upload: Upload, dry_run: bool) -> _Target:
    """Ask the Hub what is there; changes nothing."""
    try:
        if not dry_run and _role(api) == 'read':
            raise ValueError('token may only read, publishing needs one that may write.')
        info = api.model_info(upload.repo_id)
    except RepositoryNotFoundError:
        return _Target(replace(upload, exists=False, new_revision=upload.revision not in (None, 'main')))
    except Exception as e:
        if dry_run and not isinstance(e, (HfHubHTTPError, ValueError)):  # no connection, or HF_HUB_OFFLINE
            return _Target(replace(upload, exists=None))
        raise
    if upload.private and not info.private:
        raise ValueError(f'{upload.repo_id} exists and is public: private=True would publish it all the same.')
    new_revision = False
    if upload.revision is not None:
        try:
            info = api.model_info(upload.repo_id, revision=upload.revision)
        except RevisionNotFoundError:
            new_revision = True
    names = [file.rfilename for file in info.siblings or []]
    upload = replace(
        upload, exists=True, private=bool(info.private), new_revision=new_revision,
        deleted=tuple(name for name in STALE if name in names))
    card = _download(api, upload.repo_id, 'README.md', info.sha) if 'README.md' in names else None
    return _Target(upload, info.sha, card)


def _role(api: HfApi) -> Optional[str]:
    """What the token may do: 'read', 'write' or 'fineGrained'."""
    return api.whoami().get('auth', {}).get('accessToken', {}).get('role')


def _download(api: HfApi, repo_id: str, filename: str, commit: Optional[str]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = api.hf_hub_download(repo_id, filename, revision=commit, local_dir=folder)
        return Path(path).read_bytes().decode('utf-8-sig')


def _commit(api: HfApi, upload: Upload, folder: Path, message: str, head: Optional[str]) -> str:
    """Create what is missing and send everything in one commit."""
    ModelCard(upload.card).validate()  # by the Hub, before anything is there
    additions = [CommitOperationAdd(name, folder / name) for name in upload.files]
    operations: List[Any] = [*additions, *map(CommitOperationDelete, upload.deleted)]
    if not upload.exists:
        api.create_repo(upload.repo_id, private=upload.private)
    # The large files first: until the commit nothing points to them, and a second try finds them there.
    api.preupload_lfs_files(
        upload.repo_id, additions, revision=None if upload.new_revision else upload.revision,
        create_pr=upload.create_pr, free_memory=False)
    if upload.new_revision:
        api.create_branch(upload.repo_id, branch=str(upload.revision), revision=head)
    try:
        info = api.create_commit(
            upload.repo_id, operations, commit_message=message, revision=upload.revision, create_pr=upload.create_pr,
            parent_commit=head)
    except BaseException as e:
        if upload.new_revision:  # or it would offer the older weights of main
            try:
                api.delete_branch(upload.repo_id, branch=str(upload.revision))
            except Exception:
                raise RuntimeError(
                    f'the commit failed and the new branch {upload.revision} of {upload.repo_id} still holds what main '
                    f'holds: push again. {e}') from e
        raise
    return info.pr_url or info.commit_url

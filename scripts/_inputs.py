"""The models, data sets and loaders that a script's arguments name."""
import argparse
from typing import Any, Dict

from _common import create_model
from timm.data import create_loader

from timm_aig.training.data import convert_images, hold_out, open_dataset, resolve_config


def open_model(args: argparse.Namespace, name: str, argument: str = 'model') -> Any:
    """The model that an argument names, in eval, with the channels of --input-size."""
    kwargs = {'in_chans': args.input_size[0]} if args.input_size else {}
    return create_model(name, args.pretrained, argument, **kwargs).eval()


def open_split(args: argparse.Namespace, split: str, is_training: bool = False, **kwargs: Any) -> Any:
    """A split of the data set that --dataset and --data-dir name."""
    return open_dataset(
        args.dataset, args.data_dir, split, is_training, args.dataset_download, args.unreadable,
        input_key=args.input_key, target_key=args.target_key, **kwargs)


def open_evaluation_split(args: argparse.Namespace) -> Any:
    """--split, or the --holdout images of it."""
    dataset = open_split(args, args.split)
    return hold_out(dataset, dataset, args.holdout)[1] if args.holdout else dataset  # the other part is not used


def data_config(args: argparse.Namespace, model: Any) -> Dict[str, Any]:
    """timm's data config of a model, with --input-size and --crop-pct."""
    return resolve_config(model, {'input_size': args.input_size, 'crop_pct': args.crop_pct})


def create_evaluation_loader(args: argparse.Namespace, dataset: Any, config: Dict[str, Any], **kwargs: Any) -> Any:
    """Loader of center crops, without augmentation."""
    loader = create_loader(
        dataset, config['input_size'], args.batch_size, interpolation=config['interpolation'], mean=config['mean'],
        std=config['std'], crop_pct=config['crop_pct'], num_workers=args.workers, persistent_workers=False, **kwargs)
    convert_images(dataset, config['input_size'][0])
    return loader

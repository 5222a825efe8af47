"""Run a script of timm (validate.py, benchmark.py, inference.py, onnx_export.py, train.py) with the adaptive models.

timm's scripts do not import timm_aig, so they do not know its models. They are in timm's repository but not in its
package. Take those of the installed version.

    python -m timm_aig.run validate.py data --model resnet50_aig --pretrained
    torchrun --nproc_per_node=2 -m timm_aig.run train.py data --model cifar_resnet32
    python -m timm_aig.run --env                # what a report of a problem needs: versions and the CPU
"""
import platform
import runpy
import sys
from pathlib import Path
from typing import Dict, List

import timm
import torch

import timm_aig


def environment() -> Dict[str, str]:
    """What results and times depend on: the CPU and the versions of the packages."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        cpu = next(line.split(':', 1)[1].strip() for line in lines if line.startswith('model name'))
    except (OSError, StopIteration):
        cpu = platform.processor()
    return dict(
        cpu=cpu, cpu_capability=torch.backends.cpu.get_cpu_capability(), torch=torch.__version__,
        timm=timm.__version__, timm_aig=timm_aig.__version__, python=platform.python_version())


def main(args: List[str]) -> None:
    """Run a script as `python SCRIPT ARGS` would.

    Args:
        args: Path of the script and its arguments, or --env.
    """
    if not args or args[0] in ('-h', '--help'):
        print(f'usage: python -m timm_aig.run SCRIPT [ARGS ...]\n       python -m timm_aig.run --env\n\n{__doc__}')
        sys.exit(0 if args else 2)
    if args == ['--env']:
        print(', '.join(f'{name} {value}' for name, value in environment().items()))
        return
    script = Path(args[0])
    if not script.is_file():
        print(
            f'timm_aig.run: there is no file {script}. The scripts of timm are in its repository: '
            f'https://github.com/huggingface/pytorch-image-models/tree/v{timm.__version__}', file=sys.stderr)
        sys.exit(2)
    sys.argv = args
    sys.path[0] = str(script.resolve().parent)  # instead of the working directory, from `python -m`
    runpy.run_path(args[0], run_name='__main__')


if __name__ == '__main__':
    main(sys.argv[1:])

"""What compare.py compares: the data of a task, its trainings, and the cascades of their models."""
from typing import Dict, NamedTuple

TEACHER = '--teacher local-dir:{output}/static-r32-s{seed}'
PARENT = '--model local-dir:{output}/half-r32-s{seed}'
NETS = {'r8': 'cifar_resnet8', 'r14': 'cifar_resnet14', 'r20': 'cifar_resnet20', 'r32': 'cifar_resnet32'}


class Task(NamedTuple):
    """Data and length of the trainings of a comparison.

    data: Arguments of finetune.py for the data.
    held_out, test: Arguments of validate.py for the images that choose thresholds, and for those of the table.
    epochs: Of a training; a parent has half of them, its gates the rest.
    small: Lower resolution for the largest net, pixels.
    """
    data: str
    held_out: str
    test: str
    epochs: int
    small: int


TASKS = {
    'glyphs': Task(
        '--num-classes 2000 --input-size 1 20 20 --mean 0.5 --std 0.3 --crop-padding 2 --hflip 0 --keep last',
        '--split validation', '--split test', epochs=5, small=16),
    'fmnist': Task(
        '--dataset torch/fashion_mnist --holdout 5000 --input-size 1 28 28 --mean 0.286 --std 0.353 --crop-padding 2 '
        '--keep last',
        '--dataset torch/fashion_mnist --split train --holdout 5000',
        '--dataset torch/fashion_mnist --split validation', epochs=12, small=22),
}


def trainings(task: Task) -> Dict[str, str]:
    """Arguments of finetune.py by name, each after those it needs."""
    long, first = f'--epochs {task.epochs}', task.epochs // 2
    rest = f'--epochs {task.epochs - first} --target-rate 0.5'
    runs = {f'static-{name}': f'--static --model {model} {long}' for name, model in reversed(NETS.items())}
    for name, model in NETS.items():
        runs[f'distilled-{name}'] = f'--static --model {model} {long} --distill-weight 0.5 {TEACHER}'
    runs['small-r32'] = f'--static --model {NETS["r32"]} {long} --input-size 1 {task.small} {task.small}'
    runs['any-r20'] = f'--recipe any --model {NETS["r20"]} {long} {TEACHER}'
    runs['any-r32'] = f'--recipe any --model {NETS["r32"]} {long} {TEACHER}'
    runs['exits-r32'] = runs['distilled-r32']  # by early_exits.py
    runs['half-r32'] = f'--static --model {NETS["r32"]} --epochs {first}'
    runs['distill-r32'] = f'--recipe distill {PARENT} {rest}'
    runs['paper-r32'] = f'--recipe paper {PARENT} {rest}'
    return runs


STATIC_CASCADES = (
    ('static-r8', 'static-r14'), ('static-r8', 'static-r20'), ('static-r8', 'static-r32'),
    ('static-r14', 'static-r32'), ('distilled-r8', 'distilled-r14'), ('distilled-r8', 'distilled-r20'),
    ('distilled-r8', 'static-r32'), ('distilled-r14', 'static-r32'), ('distilled-r8', 'distilled-r32'),
    ('distilled-r14', 'distilled-r32'),
)
ADAPTIVE_CASCADES = (
    ('static-r8', 'any-r20'), ('distilled-r8', 'any-r20'), ('any-r20', 'any-r20'), ('any-r20', 'static-r32'),
    ('static-r8', 'any-r32'), ('distilled-r8', 'any-r32'), ('distilled-r14', 'any-r32'), ('any-r32', 'any-r32'),
)
# Of each group the pair with the best answers on the held-out images, at each share of the MACs.
CASCADES = {
    'static-r8 + static-r32': (('static-r8', 'static-r32'),), 'any-r20 + any-r20': (('any-r20', 'any-r20'),),
    'any-r32 + any-r32': (('any-r32', 'any-r32'),), 'static nets': STATIC_CASCADES,
    'static or adaptive nets': STATIC_CASCADES + ADAPTIVE_CASCADES,
}
# Rows of the table that are compared image by image.
PAIRS = tuple(((name, setting), against) for name, setting, *others in (
    ('any-r32', 'offset -3', ('distilled-r14', '')),
    ('any-r32', 'offset -2', ('static-r32', '')),
    ('any-r32', 'offset -1', ('distilled-r20', '')),
    ('any-r32', 'offset 0', ('static-r32', '')),
    ('any-r32', 'offset 1', ('distilled-r32', '')),
    ('any-r32', 'offset 10000', ('static-r32', ''), ('distilled-r32', '')),
    ('cascade, static nets', '0.35 of the MACs', ('static-r32', '')),
    ('cascade, static nets', '0.4 of the MACs', ('static-r32', '')),
    ('cascade, static nets', '0.5 of the MACs', ('distilled-r32', '')),
    ('cascade, static or adaptive nets', '0.35 of the MACs', ('static-r32', ''),
     ('cascade, static nets', '0.35 of the MACs')),
    ('cascade, static or adaptive nets', '0.4 of the MACs', ('cascade, static nets', '0.4 of the MACs')),
) for against in others)
OFFSETS = (-6., -4.5, -3., -2., -1., 0., 1., 2., 3., 4.5, 6., 1e4)
SHARES = [share / 100 for share in range(30, 105, 5)]  # mean MACs of the cascades of the table

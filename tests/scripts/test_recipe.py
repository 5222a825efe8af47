"""The arguments: recipe, then config, then command line, and what is refused."""
import json
import re

import pytest
from _recipes import OPTIMIZERS, RECIPES, model_kwargs_of, parse_training_args as parse_args, recipe_of


@pytest.fixture
def config(tmp_path):
    def write(content):
        path = tmp_path / 'config.yaml'
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)
    return write


@pytest.fixture
def refused(capsys):
    """Arguments that must end with exit code 2 and one line of error that matches a message; returns the line."""
    def _refused(argv, message):
        with pytest.raises(SystemExit) as stop:
            parse_args(argv)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith('error: ') and error.count('\n') == 1
        assert re.search(message, error), error
        return error.removeprefix('error: ')
    return _refused


@pytest.mark.parametrize('recipe', RECIPES)
def test_a_recipe_sets_its_defaults(recipe):
    args = vars(parse_args(['--recipe', recipe]))
    assert {name: args[name] for name in RECIPES[recipe]} == RECIPES[recipe]


@pytest.mark.parametrize('argv,optimizer', [
    ([], 'muon'), (['--recipe', 'paper'], 'sgd'), (['--opt', 'sgd'], 'sgd'),
    (['--recipe', 'paper', '--opt', 'muon'], 'muon'),
])
def test_an_optimizer_sets_its_defaults(argv, optimizer):
    defaults = OPTIMIZERS[optimizer]
    args = vars(parse_args(argv))
    assert {name: args[name] for name in defaults} == defaults
    args = vars(parse_args([*argv, '--weight-decay', '0.3']))
    assert {name: args[name] for name in defaults} == {**defaults, 'weight_decay': 0.3}


def test_an_optimizer_without_defaults_needs_a_learning_rate(refused):
    assert '--opt adamw' in refused(['--opt', 'adamw'], '--lr')
    args = vars(parse_args(['--opt', 'adamw', '--lr', '0.003']))
    assert {name: args[name] for name in OPTIMIZERS['sgd']} == {**OPTIMIZERS['sgd'], 'lr': 0.003}


def test_what_would_do_nothing_is_refused_or_not_in_the_recipe(refused):
    refused(['--recipe', 'paper', '--teacher', 'resnet50'], '--teacher needs a --distill-weight above 0')
    assert recipe_of(parse_args(['--gate-loss', 'rate']))['anneal'] == 0
    assert parse_args([]).anneal == RECIPES['distill']['anneal'] > 0


def test_distill_is_the_default_recipe():
    assert parse_args([]).recipe == 'distill'


def test_a_config_wins_over_the_recipe_and_the_command_line_over_both(config):
    file = config({'recipe': 'paper', 'lr': 0.3, 'epochs': 7, 'batch-size': 6, 'scale': [0.2, 1], 'amp': True})
    args = parse_args(['--config', file, '--epochs', '3'])
    assert (args.recipe, args.lr, args.epochs, args.batch_size, args.scale) == ('paper', 0.3, 3, 6, [0.2, 1])
    assert args.amp and args.gate_loss == 'rate' and args.sched == 'multistep'
    args = parse_args(['--config', file, '--recipe', 'distill', '--no-amp', '--lr', '0.1', '--scale', '0.3', '1'])
    assert (args.recipe, args.lr, args.scale, args.amp, args.gate_loss) == ('distill', 0.1, [0.3, 1], False, 'macs')


def test_yaml_numbers_are_read_as_on_a_command_line(config):
    args = parse_args(['--config', config('lr: 1e-3\nweight_decay: 5e-4\nclip_grad: null\nmean: [-0.5]\naa: rand-m9')])
    assert (args.lr, args.weight_decay, args.clip_grad, args.mean, args.aa) == (1e-3, 5e-4, None, [-0.5], 'rand-m9')


@pytest.mark.parametrize('argv', [
    [], ['--recipe', 'paper'], ['--static', '--mixup', '0.2', '--decay-milestones', '3', '4', '--model-ema'],
    ['--gate-norm', 'none', '--input-size', '1', '28', '28', '--mean', '0.1', '--nonfinite', 'skip'],
    ['--model-kwargs', 'img_size=28', 'depths=(2, 2)', 'act_layer=gelu'],
])
def test_a_trainings_recipe_given_back_is_the_same_recipe(config, argv):
    args = parse_args([*argv, '--output', 'here', '--workers', '1'])
    args.rank, args.command = 0, 'x'  # as a training adds them
    recipe = recipe_of(args)
    assert not {'rank', 'command', 'output', 'workers'} & recipe.keys()
    again = parse_args(['--config', config({'recipe': recipe, 'metrics': {}})])
    assert recipe_of(again) == recipe


@pytest.mark.parametrize('content,message', [
    ('epochs: [', 'while parsing'), ('- 1', 'must hold arguments by name'), ('text', 'must hold arguments by name'),
    ('epoch: 3\nlearning_rate: 1', 'no such argument, epoch, learning_rate'), ('config: x', 'no such argument, config'),
    ('epochs: 3.5', '--epochs must be a whole number'), ('epochs: true', '--epochs'),
    ('epochs: [1, 2]', '--epochs|unrecognized'), ('scale: 3', '--scale expected 2'),
    ('gate_loss: none', "--gate-loss invalid choice: 'none'"), ('recipe: 5', '--recipe invalid'),
    ('amp: yes please', "--amp ignored explicit argument 'yes please'"), ('lr: {a: 1}', '--lr must be a number'),
    ('!!python/object/apply:os.system ["false"]', 'could not determine a constructor'),
])
def test_a_config_that_cannot_be_used_is_refused_by_name(refused, config, content, message):
    file = config(content)
    assert file in refused(['--config', file], f'--config .*{message}')


def test_a_config_that_is_not_there_or_no_text_is_refused(refused, tmp_path):
    refused(['--config', str(tmp_path / 'none')], '--config .*No such file')
    refused(['--config', str(tmp_path)], '--config .*Is a directory')
    (tmp_path / 'bytes').write_bytes(b'\xff\xfe\x00')
    refused(['--config', str(tmp_path / 'bytes')], '--config .*decode')


@pytest.mark.parametrize('argv,allowed', [
    (['--epochs', '0'], "a whole number from 1, not '0'"), (['--workers', '-1'], 'a whole number from 0'),
    (['--lr', '-1'], r'a number in \(0, inf\)'), (['--lr', 'nan'], "not 'nan'"), (['--lr', 'inf'], "not 'inf'"),
    (['--ratio', '1', '0'], "not '0'"), (['--anneal', '1.5'], r'in \[0, 1\]'), (['--smoothing', '1'], r'in \[0, 1\)'),
    (['--target-rate', '1'], r'in \(0, 1\)'), (['--scale', '0', '2'], r'in \(0, 1\]'), (['--mean', 'inf'], 'a number'),
    (['--seed', '2147483648'], 'from 0 to 2147483647'), (['--input-size', '3', '0', '8'], 'a whole number from 1'),
    (['--batch-size', '7', '--mixup', '0.1'], 'even for mixup'), (['--model-kwargs', 'img_size'], 'NAME=VALUE'),
])
def test_a_number_out_of_range_is_refused_with_what_is_allowed(refused, argv, allowed):
    assert refused(argv, allowed).startswith(argv[0])


@pytest.mark.parametrize('argv,message', [
    (['--epochs', 'ten'], "--epochs must be a whole number from 1, not 'ten'"),
    (['--recipe', 'best'], '--recipe invalid choice'),
    (['--no-such'], 'unrecognized arguments: --no-such'), (['--resume', 'x.pt'], '--resume invalid choice'),
])
def test_what_argparse_refuses_is_one_line_too(refused, argv, message):
    refused(argv, message)


def test_arguments_of_the_model_are_literals_or_strings():
    args = parse_args(['--model-kwargs', 'img_size=28', 'depths=(2, 2)', 'gamma=None', 'act_layer=gelu', 'x=a=b'])
    assert model_kwargs_of(args) == dict(img_size=28, depths=(2, 2), gamma=None, act_layer='gelu', x='a=b')

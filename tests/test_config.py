"""AIGConfig: schedules, JSON, bad fields."""
import json
import re
from dataclasses import FrozenInstanceError, replace

import pytest
from hypothesis import given, strategies as st

from timm_aig import AIGConfig

rates = st.floats(0, 1, exclude_min=True) | st.just(1)


@pytest.mark.parametrize('t', [0.3, 0.5])
def test_resnet50_and_resnet101_have_the_papers_schedules(t):
    config = AIGConfig(t, schedule='paper')
    assert config.block_rates([3, 4, 6, 3]) == (1, 1, 0.8, 1, t, t, t, 1, t, t, t, t, t, 1, 0.7, 1)
    assert config.block_rates([3, 4, 23, 3]) == (1,) * 8 + (t,) * 25


@pytest.mark.parametrize('stages,bottleneck,expected', [
    ([2, 2, 2, 2], False, '11 1t 1t 11'),  # resnet18
    ([3, 4, 6, 3], False, '111 1ttt 1ttttt 1t1'),  # resnet34: as many blocks as resnet50, but others
    ([3, 8, 36, 3], True, '111 1ttttttt 1' + 't' * 35 + ' 1t1'),  # resnet152
    ([3, 3, 3], False, '111 1tt 1t1'),  # cifar_resnet20
    ([18, 18, 18], False, '1' * 18 + '1' + 't' * 17 + '1' + 't' * 16 + '1'),  # cifar_resnet110
    ([1, 1, 1, 1], False, '1111'),
])
def test_other_networks_follow_the_rule_of_the_papers_schedules(stages, bottleneck, expected):
    """The first stage, the first block of each stage and the last block always run."""
    values = {'1': 1., 't': 0.3}
    assert AIGConfig(0.3, schedule='paper').block_rates(stages, bottleneck) == tuple(
        values[c] for c in expected.replace(' ', ''))


@given(rate=rates, stages=st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_without_a_schedule_every_block_has_the_target_rate(rate, stages):
    assert AIGConfig(rate).block_rates(stages) == (rate,) * sum(stages)


def test_an_explicit_list_wins_over_the_schedule():
    config = AIGConfig(0.3, schedule='paper', target_rates=[0.1, 1, 0.2])
    assert config.block_rates([2, 1]) == (0.1, 1, 0.2)


@given(st.builds(
    AIGConfig,
    target_rate=rates,
    schedule=st.none() | st.just('paper'),
    target_rates=st.none() | st.lists(rates, max_size=20) | st.lists(rates, max_size=20).map(tuple),
    gate_channels=st.integers(1, 1000),
    gate_norm=st.sampled_from([None, 'bn', 'ln', 'none']),
))
def test_a_config_survives_json(config):
    text = json.dumps(config.to_dict(), allow_nan=False)
    assert AIGConfig(**json.loads(text)) == config
    assert hash(AIGConfig(**json.loads(text))) == hash(config)


def test_to_dict_writes_the_defaults():
    assert AIGConfig().to_dict() == {'target_rate': 0.6, 'gate_channels': 16, 'version': 1}


def test_a_config_is_frozen_and_replace_checks_its_fields():
    config = AIGConfig(0.5, target_rates=[0.5, 1])
    with pytest.raises(FrozenInstanceError):
        config.target_rate = 0.7
    assert config.target_rates == (0.5, 1)
    with pytest.raises(ValueError, match='target_rate must be'):
        replace(config, target_rate=2)


@pytest.mark.parametrize('fields,message', [
    ({'target_rates': {0.5}}, 'target_rates must be a list of rates'),
    ({'target_rates': 0.5}, 'target_rates must be a list of rates'),
    ({'target_rates': '0.5'}, 'target_rates must be a list of rates'),
    ({'gate_norm': 'gn'}, "gate_norm must be None or one of bn, ln, none, not 'gn'"),
    ({'schedule': 'papers'}, "schedule must be None or 'paper', not 'papers'"),
    ({'schedule': ''}, "schedule must be None or 'paper', not ''"),
    ({'schedule': 0.5}, "schedule must be None or 'paper', not 0.5"),
    ({'gate_channels': 0}, 'gate_channels must be a whole number above 0, not 0'),
    ({'gate_channels': 16.}, 'gate_channels must be a whole number above 0, not 16.0'),
    ({'version': 2}, 'version must be 1, not 2: a newer timm_aig wrote this config'),
])
def test_a_bad_field_is_named_with_what_is_allowed(fields, message):
    with pytest.raises(ValueError, match=message):
        AIGConfig(**fields)


@pytest.mark.parametrize('rate', [0, 0., -0.1, 1.01, float('nan'), float('inf'), '0.5', None, [0.5]])
def test_a_bad_rate_is_named(rate):
    with pytest.raises(ValueError, match=rf'target_rate must be a number in \(0, 1\], not {re.escape(repr(rate))}'):
        AIGConfig(target_rate=rate)
    with pytest.raises(ValueError, match=r'target_rates\[1\] must be a number in \(0, 1\]'):
        AIGConfig(target_rates=[0.5, rate, *[0.5] * 6])

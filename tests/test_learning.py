"""Both scripts learn: a pole stays up for longer than chance or an untrained network keeps it."""

from pathlib import Path

import pytest
import torch
from conftest import metrics

import sac_continuous_action as sac
import sdac_continuous_action as sdac

SMALL = "--num-envs 1 --learning-starts 300 --batch-size 32 --reward-scale 1 --eval-episodes 5"
SMALL = f"{SMALL} --eval-frequency 200 --buffer-size 5000".split()
SETTINGS = {
    sdac: "--total-timesteps 1000 --policy-lr 0.002 --q-lr 0.002 --exploration-decay 300".split(),
    sac: "--total-timesteps 1000 --policy-lr 0.003 --q-lr 0.003".split(),
}


def best_of_chance(script):
    """The best of ten networks that have learnt nothing; random actions are worse than these."""
    returns = []
    for seed in range(10):
        torch.manual_seed(seed)
        args = script.Args(env_id="InvertedPendulum-v4", eval_episodes=5, seed=seed)
        returns.append(script.evaluate(script.Agent(args, 4, 1), Path(), 0)[0])
    return max(returns)


@pytest.mark.parametrize("script", [sdac, sac])
def test_learns_to_balance(train, script):
    """Each of the last two evaluations beats the best of chance by a half."""
    chance = best_of_chance(script)
    returns = [row[2] for row in metrics(train(*SMALL, *SETTINGS[script], script=script))]
    assert min(returns[-2:]) > 1.5 * chance, (chance, returns)

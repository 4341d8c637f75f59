"""Compares trainings by CT and CD with losses recorded from the original code, openai/consistency_models.

The same weights, images, noise and times, 20 steps. Recorded by tests/golden/record_original.py.
"""

import copy
import json
from pathlib import Path

import pytest
import torch
from original_training import METHODS, MODEL, RATE, TOTAL_STEPS, batches, first_weights
from small_training import follow

from cmscale.config import schedules
from cmscale.consistency.distance import l2
from cmscale.consistency.losses import build_loss
from cmscale.consistency.networks import Networks
from cmscale.model import UNet, denoiser_for
from cmscale.model.precondition import teacher_denoiser_for

RECORDED = json.loads((Path(__file__).parents[1] / "golden" / "original_losses.json").read_text())


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.long
def test_twenty_steps_have_the_losses_of_the_original_code(kind: str):
    method, student = METHODS[kind], UNet(MODEL)
    student.load_state_dict(first_weights())
    target, teacher = (copy.deepcopy(student).requires_grad_(False) for _ in range(2))
    networks = Networks(
        *(denoiser_for(method, each) for each in (student, target)), teacher_denoiser_for(method, teacher)
    )
    optimizer = torch.optim.RAdam(student.parameters(), lr=RATE)
    found: list[float] = []
    for step, (images, random) in enumerate(batches()):
        values = schedules.for_method(method, step, learning_rate=RATE, total_steps=TOTAL_STEPS)
        optimizer.zero_grad()
        loss = build_loss(method, l2)(networks, images, values, random).mean()
        loss.backward()
        optimizer.step()
        assert values.target_ema is not None
        follow(target, student, values.target_ema)
        found.append(loss.item())
    assert found == pytest.approx(RECORDED[kind], rel=2e-5)

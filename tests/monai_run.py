"""`python -m monai.bundle run` without the ten seconds in which a process of its own imports MONAI; `test_bundle_configs` starts a real one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from medaug import assets


def run_from(folder: Path, stage: str, config_files: Sequence[Path | str], **options: Any) -> None:
    """What the command line does with these options when it is started in `folder`."""
    from monai.bundle import run

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(assets.bundles_root().parent))
        run(run_id=stage, config_file=[str(file) for file in config_files], **options)

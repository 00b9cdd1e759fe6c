"""The command line that a report shows: every option that matters, no folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from medaug.grading.command import grade_command
from medaug.grading.options import GradingOptions

COMMON = GradingOptions("all", 3, "cpu32")


@pytest.mark.parametrize(
    ("arm", "shown"),
    [
        ("none", "--arm none"),
        ("a=secret/folder", '--arm "a=$A"'),
        ("a-b.c=/secret", '--arm "a-b.c=$A_B_C"'),
        ("a=secret:amst", '--arm "a=$A:amst"'),
        ("a=secret:amst:secret/more", '--arm "a=$A:amst:$A_UNLABELLED"'),
        ("a=:amst:secret", '--arm "a=:amst:$A_UNLABELLED"'),
        ("a=real?fraction=0.5 + secret?per_real=1 + syn + rot", '--arm "a=real?fraction=0.5 + $A_2?per_real=1 + syn + rot"'),
        ("a=no-real + secret", '--arm "a=no-real + $A_2"'),
    ],
)
def test_folders_of_arms_are_variables(arm, shown):
    text = grade_command([arm], replace(COMMON, sources=["syn=secret/place"]))
    assert f" {shown} " in text and "secret" not in text
    assert '--source "syn=$SYN"' in text and text.endswith("--networks all --seeds 3 --profile cpu32")


def test_options_are_shown_where_they_are_not_the_default():
    options = replace(
        COMMON, synthetic_per_real=[0.5, 2.0], allocation="balance", real_fraction=[0.25, 1], allow_untrusted=True,
        overrides={"head": "coral", "precision": "bfloat16"}, pretrained={"resnet18": Path("secret/file")},
    )  # fmt: skip
    text = grade_command(["none"], options)
    assert (
        "--per-real 0.5,2 --allocation balance --real-fraction 0.25,1 --allow-untrusted --head coral --precision bfloat16" in text
    )
    assert text.endswith('--pretrained "resnet18=$RESNET18_WEIGHTS"')
    assert "--real-fraction" not in grade_command(["none"], replace(COMMON, real_fraction=1.0))

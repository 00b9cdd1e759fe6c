"""The arrows of docs/design.md hold: imports between rooms go one way, and nothing in the tree belongs to one machine."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "medaug"

BASE = frozenset({"", "errors", "storage", "draws", "cohort", "progress", "kinds"})  # "" is the package itself: its version
LOWER = BASE | {"io", "transforms", "networks", "splits", "prompts", "replay_record"}
MIDDLE = LOWER | {"diffusion", "training", "quality", "intake", "tracking"}
UPPER = MIDDLE | {"generation", "grading", "phantom", "assets", "sessions"}
# Room -> rooms that it may import. A room not named here fails the test: give it a place first.
ALLOWED: dict[str, frozenset[str]] = {
    "": frozenset(),
    "__main__": frozenset({"cli"}),
    "errors": frozenset(),
    "storage": BASE - {"cohort"},
    "draws": BASE - {"cohort"},
    "progress": BASE - {"cohort"},
    "kinds": frozenset({"errors"}),
    "sessions": BASE - {"cohort"},
    "cohort": BASE,
    "splits": BASE,
    "prompts": BASE - {"cohort"},
    "replay_record": BASE - {"cohort"},
    "assets": BASE,
    "io": BASE | {"io"},
    "transforms": BASE | {"io", "transforms"},
    "networks": BASE | {"networks"},
    "diffusion": frozenset({"diffusion", "errors"}),
    "delivery": BASE,
    "tracking": BASE | {"io", "tracking", "delivery"},
    "phantom": BASE | {"io", "phantom_drawing"},
    "phantom_drawing": BASE,
    "training": LOWER | {"diffusion", "training", "tracking"},
    "quality": LOWER | {"diffusion", "training", "quality", "tracking"},
    "intake": LOWER | {"intake", "tracking"},
    "export": BASE | {"io", "export"},
    "evidence": BASE | {"evidence"},
    "pacs": BASE | {"io", "pacs"},
    "generation": MIDDLE | {"generation", "assets"},
    "grading": MIDDLE | {"grading", "assets", "sessions"},
    "results": BASE | {"grading", "evidence", "quality", "sessions", "results"},
    "workflow": BASE | {"assets"},
    "stages": UPPER | {"grading", "generation"},
    "augment": UPPER | {"grading", "generation", "stages", "workflow", "phantom"},
    "pilot": UPPER | {"stages", "workflow", "augment"},
    "experiment_file": UPPER | {"workflow", "feedback"},
    "experiment_checks": UPPER | {"stages", "workflow", "experiment_file"},
    "experiment": UPPER | {"stages", "workflow", "feedback", "experiment_file", "experiment_checks"},
    "feedback": UPPER | {"stages", "workflow"},
    "cli": UPPER
    | {
        "generation",
        "grading",
        "stages",
        "workflow",
        "augment",
        "pilot",
        "experiment",
        "feedback",
        "export",
        "evidence",
        "results",
        "pacs",
        "cli",
    },
}
HEAVY = frozenset({"torch", "monai", "torchvision", "timm", "mlflow", "matplotlib", "pandas", "sklearn", "scipy", "ignite"})
LIGHT_ROOMS = ("", "errors", "storage", "draws", "progress", "cohort", "splits", "prompts", "assets", "cli")
# Tests may invent a private path to show that it is not passed on, but none of these.
WORKPLACE = re.compile(r"(?<![\w.$}/:<>-])/(?:work|root)/|\.\./shared\b")
MACHINE_PATH = re.compile(r"(?<![\w.$}/:<>-])/(?:work|root|home|Users|mnt|media)/|\b[A-Z]:\\Users|\.\./shared\b")
BINARY = {".png", ".dcm", ".gz", ".npz", ".safetensors", ".xlsx", ".jpg"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imported(tree: ast.AST, package: tuple[str, ...]) -> list[str]:
    """Dotted names that a module imports, relative ones made absolute, `from medaug import x` as medaug.x."""
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*origin, *filter(None, [node.module])])
            names += [f"medaug.{alias.name}" for alias in node.names] if module == "medaug" else [module]
    return names


def imports_of(path: Path) -> list[str]:
    return imported(ast.parse(path.read_text(encoding="utf-8")), path.relative_to(REPOSITORY).parent.parts)


def target_room(name: str) -> str | None:
    parts = name.split(".")
    if parts[0] != "medaug":
        return None
    return "" if len(parts) == 1 or parts[1].startswith("__") else parts[1]


def tracked_files() -> list[Path]:
    command = ["git", "-C", str(REPOSITORY), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, capture_output=True, text=True)
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    return [path for name in listing.stdout.split("\0") if name and (path := REPOSITORY / name).is_file()]


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_imports_follow_the_arrows(path: Path) -> None:
    assert room(path) in ALLOWED, f"{room(path)} has no place in the house: add it to docs/design.md and to ALLOWED"
    targets = {target for name in imports_of(path) if (target := target_room(name)) is not None}
    assert targets - ALLOWED[room(path)] == set()


def test_the_arrows_have_no_circle() -> None:
    seen: dict[str, int] = {}

    def height(name: str, above: tuple[str, ...] = ()) -> int:
        assert name not in above, f"circle: {' -> '.join([*above, name])}"
        if name not in seen:
            items = [item for path in modules() if room(path) == name for item in imports_of(path)]
            below = {target for item in items if (target := target_room(item))}
            seen[name] = 1 + max((height(target, (*above, name)) for target in below - {name, ""}), default=0)
        return seen[name]

    for name in {room(path) for path in modules()}:
        height(name)


@pytest.mark.parametrize("path", [path for path in modules() if room(path) in LIGHT_ROOMS], ids=lambda path: path.name)
def test_light_modules_import_nothing_heavy_at_the_top(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
    assert {name.split(".")[0] for name in imported(top, ("medaug",))} & HEAVY == set()


def test_the_import_finder_sees_every_form() -> None:
    absolute = "import medaug.io.png\nfrom medaug import cohort, draws\nimport torch as t\n"
    tree = ast.parse(absolute + "from ..errors import X\nfrom . import y")
    found = {"medaug.io.png", "medaug.cohort", "medaug.draws", "torch", "medaug.errors", "medaug.io"}
    assert set(imported(tree, ("medaug", "io"))) == found


def test_bundles_hold_no_python() -> None:
    assert [path.name for path in (REPOSITORY / "bundles").rglob("*.py")] == []


def test_no_file_names_a_path_of_one_machine() -> None:
    found = []
    for path in tracked_files():
        if path.suffix in BINARY or path == Path(__file__).resolve():
            continue
        pattern = WORKPLACE if "tests" in path.relative_to(REPOSITORY).parts else MACHINE_PATH
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if pattern.search(line):
                found.append(f"{path.relative_to(REPOSITORY)}:{number}")
    assert found == []


@pytest.mark.parametrize(
    ("line", "bad"),
    [
        ("open('/root/x')", True),
        ("data: /home/ann/x", True),
        ("../shared/data", True),
        ("github.com/home/x", False),
        ("$HOME/x and ${A}/home/x", False),
        ("a/root/b", False),
    ],
)
def test_the_path_pattern(line: str, bad: bool) -> None:
    assert bool(MACHINE_PATH.search(line)) is bad

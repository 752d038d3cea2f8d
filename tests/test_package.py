"""The package as it is installed: what the wheel holds, what it declares, what --help costs."""

import ast
import inspect
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import inform_rm

COMMANDS = (
    *("demo", "train", "evaluate", "compare", "decompose", "detect", "simulate", "score", "check-data", "export"),
    *("report", "serve", "generate", "judge"),
)
HEAVY = {"torch", "transformers", "datasets", "accelerate", "numpy", "pandas", "matplotlib", "pyarrow"}
IMPORT_NAMES = {"pyyaml": "yaml", "scikit-learn": "sklearn"}  # where the import name is not the distribution's


@pytest.fixture(scope="module")
def checkout() -> Path:
    root = Path(__file__).resolve().parents[1]
    if not (root / "setup.py").is_file():
        pytest.skip("no source checkout around these tests")
    return root


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    # Built from a copy: setuptools writes into the folder it builds from.
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(checkout / name, source)
    shutil.copytree(
        checkout / "inform_rm", source / "inform_rm", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__")
    )
    output = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", output, source]
    subprocess.run(build, check=True, capture_output=True, timeout=120)
    (path,) = output.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.mark.slow
def test_wheel_holds_every_source_file_and_nothing_else(wheel, checkout):
    expected = {
        path.relative_to(checkout).as_posix()
        for path in (checkout / "inform_rm").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == expected
    assert "inform_rm/py.typed" in expected
    assert any(name.startswith("inform_rm/training/accelerate_configs/") for name in expected)


@pytest.mark.slow
def test_wheel_metadata(wheel):
    (folder,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    fields = Parser().parsestr(wheel.read(f"{folder}/METADATA").decode())
    assert fields["Name"] == "inform-rm"
    assert fields["Version"] == inform_rm.__version__
    assert fields["License-Expression"] == "Apache-2.0"
    assert fields["Description-Content-Type"] == "text/markdown" and fields.get_payload().strip()
    assert set(fields.get_all("Provides-Extra")) == {"bf16", "docs", "peft", "quant", "rl", "serve", "dev"}
    assert f"{folder}/licenses/LICENSE" in wheel.namelist()
    assert "inform-rm = inform_rm.cli:main" in wheel.read(f"{folder}/entry_points.txt").decode()


def test_version_is_the_same_everywhere(checkout):
    assert metadata.version("inform-rm") == inform_rm.__version__
    assert f"## {inform_rm.__version__}" in (checkout / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_public_name_stands_in_the_reference_and_says_arguments_result_and_errors(checkout):
    reference = (checkout / "docs/reference/api.md").read_text(encoding="utf-8")
    named = re.findall(r"^::: ([\w.]+)$", reference, re.MULTILINE)
    assert sorted(named) == sorted(f"{getattr(inform_rm, name).__module__}.{name}" for name in inform_rm.__all__)
    for name in inform_rm.__all__:
        found = getattr(inform_rm, name)
        described = inspect.getdoc(found) or ""
        sections = {section for section in ("Args:", "Returns:", "Raises:") if f"\n{section}\n" in described}
        if inspect.isclass(found):
            assert "Args:" in sections, name
            continue
        gives = inspect.signature(found).return_annotation not in (None, "None")
        # What takes a file or a model refuses some, if not in its own lines.
        assert sections == {"Args:", "Raises:", *(["Returns:"] if gives else [])}, name


def test_declared_requirements_are_the_imported_ones():
    imported = set()
    for path in Path(inform_rm.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(str(node.module).split(".")[0])
    imported -= sys.stdlib_module_names | {"inform_rm"}

    requirements = [Requirement(line) for line in metadata.requires("inform-rm") or []]

    def import_names(chosen: list[Requirement]) -> set[str]:
        return {IMPORT_NAMES.get(r.name.lower(), r.name.lower().replace("-", "_")) for r in chosen}

    always = import_names([r for r in requirements if r.marker is None])
    optional = import_names([r for r in requirements if r.marker is not None and "dev" not in str(r.marker)])
    assert imported - always - optional == set(), "imported, but not declared in setup.py"
    # transformers itself calls accelerate (Trainer) and safetensors (weights), whether or not our code names them.
    assert always - imported - {"accelerate", "safetensors"} == set(), "declared in setup.py, but never imported"


def test_pinned_versions_are_within_the_declared_ranges(checkout):
    lines = (checkout / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pinned = {canonicalize_name(name): version for name, version in pinned.items()}
    assert not [name for name in pinned if name.startswith(("nvidia", "cuda"))]
    for line in metadata.requires("inform-rm") or []:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} is declared in setup.py but not pinned in constraints.txt"
        assert requirement.specifier.contains(pinned[name]), f"{line}: constraints.txt pins {pinned[name]}"


def test_oldest_versions_are_the_lower_ends_of_the_declared_ranges(checkout):
    lines = (checkout / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    oldest = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    oldest = {canonicalize_name(name): Version(version) for name, version in oldest.items()}
    for line in metadata.requires("inform-rm") or []:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        if not requirement.specifier or name in ("setuptools", "trl") or "docs" in str(requirement.marker):
            continue  # tools; and TRL, which needs a later version of datasets than this package does
        (lower,) = (Version(part.version) for part in requirement.specifier if part.operator == ">=")
        assert oldest[name].release[: len(lower.release)] == lower.release, f"{line}: {oldest.get(name)} was run"


def test_help_imports_nothing_heavy(tmp_path):
    """All commands in one process: what any of them imports is seen after it."""
    script = tmp_path / "inform-rm"  # by this name the package knows that it is the command line
    script.write_text("""
import contextlib, io, sys
from inform_rm.cli import main
for command in ([], *([name] for name in sys.argv[1:])):
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        main([*command, "--help"])
    assert shown.getvalue().startswith(" ".join(["usage: inform-rm", *command])), command
print(*sys.modules)
""")
    finished = subprocess.run([sys.executable, script, *COMMANDS], capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stderr
    modules = finished.stdout.split()
    assert {name.split(".")[0] for name in modules} & HEAVY == set()
    # Modules, not seconds: a busy machine may not fail it. One third-party package would double the number.
    assert "inform_rm" in modules and len(modules) < 300

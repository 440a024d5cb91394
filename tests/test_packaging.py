"""The wheel holds what git holds, and every layer imports without what stands above it."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("transformers", "peft", "bitsandbytes", "datasets", "openai", "trl")
LAYERS = {
    "nspo_lightning": (*HEAVY, "torch", "lightning"),
    "nspo_lightning.nullspace": (*HEAVY, "lightning"),
    "nspo_lightning.grpo": (*HEAVY, "lightning"),
    "nspo_lightning.callbacks": HEAVY,
    "nspo_lightning.datamodules": ("transformers", "peft", "bitsandbytes", "openai"),
    "nspo_lightning.rewards": HEAVY,
    "nspo_lightning.rollout": ("lightning", "peft", "bitsandbytes", "datasets"),
    "nspo_lightning.toy.world": (*HEAVY, "torch", "lightning"),
}
BLOCKER = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in {blocked!r}:
            return None
        frame = sys._getframe(1)
        while "importlib" in frame.f_globals.get("__name__", ""):
            frame = frame.f_back
        # Libraries below may look for optional ones by themselves (torchmetrics looks for transformers).
        if frame.f_globals["__name__"].startswith(("nspo_lightning", "__main__")):
            raise ImportError(name + " is above this layer")
sys.meta_path.insert(0, Blocked())
import {module}
"""


@pytest.mark.parametrize("module", LAYERS)
def test_a_layer_imports_without_what_stands_above_it(module):
    code = BLOCKER.format(blocked=set(LAYERS[module]), module=module)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """What git holds, in a folder of its own: (folder, names)."""
    git = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=False)
    if git.returncode:
        pytest.skip("not a git checkout")
    source = tmp_path_factory.mktemp("checkout")
    names = [name for name in git.stdout.splitlines() if (ROOT / name).exists()]
    for name in names:
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            target.symlink_to((ROOT / name).readlink())
        else:
            target.write_bytes((ROOT / name).read_bytes())
    return source, names


def test_the_wheel_holds_what_git_holds(copied, tmp_path):
    source, names = copied
    # Without isolation: the build backend is what is installed here, and nothing is downloaded.
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path), "."]
    result = subprocess.run(build, capture_output=True, text=True, cwd=source, check=False)
    assert result.returncode == 0, result.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    folders = {"callbacks": "nspo_lightning/callbacks", "datamodules": "nspo_lightning/datamodules"}
    folders["configs"] = "nspo_lightning/configs"
    expected = set()
    for name in names:
        top, _, rest = name.partition("/")
        if top in folders:
            expected.add(f"{folders[top]}/{rest}")
        elif top == "nspo_lightning" and not (ROOT / name).is_symlink():
            expected.add(name)
    assert packed == expected


def test_the_source_archive_builds_the_same_wheel_and_brings_the_tests(copied, tmp_path):
    source, names = copied
    code = f"import os, setuptools.build_meta as b; os.chdir({str(source)!r}); print(b.build_sdist({str(tmp_path)!r}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        name
        for name in names
        if name.partition("/")[0] in {"callbacks", "configs", "datamodules", "nspo_lightning", "tests"}
        and not (ROOT / name).is_symlink()
    }
    assert wanted | {"pyproject.toml", "README.md", "LICENSE"} <= packed


def test_every_folder_of_the_package_is_listed(copied):
    """Setuptools fills the screen of an install with warnings about a folder that is packed and not listed."""
    text = (ROOT / "pyproject.toml").read_text()
    listed = set(re.findall(r'^  "(nspo_lightning[\w.]*)",$', text, re.MULTILINE))
    _, names = copied
    tops = {
        "nspo_lightning": "",
        "callbacks": "nspo_lightning.",
        "configs": "nspo_lightning.",
        "datamodules": "nspo_lightning.",
    }
    files = [Path(name) for name in names if not (ROOT / name).is_symlink()]
    found = {tops[file.parts[0]] + ".".join(file.parent.parts) for file in files if file.parts[0] in tops}
    assert listed == found

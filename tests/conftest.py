"""Shared by the tests: the project's folder, the real scans (or a skip that says why), and a runner for commands."""
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT / "tests"))


LONG = ("test_kill", "test_packaging", "test_paper", "test_report", "test_site")  # all of each; begun first, so that no worker waits in the end


def pytest_configure(config):
    for words in ("long: takes more than two seconds of a core; left out of `make test`, run by `make test-all`",
                  "many: cases that differ in a value; `make test` runs one in eight, `make test-all` the others",
                  "slow: takes minutes, or needs a server; run by `make test-slow` alone"):
        config.addinivalue_line("markers", words)


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by marker
def pytest_collection_modifyitems(items):
    for item in items:
        is_left_out = item.get_closest_marker("many") and "[" in item.name and zlib.crc32(item.name.encode()) % 8
        if item.path.stem in LONG or is_left_out:
            item.add_marker("long")
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(scope="session")
def project() -> Path:
    "The folder with settings.ini."
    return PROJECT


@pytest.fixture(scope="session")
def real_data() -> Path:
    "The folder with real head CT; skips where SAHLORA_REAL_DATA does not name one."
    folder = Path(os.environ.get("SAHLORA_REAL_DATA", ""))
    if not os.environ.get("SAHLORA_REAL_DATA") or not folder.is_dir():
        pytest.skip("needs real head CT: set SAHLORA_REAL_DATA to the folder that holds ct-ich-mini and ge-head-ct")
    return folder


@pytest.fixture
def command():
    "Run a command in the project without any real data but what is asked for; returns the finished process."

    def run(*arguments: str, cwd: Path = PROJECT, **environment: str) -> subprocess.CompletedProcess:
        env = {name: value for name, value in os.environ.items() if name not in ("SAHLORA_REAL_DATA", "IN_TEST")}
        return subprocess.run(arguments, cwd=cwd, capture_output=True, text=True, env={**env, **environment})

    return run

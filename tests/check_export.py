"""Do the notebooks and the exported package agree? Compares with a fresh export in a folder of its own.

Usage: python tests/check_export.py [project folder]. Exits with 1 and a list when something differs. Checked twice:
the files as they lie here, and the last commit, so that a notebook can not be committed without its module.
"""
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CONFIGURATION = ("settings.ini", "pyproject.toml")


def run(*command: str, cwd: Path) -> str:
    "Output of a command. Raises: RuntimeError with what it printed when it fails."
    environment = {name: value for name, value in os.environ.items() if name != "IN_TEST"}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def files(folder: Path, pattern: str) -> dict[str, bytes]:
    "Relative path -> content of what a folder holds, caches left out."
    paths = (path for path in folder.rglob(pattern) if not {"__pycache__", ".ipynb_checkpoints"} & set(path.parts))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def differences(project: Path) -> list[str]:
    "What differs between a project's sahlora/ and nbs/ and a fresh export and clean of its notebooks."
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch) / "project"
        shutil.copytree(project / "nbs", fresh / "nbs")
        for name in CONFIGURATION:
            shutil.copy(project / name, fresh)
        run("nbdev-export", cwd=fresh)
        run("nbdev-clean", cwd=fresh)
        found = []
        for folder, pattern, remedy in (("sahlora", "*.py", "make export"), ("nbs", "*.ipynb", "make export")):
            here, there = files(project / folder, pattern), files(fresh / folder, pattern)
            for name in sorted(here.keys() | there.keys()):
                if name not in there:
                    found.append(f"{folder}/{name}: no notebook exports it; delete it")
                elif name not in here:
                    found.append(f"{folder}/{name}: missing; run {remedy}")
                elif here[name] != there[name]:
                    found.append(f"{folder}/{name}: differs from a fresh export; run {remedy} (never edit it by hand)")
        return found


def untracked(project: Path) -> list[str]:
    "Files in sahlora/ and nbs/ that git neither tracks nor ignores."
    listed = run("git", "ls-files", "--others", "--exclude-standard", "sahlora", "nbs", cwd=project)
    return [f"{name}: not tracked by git; add or delete it" for name in listed.splitlines()]


def committed_differences(project: Path) -> list[str]:
    "What differs in the last commit, taken out of git."
    with tempfile.TemporaryDirectory() as scratch:
        archive = Path(scratch) / "head.tar"
        run("git", "archive", "HEAD", "--output", str(archive), cwd=project)
        shutil.unpack_archive(archive, Path(scratch) / "head", filter="data")
        return [f"last commit: {line}" for line in differences(Path(scratch) / "head")]


def check(project: Path) -> list[str]:
    "Everything that is wrong with the export of a project, [] when nothing is."
    found = differences(project)
    if (project / ".git").exists():
        found += untracked(project)
        if run("git", "status", "--porcelain", "sahlora", "nbs", cwd=project):
            found += committed_differences(project)
    return found


if __name__ == "__main__":
    wrong = check(Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve())
    print("\n".join(wrong) or "notebooks and package agree")
    sys.exit(bool(wrong))

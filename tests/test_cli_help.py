"""The command explains itself: help with examples that parse, completion, exit codes, no colours where none are wanted."""
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import sahlora
from sahlora import cli
from sahlora.adapters import METHODS
from sahlora.common.hardware import DEVICES, PRECISIONS
from sahlora.cohorts.layouts import LAYOUTS
from sahlora.training.transfer import strategy_words
from sahlora.unet import NETWORKS

ESCAPE = "\x1b["
PROGRAM = Path(sys.executable).parent / "sahlora"
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("IN_TEST", "NO_COLOR", "TERM", "PYTHONWARNINGS")}


def tree(command, words=()):
    "Every command and group of the program by the words that call it."
    found = {words: command}
    for name, sub in getattr(command, "commands", {}).items():
        found |= tree(sub, (*words, name))
    return found


ROOT = typer.main.get_command(cli.app)
TREE = tree(ROOT)
LEAVES = {words: command for words, command in TREE.items() if not hasattr(command, "commands")}


def run(*words):
    return CliRunner().invoke(cli.app, [str(word) for word in words], prog_name="sahlora")


def in_terminal(*words, **environment):
    "What a program prints to a terminal, and its exit code."
    leader, follower = pty.openpty()
    done = subprocess.Popen([str(word) for word in words], stdin=follower, stdout=follower, stderr=follower,
                            env={**ENVIRONMENT, "TERM": "xterm-256color", **environment})
    os.close(follower)
    said = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:  # the other end is closed: the program has ended
            break
        if not part:
            break
        said += part
    os.close(leader)
    return said.decode(), done.wait()


def test_the_commands_are_these():
    assert {" ".join(words) for words in LEAVES} == {
        "pretrain", "finetune", "predict", "export", "cohort make", "cohort import", "cohort layouts", "cohort check", "cohort show",
        "cohort folds", "models show", "models make", "study run", "study plan", "report html", "report pdf", "report figures"}


@pytest.mark.parametrize("words", TREE, ids=" ".join)
def test_help_explains(words):
    done = run(*words, "--help")
    assert done.exit_code == 0 and len(done.output) > 120
    for option in TREE[words].params:
        assert getattr(option, "help", None), f"{option.name} of {words} has no help"


@pytest.mark.parametrize("words", [(), *LEAVES], ids=" ".join)
def test_examples_can_be_copied(words):
    "Each example names a command that is there, with arguments and options that it takes."
    lines = re.findall(r"^ +(sahlora .*)$", run(*words, "--help").output, re.M)
    assert lines, "no example"
    for line in lines:
        command, rest = ROOT, shlex.split(line, comments=True)[1:]
        while hasattr(command, "commands") and rest and rest[0] in command.commands:
            command = command.commands[rest.pop(0)]
        if rest in (["--help"], ["--install-completion", "then", "open", "a", "new", "shell"]):
            continue
        assert not hasattr(command, "commands"), line
        command.make_context("sahlora", rest)  # raises for what it does not take
        assert not words or line.startswith(" ".join(("sahlora", *words))), line


def test_a_long_help_fits_the_terminal():
    "Examples are lines of their own, not wrapped into the text."
    wide = [line for line in run("predict", "--help").output.splitlines() if len(line) > 80]
    assert all("sahlora " in line for line in wide)


def test_options_are_called_the_same_everywhere():
    "One name, one type, and the words that the project chose."
    types, names = {}, {}
    for words, command in LEAVES.items():
        hints = typing.get_type_hints(command.callback)
        for option in command.params:
            if option.param_type_name == "option" and option.name in hints:
                kinds = set(typing.get_args(hints[option.name])) - {type(None)} or {hints[option.name]}
                names.setdefault(words, set()).update(option.opts)
                types.setdefault(option.opts[0], set()).update(kinds)
    mixed = {name for name, kinds in types.items() if len(kinds) > 1}
    assert mixed == {"--folds", "--learning-rate"}  # a number to draw, or a file to read; one rate, or several to choose from
    assert not {"--output", "--lr", "--force", "--epochs", "--bs", "--verbose"} & set(types)
    for words in (("pretrain",), ("finetune",), ("predict",)):
        assert {"--out", "--batch-size", "--device", "--precision", "--quiet"} <= names[words]


def test_version(command):
    assert run("--version").output.strip() == sahlora.__version__
    done = command(str(PROGRAM), "--version")
    assert (done.returncode, done.stdout.strip()) == (0, sahlora.__version__)


def test_help_starts_fast(command):
    "Nothing heavy is imported for help: it is shown at once."
    done = command(sys.executable, "-X", "importtime", str(PROGRAM), "predict", "--help")
    loaded = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert done.returncode == 0 and not loaded & {"torch", "numpy", "monai", "pandas", "nibabel", "matplotlib", "scipy", "yaml"}


def test_exit_codes_are_documented_and_kept(tmp_path):
    said = run("--help").output
    assert all(re.search(rf"^ +{code} +\S", said, re.M) for code in (0, 1, 2, 130))
    assert run("cohort", "layouts").exit_code == 0
    assert run("cohort", "make", "--kind", "tbi", "--cases", 1, "--grid", "32x40", "--slices", 8, "--out", tmp_path / "c").exit_code == 0
    label = next((tmp_path / "c" / "labels").iterdir())
    label.write_bytes(label.read_bytes()[:-8])
    assert run("cohort", "check", tmp_path / "c").exit_code == 1
    for words in (["cohort", "check", tmp_path / "none"], ["predict"], ["predict", "x", "--colour", "red"], ["nothing"],
                  ["predict", tmp_path / "none.nii.gz", "--out", tmp_path / "m"], ["export", "--threshold", "2", "--out", tmp_path / "b"]):
        assert run(*words).exit_code == 2, words
    for words in (("cohort", "check"), ("cohort", "import"), ("predict",), ("study", "run")):
        assert "Exit code 1" in re.sub(r"\s+", " ", run(*words, "--help").output), words


@pytest.mark.long
@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_ctrl_c_ends_with_130(tmp_path):
    "In words of no line at all, and as a shell expects it."
    done = subprocess.Popen([PROGRAM, "cohort", "make", "--kind", "tbi", "--cases", "500", "--out", tmp_path / "c"], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a shell's background jobs ignore it
    made = tmp_path / "c" / "images"
    for _ in range(600):
        if made.is_dir() and any(made.glob("*.nii.gz")):
            break
        time.sleep(0.1)
    done.send_signal(signal.SIGINT)
    _, said = done.communicate(timeout=60)
    assert done.returncode == 130 and "Traceback" not in said


@pytest.mark.long
def test_no_colour_is_printed(tmp_path):
    "Neither help nor errors hold an escape sequence, in a terminal that has colours."
    for words in (["--help"], ["predict", "--help"], ["predict", "--colour"], ["cohort", "check", tmp_path / "none"]):
        for environment in ({"NO_COLOR": "1"}, {}):
            said, _ = in_terminal(PROGRAM, *words, **environment)
            assert said and ESCAPE not in said, said


@pytest.mark.long
def test_no_color_reaches_snakemake(tmp_path, monkeypatch):
    "Snakemake knows TERM alone: with NO_COLOR it gets one without colours, and then prints none."
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    run("cohort", "layouts")
    assert os.environ["TERM"] == "xterm-256color"
    monkeypatch.setenv("NO_COLOR", "1")
    run("cohort", "layouts")
    assert os.environ["TERM"] == "dumb"
    (tmp_path / "Snakefile").write_text("rule all:\n    output: 'x'\n    shell: 'touch x'\n")
    words = (sys.executable, "-m", "snakemake", "-s", tmp_path / "Snakefile", "-d", tmp_path, "--dry-run")
    assert ESCAPE in in_terminal(*words)[0], "otherwise this test shows nothing"
    assert ESCAPE not in in_terminal(*words, TERM="dumb")[0]


def completed(*words):
    "What bash offers for a line, through the script that sahlora gives it."
    script = f"""source <(_SAHLORA_COMPLETE=source_bash sahlora)
COMP_WORDS=({' '.join(shlex.quote(word) for word in words)}); COMP_CWORD={len(words) - 1}
_sahlora_completion sahlora; printf '%s\\n' "${{COMPREPLY[@]}}" """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True,
                          env={**ENVIRONMENT, "PATH": f"{PROGRAM.parent}:{os.environ['PATH']}"})
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.long
def test_completion_in_a_shell():
    assert completed("sahlora", "pre") == ["pretrain", "predict"]
    assert completed("sahlora", "cohort", "") == ["make", "import", "layouts", "check", "show", "folds"]
    assert "--adapter" in completed("sahlora", "predict", "--ad")
    assert completed("sahlora", "predict", "x", "--adapter", "cp") == ["cp-lora", "cp-dora"]
    assert completed("sahlora", "export", "--model", "ph") == ["phantom"]


def test_completion_is_offered_and_documented():
    said = run("--help").output
    assert "--install-completion" in said and "--show-completion" in said and "bash, zsh, fish" in said


def test_completed_words_are_those_of_the_package():
    "They are written down in the command, so that help need not import torch."
    def words(command, option):
        found = next(param for param in LEAVES[command].params if f"--{option}" in param.opts)
        return [item.value if hasattr(item, "value") else item for item in found.shell_complete(None, "")]

    assert tuple(words(("predict",), "adapter")) == tuple(METHODS) == cli.METHOD_NAMES
    assert set(words(("predict",), "device")) == set(DEVICES) and set(words(("predict",), "precision")) == set(PRECISIONS)
    assert set(words(("pretrain",), "network")) == set(NETWORKS)
    assert set(words(("finetune",), "method")) <= set(strategy_words())
    assert set(words(("cohort", "import"), "layout")) == set(LAYOUTS)


def test_a_study_outside_a_checkout_says_so(tmp_path, monkeypatch):
    "As in an environment that holds the package alone."
    monkeypatch.setattr("sahlora.study.experiment.project_path", lambda path: tmp_path / path)
    for word in ("run", "plan"):
        said = run("study", word, "smoke.yaml")
        assert said.exit_code == 2 and "in a checkout of the project" in said.output
    monkeypatch.undo()
    monkeypatch.setattr("sahlora.cli.find_spec", lambda name: None)
    said = run("study", "plan", "paper/studies/smoke.yaml")
    assert said.exit_code == 2 and "psutil, snakemake, papermill missing" in said.output

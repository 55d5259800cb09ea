"""The console script `bonsai-fast` and the help of every command: short, complete, quick."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import get_args

import pytest

import bonsai_fast_cli
from bonsai_fast.config import PruneConfig
from bonsai_fast.config.choices import MethodName
from bonsai_fast.methods.configure import all_options, common_options, method_options, resolve
from bonsai_fast.prune.__main__ import parse
from bonsai_fast.prune.prune_options import ELSEWHERE

ROOT = Path(bonsai_fast_cli.__file__).parent
MAX_LINES = 60
PAGES = [f"{name} --help" for name in bonsai_fast_cli.COMMANDS] + [
    f"prune --method {method} --help" for method in get_args(MethodName)
]


@pytest.fixture
def page(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> object:
    """What a command line prints, of a terminal with 100 columns."""
    monkeypatch.setenv("COLUMNS", "100")

    def read(words: str) -> str:
        try:
            code = bonsai_fast_cli.main(words.split())
        except SystemExit as error:
            code = int(error.code or 0)
        out, err = capsys.readouterr()
        assert code == 0 and err == ""
        return out

    return read


def flags_of(text: str) -> set[str]:
    """Names of the options that a page lists."""
    lines = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
    return {line.replace("[no-]", "").removeprefix("--").replace("-", "_") for line in lines}


@pytest.mark.parametrize("words", PAGES)
def test_help_is_short_and_says_every_default(words: str, page) -> None:
    text = page(words)
    lines = text.splitlines()
    assert 15 < len(lines) <= MAX_LINES and max(map(len, lines)) <= 100
    assert lines[0].startswith(f"Usage: bonsai-fast {words.split()[0]} ")
    for wrong in ("None", "(default", "default: default;", "_size", "{", "True", "False"):
        assert wrong not in text, wrong
    assert all("_" not in line.split()[0] for line in lines if line.startswith("  --"))


def test_the_first_page_names_every_command(page) -> None:
    text = page("--help")
    assert text == page("") == page("-h") and len(text.splitlines()) <= 20
    commands = {path.parent.name for path in (ROOT / "bonsai_fast").glob("*/__main__.py")}
    assert commands == set(bonsai_fast_cli.COMMANDS)
    for name, summary in bonsai_fast_cli.COMMANDS.items():
        assert f"  {name} " in text and summary in text
        main = import_module(f"bonsai_fast.{name}.__main__")
        assert main.__doc__.splitlines()[0] == summary and main.COMMAND.name == name


def test_options_of_a_method_are_on_its_page_alone(page) -> None:
    common = flags_of(page("prune --help"))
    words = page("prune --help").replace(",", " ").split()
    assert set(get_args(MethodName)) <= set(words)
    listed = {*common_options()} - {*ELSEWHERE}
    assert common >= {*listed, "output", "plan", "stream", "device", "config"}
    assert not common & {name for name, option in all_options().items() if option.methods}
    for method in get_args(MethodName):
        text = page(f"prune --method {method} --help")
        assert flags_of(text) == {*method_options(method), "num_sequences", "sequence_length"}
        assert f"Method {method} " in text
        assert text == page(f"prune --method={method} --help")


def test_defaults_of_presets_are_shown(page) -> None:
    words = " ".join(page("prune --method mini-llm --help").split())
    for shown in ("[default: 8; paper: 1]", "[default: 64; paper: 128]", "[default: no]"):
        assert shown in words
    for method, shown in (("sparsegpt", "yes"), ("wanda", "no")):
        words = " ".join(page(f"prune --method {method} --help").split())
        assert f"make up for the others. [default: {shown}]" in words


@pytest.mark.parametrize(
    "words, message",
    [
        ("prun", "unknown command prun: did you mean prune?"),
        ("xyz", "unknown command xyz: expected one of prune, compare, recover, surgery"),
        ("--hepl", "unknown command --hepl: did you mean --help?"),
        ("prune --num-sequence 3", "--num-sequence. Did you mean --num-sequences?"),
        ("latency x --round 3", "--round. Did you mean --rounds?"),
        ("compare --tasks", "--tasks requires an argument"),
        (
            "prune --submodels-per-round 8",
            "submodels_per_round: method bonsai with regression=groups does not read it; it is "
            "read with regression=ridge or paper (as in preset paper) and by policy-gradient",
        ),
        ("prune --method wanda --uniform", "uniform: method wanda does not read it"),
        ("prune --method wanda --uniform=false", "uniform: method wanda does not read it"),
        ("prune --method flap --pattern 2:4", "pattern: method flap does not read it"),
        ("prune --method bonsia", "method: expected one of bonsai, wanda-sp"),
        ("--install-completion --shell tcsh", '"zsh", "bash", "fish"'),
    ],
)
def test_mistakes_take_one_line(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = bonsai_fast_cli.main(words.split())
    except SystemExit as error:
        code = int(error.code or 0)
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and err.startswith("error: ")
    assert err.count("\n") == 1 and message in err, err


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "some/model --sparsity 0.3 --preset paper --rounds 3 --output out --stream",
        "--method policy-gradient --learning-rate 0.0001 --dtype float16 --seed 3",
        "--method wanda --pattern 2:4 --preset paper --trust-remote-code",
        "--method sparsegpt --no-weight-update --calibration file:a.txt --memory-budget 1GB",
        "--target params=90K --round-to 64 --sublayers --tasks a,b --plan",
        "--recover distill --recover-tokens 5000 --recover-weights all",
        "--method flap --recover none",
    ],
)
def test_what_is_saved_gives_the_same_run(flags: str, tmp_path: Path) -> None:
    file = str(tmp_path / "run.yaml")
    first = parse([*flags.split(), "--save-config", file])
    text = Path(file).read_text()
    again = parse(["--config", file, "--save-config", file])
    assert again[0] == first[0] and again[2] == first[2]
    assert resolved(again[1]) == resolved(first[1]) and Path(file).read_text() == text
    assert "method: " in text and "num_sequences: " in text and "null" not in text
    assert any(line.startswith(("sparsity: ", "target: ")) for line in text.splitlines())
    other = parse(["--config", file, "--seed", "99"])
    assert other[1].seed == 99 and other[0] == first[0]


def resolved(config: PruneConfig) -> dict[str, object]:
    """All values; no target and the default target are the same."""
    found = resolve(config)
    return {**found.values(), "sparsity": None, "target": found.target_text}


def test_a_file_cannot_name_what_the_method_does_not_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text("method: wanda\nrounds: 3\n")
    with pytest.raises(SystemExit) as caught:
        parse(["--config", str(tmp_path / "run.yaml")])
    assert caught.value.code == 2
    assert "rounds: method wanda does not read it" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_commands_and_options(
    shell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    script = tmp_path / "script"
    words = ["--install-completion", "--shell", shell, "--output", str(script)]
    assert bonsai_fast_cli.main(words) == 0
    text = script.read_text()
    for word in (*bonsai_fast_cli.COMMANDS, "num-sequences", "regression", "pad-channels-to"):
        assert word in text, word


LAZY = """
import sys
sys.argv = ["bonsai-fast", *sys.argv[1:]]
import bonsai_fast_cli
code = bonsai_fast_cli.main()
heavy = {"torch", "transformers", "rich", "bonsai_fast"} & set(sys.modules)
assert not heavy, heavy
sys.exit(code)
"""


@pytest.mark.parametrize("words, code", [("--help", 0), ("", 0), ("--version", 0), ("prun", 2)])
def test_the_first_page_imports_nothing_heavy(words: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LAZY, *words.split()], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr


def test_the_script_and_the_module_are_the_same_command(tmp_path: Path) -> None:
    starts = (["bonsai_fast_cli", "surgery"], ["bonsai_fast.surgery"])
    outputs = [
        subprocess.run(
            [sys.executable, "-m", *start, "a", "b"], cwd=ROOT, capture_output=True, text=True
        )
        for start in starts
    ]
    assert outputs[0].stderr == outputs[1].stderr != "" and outputs[0].stdout == ""
    assert [done.returncode for done in outputs] == [2, 2]


def test_the_script_imports_the_package_only_to_run_a_command() -> None:
    tree = ast.parse(Path(bonsai_fast_cli.__file__).read_text())
    names = [name for node in tree.body for name in imported(node)]
    assert names and set(names) <= set(sys.stdlib_module_names) | {"__future__"}


def imported(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name.partition(".")[0] for alias in node.names]
    return [str(node.module).partition(".")[0]] if isinstance(node, ast.ImportFrom) else []


SAVED = {
    "compare": "nowhere --methods flap:spare_first=2 --sparsity 0.2,0.5 --no-uniform --seed 3",
    "surgery": "nowhere mask.safetensors smaller --max-shard-size 1GB",
    "export": "nowhere --format gguf --precision q8_0 --check",
    "report": "nowhere --prompt one two --device cpu",
    "latency": "nowhere elsewhere --batch 1,8 --threads 2",
}


@pytest.mark.parametrize("name", SAVED)
def test_other_commands_save_and_read_their_options(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is written before the model is found to be missing."""
    monkeypatch.chdir(tmp_path)
    main = import_module(f"bonsai_fast.{name}.__main__").main
    assert main([*SAVED[name].split(), "--save-config", "first.yaml"]) == 2
    assert main(["--config", "first.yaml", "--save-config", "second.yaml"]) == 2
    text = Path("first.yaml").read_text()
    assert text == Path("second.yaml").read_text() and "nowhere" in text
    for word in SAVED[name].split():
        if not word.startswith("--"):
            assert word in text

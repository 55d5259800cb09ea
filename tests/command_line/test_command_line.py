"""Command lines made from dataclasses: values, files, help and errors, on an invented command."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from bonsai_fast.command_line import FILES, Command, argument, entries_of, save_config
from bonsai_fast.command_line.help_page import LABEL_WIDTH
from bonsai_fast.config.options import option


@dataclass(frozen=True, kw_only=True)
class CakeOptions:
    """How a cake is baked."""

    heat: float | None = option(None, "Degrees.", group="Oven", shown="180")
    num_eggs: int = option(2, "Eggs.", group="Dough")
    shape: Literal["round", "square"] = option("round", "Shape of the cake.", group="Dough")
    ratio: str | None = option(None, "Flour to sugar.", group="Dough", value="N:M")
    vegan: bool = option(False, "Without eggs.", group="Dough")
    cream: bool | None = option(None, "Whether there is cream.", group="Dough", shown="yes")
    topping: list[str] | None = option(
        None, "Fruit.", group="Dough", read_with={"shape": ("round", "oval")}
    )


COMMAND = Command(
    "bake",
    "Bake a cake.\n\nIt takes an hour.\n",
    (argument("cake", str, "Name of the cake."), argument("guest", str | None, "Who.", "nobody")),
    (*entries_of(CakeOptions), *FILES),
)


def parse(*words: object) -> dict[str, Any]:
    return COMMAND.parse([str(word) for word in words])[0]


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line of an error."""
    with pytest.raises(SystemExit) as caught:
        parse(*words)
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


def test_what_is_left_out_is_not_among_the_values() -> None:
    assert parse("torte") == {"cake": "torte"}
    found = parse("--heat", 170, "torte", "--vegan", "me", "--no-cream", "--topping", "kiwi", "fig")
    assert found == {
        "cake": "torte", "guest": "me", "heat": 170.0, "vegan": True, "cream": False,
        "topping": ["kiwi", "fig"],
    }  # fmt: skip
    assert parse("torte", "--num-eggs", 9, "--num-eggs", 3) == {"cake": "torte", "num_eggs": 3}
    assert parse("torte", "--num-eggs", 3) == parse("torte", "--num_eggs=3")


def test_a_file_has_the_same_names_and_the_command_line_wins(tmp_path: Path) -> None:
    file = tmp_path / "bake.yaml"
    file.write_text(
        "cake: torte\nnum-eggs: 3\nheat: 1e2\nratio: 2:4\nvegan: true\ncream: false\n"
        "shape: null\nguest:\ntopping: [kiwi, two figs]\n"
    )
    found = parse("--config", file, "--num-eggs", 4, "--vegan=false")
    assert found == {
        "cake": "torte", "num_eggs": 4, "heat": 100.0, "ratio": "2:4", "vegan": False,
        "cream": False, "topping": ["kiwi", "two figs"],
    }  # fmt: skip
    file.write_text("")
    assert parse("torte", "--config", file) == {"cake": "torte"}


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    file = tmp_path / "saved.yaml"
    words = ["torte", "--ratio", "2:4", "--cream", "--topping", "a: b", "#", "--heat", "1e-3"]
    found, where = COMMAND.parse([*words, "--save-config", str(file)])
    assert where == str(file) and not file.exists()
    cake = found.pop("cake")
    options = CakeOptions(**found)
    save_config(where, cake=cake, **asdict(options))
    again = parse("--config", file)
    assert again.pop("cake") == cake and CakeOptions(**again) == options
    assert yaml.safe_load(file.read_text())["ratio"] == "2:4"
    save_config(None, cake=cake)


FILES = {
    "unknown name": ("num_egs: 3", "bake.yaml: unknown option num_egs. Did you mean num-eggs?"),
    "no mapping": ("- torte", "bake.yaml: expected lines of the form name: value"),
    "no YAML": ("cake: [torte", "bake.yaml is not readable as YAML"),
    "no number": ("cake: torte\nheat: hot", "bake.yaml: heat: expected a number, got 'hot'"),
    "a list": ("cake: torte\nshape: [round, square]", "shape"),
}


@pytest.mark.parametrize("name", FILES)
def test_bad_files(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, message = FILES[name]
    (tmp_path / "bake.yaml").write_text(text)
    assert message in refused(capsys, "--config", tmp_path / "bake.yaml")
    assert "none.yaml" in refused(capsys, "torte", "--config", "none.yaml")


@pytest.mark.parametrize(
    "words, message",
    [
        ("", "CAKE is missing: bonsai-fast bake CAKE [GUEST] [OPTION ...]"),
        ("torte me you", "unexpected argument you"),
        ("torte --het 3", "--het. Did you mean --heat?"),
        ("torte --heat hot", "error: heat: expected a number, got 'hot'"),
        ("torte --heat", "--heat requires an argument"),
        ("torte --shape oval", "shape: expected one of round, square, got 'oval'"),
        ("torte --num-eggs 1.5", "num_eggs: expected a whole number, got '1.5'"),
        ("torte --vegan=maybe", "vegan: expected true or false, got 'maybe'"),
    ],
)
def test_errors_take_one_line(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, *words.split())


def test_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert caught.value.code == 0
    assert lines[:4] == [
        "Usage: bonsai-fast bake CAKE [GUEST] [OPTION ...]", "", "Bake a cake.", "",
    ]  # fmt: skip
    text = {
        line.split("  ")[1]: line[LABEL_WIDTH + 4 :] for line in lines if line.startswith("  --")
    }
    assert text == {
        "--heat X": "Degrees. [default: 180]",
        "--num-eggs N": "Eggs. [default: 2]",
        "--shape round|square": "Shape of the cake. [default: round]",
        "--ratio N:M": "Flour to sugar.",
        "--vegan": "Without eggs.",
        "--[no-]cream": "Whether there is cream. [default: yes]",
        "--topping TEXT ...": "Fruit. Only with --shape round or oval.",
        "--config FILE": "Read options from a YAML file; the command line wins.",
        "--save-config FILE": "Write all options that are used to a YAML file, for --config.",
    }
    headings = [line for line in lines if line in ("Arguments", "Oven", "Dough", "Output")]
    assert headings == ["Arguments", "Oven", "Dough", "Output"]

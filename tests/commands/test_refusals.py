"""Bad input: one clear line, exit code 2, nothing written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

Refused = Callable[..., str]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def broken(model: Path, tmp_path: Path) -> Path:
    """A copy of the model that a test may damage."""
    return Path(shutil.copytree(model, tmp_path / "broken"))


def options(asked: list[str], **changes: str) -> list[str]:
    """The options of a tiny run, some replaced: `model="x"`."""
    given = list(asked)
    for name, value in changes.items():
        given[given.index(f"--{name}") + 1] = value
    return given


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--target", "android-xnpack"], "no such target [android-xnpack]; did you mean android-xnnpack?"),
        (["--recipe", "w4a8-g23"], "no such recipe [w4a8-g23]; did you mean w4a8-g32?"),
        (["--recipe", "w4a8+affinquant"], "no such method [affinquant]; did you mean affinequant?"),
        (["--set", "learning.epoch=3"], "does not fit [recipe w4a8-g32]: Object contains unknown field `epoch`"),
        (["--set", "learning"], "cannot read --set [learning]"),
        (["--set", "weights.symmetric=false"], "no kernel [android-xnnpack: blocks.0.q_proj"),
        (["--set", 'activations.mode="none"'], "no kernel [android-xnnpack: blocks.0.q_proj"),
        (["--set", 'transforms.norm_to_linears="affine"'], "transform refused"),
        (["--window", "4096"], "window does not fit [--window 4096]: 2 to 256 tokens fit here"),
    ],
)
def test_what_is_asked_for(refused: Refused, asked: list[str], out: Path, more: list[str], said: str):
    assert refused("run", *asked, "--out", str(out), *more).startswith(said)
    assert not out.exists()


def test_missing_model(refused: Refused, asked: list[str], out: Path):
    line = refused("run", *options(asked, model="/no/such/model"), "--out", str(out))
    assert line.startswith("no such model [/no/such/model]")
    assert not out.exists()


def test_hub_id_without_network(refused: Refused, asked: list[str], out: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = refused("run", *options(asked, model="nobody/no-such-model"), "--out", str(out))
    assert line.startswith("cannot get the model from the hub [nobody/no-such-model]: HF_HUB_OFFLINE is set")
    assert not out.exists()


def test_truncated_safetensors(refused: Refused, asked: list[str], broken: Path, out: Path):
    weights = broken / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    line = refused("run", *options(asked, model=str(broken)), "--out", str(out))
    assert line.startswith(f"cannot read safetensors [{weights}]")
    assert not out.exists()


def test_pickles_are_not_loaded(refused: Refused, asked: list[str], broken: Path, out: Path):
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    line = refused("run", *options(asked, model=str(broken)), "--out", str(out))
    assert "pytorch_model.bin are pickles, which are never loaded" in line
    assert not out.exists()


def test_nan_in_a_weight(refused: Refused, asked: list[str], broken: Path, out: Path):
    from safetensors.torch import load_file, save_file

    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    small = ["--set", "samples.windows=2", "--set", "samples.length=32", "--windows", "2", "--window", "32"]
    given = [option for option in options(asked, model=str(broken)) if option != "--tiny"]
    line = refused("run", *given, *small, "--recipe", "w4a8+rtn", "--out", str(out))
    assert line.startswith("a weight is not finite") and "model.layers.1.mlp.up_proj.weight" in line
    assert not list(out.glob("*/block-001*")) and not (out / "bundle").exists() and not list(out.rglob("*.part"))


@pytest.mark.parametrize("which", ["calib", "eval"])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "empty text"),
        (b" \n\t\n", "empty text"),
        (b"a", "corpus too short [some.txt]: 1 tokens, one window takes"),
        (b"\x7fELF\x02\x01\x01\x00\xff\xfe", "not UTF-8 text"),
    ],
)
def test_texts(refused: Refused, asked: list[str], tmp_path: Path, out: Path, which: str, text: bytes, said: str):
    path = tmp_path / "some.txt"
    path.write_bytes(text)
    assert refused("run", *options(asked, **{which: str(path)}), "--out", str(out)).startswith(said)
    assert not out.exists()


@pytest.mark.parametrize("option", ["--recipe", "--target", "--calib"])
def test_toml_that_takes_a_parser_hours(refused: Refused, asked: list[str], tmp_path: Path, out: Path, option: str):
    path = tmp_path / "bomb.toml"
    path.write_text("a." * 400_000 + "a=1")
    line = refused("run", *asked, option, str(path), "--out", str(out))
    assert line == f"not valid TOML [{path}]: a line with more than 200 dots"
    assert not out.exists()


def test_a_tokenizer_with_more_ids_than_the_embedding(refused: Refused, asked: list[str], broken: Path, out: Path):
    tokenizer = json.loads((broken / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"]["vocab"]["a"] = 264
    (broken / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    line = refused("run", *options(asked, model=str(broken)), "--out", str(out))
    assert line.startswith(f"tokenizer and embedding do not fit [{broken}")
    assert line.endswith("the largest token id is 264, the embedding has 264 rows")
    assert not out.exists()


@pytest.mark.parametrize("content", ["", "[]", "null", '{"model": 3}', '{"version": "1.0"', "[" * 100_000])
def test_a_tokenizer_that_is_none(refused: Refused, asked: list[str], broken: Path, out: Path, content: str):
    (broken / "tokenizer.json").write_text(content)
    line = refused("run", *options(asked, model=str(broken)), "--out", str(out))
    assert line.startswith("cannot read the tokenizer") and len(line) < 500
    assert not out.exists()


def test_a_gguf_that_is_a_pickle(refused: Refused, asked: list[str], tmp_path: Path, out: Path):
    """Its name does not make it one; it is not executed."""
    path = tmp_path / "model.gguf"
    path.write_bytes(b"cposix\nsystem\n(S'touch " + str(tmp_path / "pwned").encode() + b"'\ntR.")
    refused("run", *options(asked, model=str(path)), "--out", str(out))
    assert not out.exists() and not (tmp_path / "pwned").exists()


def test_calibration_and_evaluation_overlap(refused: Refused, asked: list[str], texts: tuple[str, str], out: Path):
    line = refused("run", *options(asked, eval=texts[0]), "--out", str(out))
    assert line.startswith("calibration and evaluation are the same text")
    assert not out.exists()


def test_output_folder_of_someone_else(refused: Refused, asked: list[str], out: Path):
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    assert refused("run", *asked, "--out", str(out)).startswith(f"the output folder is not empty [{out}]")
    assert refused("run", *asked, "--out", str(out), "--fresh").startswith("the output folder is not empty")
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("command", ["run", "plan"])
def test_output_folder_that_cannot_be_written(refused: Refused, asked: list[str], tmp_path: Path, command: str):
    (tmp_path / "file").write_text("")
    assert refused(command, *asked, "--out", str(tmp_path / "file" / "run")).startswith("cannot write")


def test_output_folder_of_a_run_with_other_inputs(refused: Refused, asked: list[str], finished: Path):
    before = (finished / "run.json").read_bytes()
    line = refused("run", *asked, "--out", str(finished), "--seed", "7")
    assert line.startswith(f"the output folder holds a run with other inputs [{finished}]: seed was 0, is 7")
    assert (finished / "run.json").read_bytes() == before


@pytest.mark.parametrize("command", [["validate"], ["generate", "--prompt", "x"], ["perplexity"], ["inspect"]])
def test_changed_bundle(refused: Refused, finished: Path, tmp_path: Path, command: list[str]):
    run = Path(shutil.copytree(finished, tmp_path / "copy"))
    data = bytearray((run / "bundle" / "model.pte").read_bytes())
    data[len(data) // 2] ^= 1
    (run / "bundle" / "model.pte").write_bytes(data)
    line = refused(*command, str(run / "bundle"))
    assert line.startswith("a file of the bundle was changed") and "model.pte" in line


def test_things_that_are_no_bundle(refused: Refused, model: Path, finished: Path, tmp_path: Path):
    assert refused("validate", str(tmp_path)).startswith("unknown kind of folder")
    assert refused("validate", "nowhere").startswith("no such file or folder [nowhere]")
    assert refused("generate", str(model), "--prompt", "x").startswith(f"not a bundle [{model}]: it is a model")
    alone = Path(shutil.copytree(finished / "bundle", tmp_path / "alone"))
    assert refused("validate", str(alone)).startswith("no run folder")


def test_generation(refused: Refused, finished: Path):
    assert refused("generate", str(finished), "--prompt", "").startswith("the prompt has no token")
    assert refused("generate", str(finished), "--prompt", "x", "--chat").startswith("the model has no chat template")
    assert "longer than the program's context" in refused("generate", str(finished), "--prompt", "x" * 300)


def test_unlike_perplexities(refused: Refused, finished: Path, model: Path, texts: tuple[str, str], tmp_path: Path):
    report = str(finished / "bundle" / "report.json")
    given = ["perplexity", str(model), "--eval", texts[1], "--windows", "2", "--compare"]
    line = refused(*given, report, "--window", "32")
    assert line.startswith("perplexities of different protocols cannot be compared: window was 64, is 32")
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"some": "thing"}))
    assert refused(*given, str(other)).startswith(f"not figures of this program [{other}]")

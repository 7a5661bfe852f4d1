"""Bundles that would be silently wrong: one number changed, the manifest sealed again, and validation finds it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from afq_export.cli import call
from afq_export.errors import InputError, VerdictError
from afq_export.lower.bundle import open_bundle, seal
from afq_export.lower.executorch.readback import PackedLinear, read_linears
from afq_export.lower.executorch.weights import bfloat16_bits
from afq_export.progress import silent
from afq_export.quantize.checkpoint import QuantizedCheckpoint, open_checkpoint
from afq_export.revalidate import revalidate
from afq_export.runfolder import RunFolder
from afq_export.spec.report import Manifest
from tests.end_to_end.runs import Runs, copy_of

GROUPS, ROWS, STATIC = ("demo-llama", "w4a8-g32+awq"), ("demo-opt", "w4a8+awq"), ("demo-opt", "w8a8-static+smoothquant")
"""Runs that test_schemes.py asks for, too."""


@dataclasses.dataclass(frozen=True)
class Victim:
    """A copy of a finished run whose bundle a test changes."""

    folder: RunFolder
    manifest: Manifest

    @property
    def model(self) -> Path:
        return self.folder.bundle / "model.pte"

    @property
    def checkpoint(self) -> QuantizedCheckpoint:
        return open_checkpoint(self.folder.quantized)

    def linear(self, name: str) -> PackedLinear:
        """A linear as it stands in the program."""
        number = list(self.checkpoint.records).index(name)
        return read_linears(self.model.read_bytes())[number]

    def replace(self, *pairs: tuple[bytes, bytes]) -> None:
        """Puts other bytes in the place of some (all at once, the size stays) and seals the bundle again."""
        data = self.model.read_bytes()
        changed = bytearray(data)
        for old, new in pairs:
            assert len(old) == len(new) and old != new and data.count(old) == 1
            place = data.index(old)
            changed[place : place + len(old)] = new
        self.model.write_bytes(changed)
        self.seal()

    def seal(self) -> None:
        """Gives every file, as it is now, its entry in the manifest."""
        seal(self.folder.bundle, self.manifest)


@pytest.fixture
def victim(runs: Runs, tmp_path: Path) -> Callable[[tuple[str, str]], Victim]:
    """Copies the run of a model and a recipe."""

    def make(of: tuple[str, str]) -> Victim:
        folder = RunFolder(copy_of(runs(*of), tmp_path / "victim"))
        return Victim(folder, open_bundle(folder.bundle).manifest)

    return make


def stored(linear: PackedLinear, part: str) -> bytes:
    """The program's bytes of a linear's `codes`, `scales` or `bias`."""
    if part == "codes":
        return linear.packed
    if part == "bias":
        assert linear.bias is not None
        return linear.bias.tobytes()
    return (bfloat16_bits(linear.scales) if linear.kind == "qb4w" else linear.scales).tobytes()


def one_bit_off(data: bytes) -> bytes:
    """`data` with one bit of its middle byte turned over: one code, or the last bits of one number."""
    place = len(data) // 2 // 8 * 8
    return data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]


@pytest.mark.parametrize(
    ("of", "name", "part"),
    [
        (GROUPS, "blocks.2.up_proj", "codes"),
        (GROUPS, "blocks.1.o_proj", "scales"),
        (ROWS, "blocks.4.fc2", "codes"),
        (ROWS, "blocks.3.k_proj", "scales"),
        (ROWS, "blocks.2.q_proj", "bias"),
        (STATIC, "blocks.0.fc1", "bias"),
    ],
)
def test_one_bit_of_a_linear(victim: Callable[..., Victim], of: tuple[str, str], name: str, part: str) -> None:
    bundle = victim(of)
    old = stored(bundle.linear(name), part)
    bundle.replace((old, one_bit_off(old)))
    difference = "bias differs" if part == "bias" else f"{part} differ"
    with pytest.raises(VerdictError, match=rf"not the checkpoint \[{name}\]: {difference}"):
        revalidate(bundle.folder, silent)


def test_two_layers_in_each_others_place(victim: Callable[..., Victim]) -> None:
    """The first in running order is named."""
    bundle = victim(GROUPS)
    one, two = (stored(bundle.linear(f"blocks.{index}.gate_proj"), "codes") for index in (3, 1))
    bundle.replace((one, two), (two, one))
    with pytest.raises(VerdictError, match=r"not the checkpoint \[blocks\.1\.gate_proj\]: codes differ"):
        revalidate(bundle.folder, silent)


@pytest.mark.parametrize(
    ("of", "name"),
    [(GROUPS, "blocks.1.mlp_norm.weight"), (ROWS, "blocks.4.attn_norm.bias"), (GROUPS, "final_norm.weight")],
)
def test_one_bit_of_a_norm(victim: Callable[..., Victim], of: tuple[str, str], name: str) -> None:
    """Too little for any perplexity to show."""
    bundle = victim(of)
    floats = (
        bundle.checkpoint.head_floats() if name.startswith("final") else bundle.checkpoint.block_floats(int(name[7]))
    )
    old = floats[name.split(".", 2)[-1] if name.startswith("blocks") else name].numpy().tobytes()
    bundle.replace((old, one_bit_off(old)))
    with pytest.raises(VerdictError, match=rf"not the checkpoint \[{name}\]: its numbers are not there"):
        revalidate(bundle.folder, silent)


def test_one_bit_of_a_position(victim: Callable[..., Victim]) -> None:
    bundle = victim(ROWS)
    old = bundle.checkpoint.embedding_floats()["embed_positions.weight"].numpy().tobytes()
    bundle.replace((old, one_bit_off(old)))
    with pytest.raises(VerdictError, match=r"not the checkpoint \[embed_positions\.weight\]"):
        revalidate(bundle.folder, silent)


def test_one_bit_of_either_of_two_tied_tables(victim: Callable[..., Victim]) -> None:
    """Token rows and lm_head have the same codes here; one must not stand in for the other."""
    bundle = victim(GROUPS)
    whole, codes = bundle.model.read_bytes(), bundle.checkpoint.embedding().codes.numpy().tobytes()
    assert codes == stored(bundle.linear("lm_head"), "codes") and whole.count(codes) == 2
    named = set()
    for place in (whole.index(codes), whole.rindex(codes)):
        bundle.model.write_bytes(whole[:place] + one_bit_off(codes) + whole[place + len(codes) :])
        bundle.seal()
        with pytest.raises(VerdictError, match="the program is not the checkpoint") as caught:
            revalidate(bundle.folder, silent)
        named.add(caught.value.where)
    assert named == {"lm_head", "embed_tokens.codes"}


def swap_two_tokens(tokenizer: dict) -> None:
    """Two words change their ids."""
    vocabulary = tokenizer["model"]["vocab"]
    one, two = list(vocabulary)[400:402]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]


def drop_a_merge(tokenizer: dict) -> None:
    """The first pair of letters is not merged any more."""
    del tokenizer["model"]["merges"][0]


@pytest.mark.parametrize("change", [swap_two_tokens, drop_a_merge])
def test_another_tokenizer(victim: Callable[..., Victim], change: Callable[[dict], None]) -> None:
    bundle = victim(GROUPS)
    path = bundle.folder.bundle / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")
    bundle.seal()
    with pytest.raises(VerdictError, match="the bundle's tokenizer is not the model's"):
        revalidate(bundle.folder, silent)


def test_the_command_line_says_it_in_one_line(victim: Callable[..., Victim], capfd: pytest.CaptureFixture[str]) -> None:
    bundle = victim(GROUPS)
    old = stored(bundle.linear("blocks.0.v_proj"), "codes")
    bundle.replace((old, one_bit_off(old)))
    capfd.readouterr()
    assert call(["validate", str(bundle.folder.path)]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines()[-1] == "error: the program is not the checkpoint [blocks.0.v_proj]: codes differ"


@pytest.mark.parametrize("name", ["model.pte", "model.bpte", "tokenizer.json", "recipe.toml"])
def test_a_changed_file_under_an_old_seal(victim: Callable[..., Victim], name: str) -> None:
    bundle = victim(GROUPS)
    path = bundle.folder.bundle / name
    path.write_bytes(one_bit_off(path.read_bytes()))
    with pytest.raises(InputError, match=rf"a file of the bundle was changed \[.*{name}\]"):
        revalidate(bundle.folder, silent)

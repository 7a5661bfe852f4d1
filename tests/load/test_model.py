"""Loading: what is read equals what transformers reads, and every broken checkpoint is one clear line."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from afq_export.arch.decoder import block, embed, head
from afq_export.arch.ops import FloatOps
from afq_export.errors import InputError
from afq_export.load.checkpoint import DecoderWeights
from afq_export.load.model import open_model
from afq_export.load.tiny import tiny_copy
from afq_export.load.tokenizer import open_tokenizer, tokenizer_digest
from tests.models import edit_config, write_model

IDS = torch.tensor([[1, 5, 9, 200, 31, 7]])


def logits(model: DecoderWeights, ids: torch.Tensor = IDS) -> torch.Tensor:
    x = embed(model.config, model.embedding(), ids)
    for index in range(model.config.layers):
        x = block(model.config, FloatOps(model.config, model.block(index)), x)
    return head(FloatOps(model.config, model.head()), x)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "opt"])
def test_a_folder_gives_the_logits_of_transformers(tmp_path: Path, kind: str) -> None:
    folder = write_model(tmp_path / "m", kind)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(logits(open_model(str(folder))), reference(IDS).logits, rtol=1e-5, atol=1e-5)


def test_shards_read_as_one_file(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    before = logits(open_model(str(folder)))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[:7], "b.safetensors": names[7:]}
    for file, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, folder / file)
    index = {"weight_map": {key: file for file, keys in parts.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(logits(open_model(str(folder))), before)


def test_only_the_block_that_is_asked_for_is_read(tmp_path: Path) -> None:
    """Lazy reading: opening reads no tensor, a block reads its own."""
    model = open_model(str(write_model(tmp_path / "m")))
    read: list[str] = []
    original = type(model.source).read

    def spy(self, key):
        read.append(key)
        return original(self, key)

    type(model.source).read = spy
    try:
        model.block(1)
    finally:
        type(model.source).read = original
    assert read and all(key.startswith("model.layers.1.") for key in read)


def _gguf(folder: Path, path: Path, rope_factors: list[float] | None = None) -> None:
    """The same model as a llama.cpp file: interleaved q and k rows, its own names."""
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(64)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config["vocab_size"])
    names = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    outer = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if rope_factors:
        writer.add_tensor("rope_freqs.weight", np.asarray(rope_factors, np.float32))
    for key, tensor in tensors.items():
        values = tensor.numpy()
        if key in outer:
            writer.add_tensor(outer[key], values)
            continue
        _, _, index, *middle, kind = key.split(".")
        role = ".".join(middle)
        if role in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = config["num_attention_heads" if role.endswith("q_proj") else "num_key_value_heads"]
            values = values.reshape(heads, 2, -1, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(f"blk.{index}.{names[role]}.{kind}", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_the_same_model(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    path = tmp_path / "m.gguf"
    _gguf(folder, path)
    model = open_model(str(path))
    assert model.config.kv_heads == 2
    torch.testing.assert_close(logits(model), logits(open_model(str(folder))), rtol=1e-6, atol=1e-6)


def test_a_gguf_files_rope_factors_divide_the_frequencies(tmp_path: Path) -> None:
    """llama.cpp keeps the RoPE scaling of Llama 3.1 in a tensor: dropping it would be another model."""
    folder, path = write_model(tmp_path / "m"), tmp_path / "m.gguf"
    _gguf(folder, path, [1.0, 1.0, 2.0, 8.0])
    plain, scaled = open_model(str(folder)).config.rope, open_model(str(path)).config.rope
    assert [a / b for a, b in zip(plain.inv_freq, scaled.inv_freq, strict=True)] == pytest.approx([1, 1, 2, 8])


def test_a_truncated_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    _gguf(write_model(tmp_path / "m"), path)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(InputError, match=r"m\.gguf"):
        open_model(str(path)).block(1)


def _drop(folder: Path, key: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[key]
    save_file(tensors, folder / "model.safetensors")


def _put(folder: Path, key: str, tensor: torch.Tensor) -> None:
    save_file(load_file(folder / "model.safetensors") | {key: tensor}, folder / "model.safetensors")


Q = "model.layers.0.self_attn.q_proj.weight"
BREAKS = {
    "missing tensor": (lambda f: _drop(f, Q), "tensors are missing.*q_proj"),
    "unread tensor": (lambda f: _put(f, "model.extra.weight", torch.ones(2)), r"no part of the model reads.*extra"),
    "wrong shape": (lambda f: _put(f, Q, torch.ones(3, 3)), r"contradicts config\.json.*q_proj.*\[3, 3\]"),
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]),
        "cannot read safetensors",
    ),
    "not safetensors": (lambda f: (f / "model.safetensors").write_bytes(b"x" * 100), "cannot read safetensors"),
    "unknown architecture": (lambda f: edit_config(f, model_type="gpt2"), "unknown architecture.*gpt2.*llama.*opt"),
    "no such architecture": (lambda f: edit_config(f, model_type="nonsense"), "cannot read the model's configuration"),
    "broken json": (lambda f: (f / "config.json").write_text("{"), "cannot read the model's configuration"),
    "dynamic rope": (
        lambda f: edit_config(f, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
        "RoPE scaling not supported.*dynamic",
    ),
    "odd heads": (lambda f: edit_config(f, num_key_value_heads=3), "contradicts"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_checkpoint_is_one_clear_line(tmp_path: Path, name: str) -> None:
    folder = write_model(tmp_path / "m")
    spoil, message = BREAKS[name]
    spoil(folder)
    with pytest.raises(InputError, match=message) as caught:
        open_model(str(folder))
    assert "\n" not in str(caught.value)


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin are pickles"):
        open_model(str(folder))


def test_a_nan_in_a_weight_is_named(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    tensor = load_file(folder / "model.safetensors")[Q]
    tensor[1, 2] = float("nan")
    _put(folder, Q, tensor)
    model = open_model(str(folder))
    with pytest.raises(InputError, match=r"not finite.*q_proj.*1 of 1024"):
        model.block(0)


def test_an_index_cannot_leave_its_folder(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {Q: "../x.safetensors"}}))
    with pytest.raises(InputError, match="outside of its folder"):
        open_model(str(folder))


def test_names_that_are_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(InputError, match="neither a folder nor"):
        open_model(str(tmp_path / "file.txt"))
    with pytest.raises(InputError, match="no such model"):
        open_model(str(tmp_path / "nothing" / "here" / "at-all"))
    with pytest.raises(InputError, match="no such file"):
        open_model(str(tmp_path / "x.gguf"))


def test_tokenizer_ids_must_fit_the_embedding(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    model = open_model(str(folder))
    tokenizer = open_tokenizer(model)
    assert len(tokenizer_digest(tokenizer)) == 64
    tokenizer.add_tokens([f"<{i}>" for i in range(9)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match="largest token id is 266, the embedding has 260 rows"):
        open_tokenizer(model)


def test_a_tiny_copy_is_random_reproducible_and_short(tmp_path: Path) -> None:
    model = open_model(str(write_model(tmp_path / "m")))
    one, two, other = tiny_copy(model, 1), tiny_copy(model, 1), tiny_copy(model, 2)
    assert torch.equal(logits(one), logits(two))
    assert not torch.equal(logits(one), logits(other))
    assert one.digest != model.digest
    opt = tiny_copy(open_model(str(write_model(tmp_path / "o", "opt"))), 1)
    assert len({one.digest, other.digest, opt.digest}) == 3


def test_the_generation_config_says_where_text_ends(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    assert open_model(str(folder)).config.eos_ids == (257,)
    (folder / "generation_config.json").write_text('{"eos_token_id": [257, 256], "temperature": 0.6}')
    assert open_model(str(folder)).config.eos_ids == (257, 256)

"""Every command on the tiny run: what it prints, what it writes, and that both are reproducible."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from afq_export.cli import call
from afq_export.spec.catalog import TARGETS, entries
from afq_export.spec.report import read_report


def answer(capfd: pytest.CaptureFixture[str], *arguments: str, code: int = 0):
    """The JSON document on standard output."""
    capfd.readouterr()
    assert call([*arguments, "--json"]) == code
    return json.loads(capfd.readouterr().out)


def shipped(run: Path) -> dict[str, str]:
    """File -> sha256, of what does not depend on when it was made."""
    files = json.loads((run / "bundle" / "manifest.json").read_text())["files"]
    return {name: digest for name, digest in files.items() if name not in ("report.json", "report.md", "README.md")}


def test_run_ends_with_a_summary_and_continues_from_what_is_there(asked, finished: Path, capfd):
    assert call(["run", *asked, "--out", str(finished)]) == 0
    out, err = capfd.readouterr()
    assert out.startswith("PASS") and re.search(rf"bundle +{finished / 'bundle'}", out)
    assert "taken by default: recipe w4a8-g32" in err
    assert not list(finished.rglob("*.part"))


def test_json_is_the_report(asked, finished: Path, capfd):
    report = answer(capfd, "run", *asked, "--out", str(finished))
    assert report == json.loads((finished / "bundle" / "report.json").read_text())
    assert report["verdict"] == "pass"


def test_the_stages_alone_end_in_the_same_bytes(asked, finished: Path, tmp_path: Path, capfd, monkeypatch):
    out = ["--out", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["afq-export", "calibrate", *asked, *out])
    calibrated = answer(capfd, "calibrate", *asked, *out)
    assert len(calibrated["blocks"]) == 2
    assert call(["quantize", *asked, *out]) == 0
    printed = capfd.readouterr()
    assert "blocks.*.down_proj" in printed.out and "next: afq-export lower --model" in printed.err
    assert call(["lower", *asked, *out]) == 0
    printed = capfd.readouterr()
    assert "not validated yet" in printed.out and f"next: afq-export validate {tmp_path / 'run'}" in printed.err
    assert shipped(tmp_path / "run") == shipped(finished)


def test_validate_measures_again(finished: Path, tmp_path: Path, capfd):
    run = Path(shutil.copytree(finished, tmp_path / "copy"))
    report = answer(capfd, "validate", str(run / "bundle"), "--windows", "3", "--threads", "1")
    assert report["verdict"] == "pass" and report["protocol"]["windows"] == 3
    assert read_report((run / "bundle" / "report.json").read_bytes()).protocol.windows == 3


def test_a_failed_verdict_is_exit_code_1(asked, finished: Path, tmp_path: Path, monkeypatch):
    from afq_export.validate import ladder

    run = Path(shutil.copytree(finished, tmp_path / "copy"))
    monkeypatch.setattr(ladder, "verdict", lambda checks, target: "fail")
    assert call(["validate", str(run), "--windows", "1"]) == 1


def test_validate_refuses_a_model_that_is_another_now(finished: Path, model: Path, texts, tmp_path: Path, capfd):
    run = Path(shutil.copytree(finished, tmp_path / "copy"))
    data = json.loads((run / "run.json").read_text())
    data["request"]["calib"], data["request"]["eval"] = reversed(texts)
    (run / "run.json").write_text(json.dumps(data))
    assert call(["validate", str(run)]) == 2
    assert "the bundle was made from other inputs" in capfd.readouterr().err


def test_perplexity_of_every_form_and_its_comparison(finished: Path, model: Path, texts, tmp_path: Path, capfd):
    given = ["--eval", texts[1], "--window", "64", "--windows", "2"]
    report = json.loads((finished / "bundle" / "report.json").read_text())
    for path, rung in ((finished / "bundle", "runtime"), (finished / "quantized", "fake_quant")):
        measured = answer(capfd, "perplexity", str(path), *given)
        assert measured["rung"] == rung
        assert measured["perplexity"]["value"] == pytest.approx(report["perplexity"][rung]["value"], rel=1e-6)
        assert measured["protocol"] == report["protocol"]
    (tmp_path / "earlier.json").write_text(json.dumps(measured))
    assert call(["perplexity", str(model), *given, "--compare", str(tmp_path / "earlier.json")]) == 0
    out = capfd.readouterr().out
    for part in (report["protocol"]["digest"], report["protocol"]["tokenizer_digest"], "±", "stride 64", "now over it"):
        assert part in out


def test_generate_is_greedy_and_repeats(finished: Path, capfd):
    first = answer(capfd, "generate", str(finished), "--prompt", "the cat", "--tokens", "5")
    again = answer(capfd, "generate", str(finished / "bundle"), "--prompt", "the cat", "--tokens", "5")
    assert first["ids"] == again["ids"] and 0 < len(first["ids"]) <= 5
    assert call(["generate", str(finished), "--prompt", "the cat", "--tokens", "5"]) == 0
    assert capfd.readouterr().out == f"the cat{first['text']}\n"


def test_inspect_knows_what_things_are(finished: Path, model: Path, capfd):
    bundle = finished / "bundle"
    things = {
        finished: "run folder",
        bundle: "bundle",
        finished / "quantized": "quantized checkpoint",
        bundle / "model.pte": "program",
        model: "model",
    }
    for path, kind in things.items():
        facts = answer(capfd, "inspect", str(path))
        assert facts["kind"] == kind
        assert kind not in ("bundle", "quantized checkpoint") or facts["facts"]["KV cache"].startswith("float32")
        assert kind == "model" or sum(group["count"] for group in facts["layers"]) == 15
    assert call(["inspect", str(finished)]) == 0
    assert "blocks.*.q_proj" in capfd.readouterr().out


def test_plan_does_nothing_and_tells_the_size(asked, finished: Path, tmp_path: Path, capfd):
    plan = answer(capfd, "plan", *asked, "--out", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    assert {site["name"]: site["form"] for site in plan["sites"]}["q_to_k"] == "rope_pairs"
    assert sum(group["count"] for group in plan["layers"]) == 15
    size = sum(plan["size"].values())
    assert size == pytest.approx((finished / "bundle" / "model.pte").stat().st_size, rel=0.1)
    assert call(["plan", *asked]) == 0
    out = capfd.readouterr().out
    assert "no affine at attn_norm, mlp_norm: a dense matrix does not fold" in out and "GFLOP/s" in out
    manifest, report = (
        json.loads((finished / "bundle" / f"{name}.json").read_text()) for name in ("manifest", "report")
    )
    assert plan["kv_cache"] == manifest["kv_cache"] == report["kv_cache"]
    assert plan["kv_cache"]["bits"] == 32 and "KV cache     float32, " in out


def test_plan_says_what_a_quantized_cache_holds(asked, capfd):
    cache = answer(capfd, "plan", *asked, "--set", "kv_cache.bits=8")["kv_cache"]
    assert cache["bits"] == 8 and cache["token_bytes"] < cache["float_token_bytes"] / 2
    assert call(["plan", *asked, "--set", "kv_cache.bits=8", "--set", "kv_cache.group=5"]) == 2
    assert "cache groups do not fit" in capfd.readouterr().err


def test_plan_names_the_fallback(asked, capfd):
    assert call(["plan", *asked, "--recipe", "w4a8-g128"]) == 0
    assert "blocks.*.q_proj: int4 per_channel instead of int4 g128" in capfd.readouterr().out


def test_catalogs(capfd, tmp_path: Path):
    assert {recipe["name"] for recipe in answer(capfd, "recipes", "list")["schemes"]} >= {"w4a8", "w8a8-static"}
    targets = {target["name"]: target["status"] for target in answer(capfd, "targets", "list")}
    assert list(targets) == sorted(entry.name for entry in entries(TARGETS))
    assert targets["android-xnnpack"] == "verified" and targets["ios-coreml"] == "compiles"
    lists = {target["name"]: target for target in answer(capfd, "targets", "list")}
    assert lists["nxp-neutron"]["missing"] == ["eIQ Neutron SDK"] and not lists["linux-x64-ort"]["missing"]
    assert lists["ios-coreml"]["needs"] == ["executorch", "coremltools [coreml]"]
    own = tmp_path / "own.toml"
    own.write_text('scheme = "w4a8"\n[[override]]\npattern = "lm_head"\nbits = 4\n')
    assert call(["recipes", "show", str(own), "--set", "learning.epochs=3"]) == 0
    shown = capfd.readouterr().out
    assert "epochs = 3" in shown
    own.write_text(shown)
    assert call(["recipes", "show", str(own)]) == 0
    assert capfd.readouterr().out == shown


def test_doctor(capfd, monkeypatch):
    found = answer(capfd, "doctor")
    assert found["ready"] and found["machine"]["cores"] >= 1
    licences = {extra["package"]: extra["licence"] for extra in found["extras"]}
    assert "Qualcomm_LICENSE.pdf" in licences["onnxruntime-qnn"] and "NXP" in licences["eIQ Neutron SDK"]
    assert all(licences.values())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert call(["doctor"]) == 3
    assert 'pip install "executorch>=1.5,<1.6"' in capfd.readouterr().out

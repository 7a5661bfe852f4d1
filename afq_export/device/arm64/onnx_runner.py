"""Runs ONNX models: a decoder on windows of token ids, or models of linears. Needs numpy and onnxruntime alone.

    python onnx_runner.py REQUEST.json

REQUEST for a decoder: `model` and `options` (session_options.json of the bundle, or null) are files to read, `ids` an
.npy of int64 [N, T], `logits` the .npy to write, float32 [N, T, V]. Every window starts with an empty cache and is cut
into calls of `call` tokens. `profile`: beginning of a file name for ONNX Runtime's profile, or null.

REQUEST for others: `options`, and `programs`, a list of {`model`, `inputs`, `outputs`}: an .npz of inputs by name, and
the .npz to write, outputs by name.

Standard output: one JSON object: `version` of ONNX Runtime, `seconds` per window or program, `operators` (executed
node types and how many nodes each; empty without a profile), `code`: [file, start, end] of every executable mapping.

The model follows the convention of Hugging Face's ONNX exports: input_ids, attention_mask and position_ids int64
[batch, tokens], past_key_values.I.key and .value [batch, heads, past, width]; logits, present.I.key and .value.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort

DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
PAST, PRESENT = "past_key_values.", "present."
LEVELS = {
    "disable": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


def main(request):
    """Runs it all and returns what is printed. Raises ValueError and ONNX Runtime's own errors."""
    options = json.loads(Path(request["options"]).read_text()) if request["options"] else {}
    run = run_programs if "programs" in request else run_windows
    seconds, operators = run(request, options)
    return {"version": ort.__version__, "seconds": seconds, "operators": operators, "code": code()}


def run_windows(request, options):
    """Writes the logits of all windows; seconds of each, and executed operators."""
    session = open_session(request["model"], options, request["profile"])
    ids_NT = np.load(request["ids"])
    seconds, logits_NTV = [], None
    for window, ids_T in enumerate(ids_NT):
        start = time.perf_counter()
        rows_TV = run_window(session, ids_T, request["call"])
        seconds.append(round(time.perf_counter() - start, 3))
        if logits_NTV is None:
            shape = (*ids_NT.shape, rows_TV.shape[-1])
            logits_NTV = np.lib.format.open_memmap(request["logits"], "w+", np.float32, shape)
        logits_NTV[window] = rows_TV
    logits_NTV.flush()
    return seconds, executed(session.end_profiling()) if request["profile"] else {}


def run_programs(request, options):
    """Writes the outputs of all programs; seconds of each, and no operators."""
    seconds = []
    for program in request["programs"]:
        start = time.perf_counter()
        session = open_session(program["model"], options)
        names = [output.name for output in session.get_outputs()]
        with np.load(program["inputs"]) as inputs:
            results = session.run(names, dict(inputs))
        np.savez(program["outputs"], **dict(zip(names, results, strict=True)))
        seconds.append(round(time.perf_counter() - start, 3))
    return seconds, {}


def open_session(model, options, profile=None):
    """A session with the bundle's options and one thread. Raises ValueError when a provider of theirs is not there."""
    known = {"graph_optimization_level", "config", "providers", "context_length", "prefill_length"}
    if not known.issuperset(options):
        raise ValueError("unknown session options: " + ", ".join(sorted(set(options) - known)))
    providers = options.get("providers", ["CPUExecutionProvider"])
    missing = [name for name in providers if name not in ort.get_available_providers()]
    if missing:
        raise ValueError("this ONNX Runtime has no " + ", ".join(missing))
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    settings.graph_optimization_level = LEVELS[options.get("graph_optimization_level", "all")]
    for key, value in options.get("config", {}).items():
        settings.add_session_config_entry(key, str(value))
    if profile:
        settings.enable_profiling, settings.profile_file_prefix = True, profile
    return ort.InferenceSession(model, settings, providers=providers)


def run_window(session, ids_T, call):
    """Float32 logits [T, V] of one window in calls of `call` tokens."""
    inputs = {given.name: given for given in session.get_inputs()}
    past = {
        name: np.zeros((1, given.shape[1], 0, given.shape[3]), DTYPES[given.type])
        for name, given in inputs.items()
        if name.startswith(PAST)
    }
    outputs = ["logits", *(name.replace(PAST, PRESENT) for name in past)]
    rows = []
    for start in range(0, len(ids_T), call):
        part = ids_T[None, start : start + call]
        end = start + part.shape[1]
        feed = {
            "input_ids": part,
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(start, end, dtype=np.int64)[None],
        }
        given = {name: value for name, value in feed.items() if name in inputs}
        logits, *present = session.run(outputs, given | past)
        past = dict(zip(past, present, strict=True))
        rows.append(logits[0].astype(np.float32, copy=False))
    return np.concatenate(rows)


def executed(profile):
    """Node types in a profile and how many nodes each has; the file is removed."""
    path = Path(profile)
    events = json.loads(path.read_text())
    path.unlink()
    nodes = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            nodes.setdefault(event["args"]["op_name"], set()).add(event["name"])
    return {name: len(nodes[name]) for name in sorted(nodes)}


def code():
    """[file, start, end] of executable mappings, as addresses in the emulator's log of instructions are."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        parts = line.split(maxsplit=5)
        if len(parts) == 6 and "x" in parts[1] and parts[5].startswith("/"):
            start, end = (int(address, 16) for address in parts[0].split("-"))
            found.append([Path(parts[5]).name, start, end])
    return found


if __name__ == "__main__":
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))

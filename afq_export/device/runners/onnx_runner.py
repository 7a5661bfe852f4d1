"""Runs ONNX models: a decoder on windows of token ids, or models of linears. Needs numpy and onnxruntime alone.

    python onnx_runner.py JOB

The job is that of job.h, with the keys of onnx_runner.cpp besides, and so is the answer. Which of the two runs depends
on what a device has.
"""

import contextlib
import json
import os
import resource
import sys
import time

import numpy as np
import onnxruntime as ort

NUMBERS = {"windows": 1, "tokens": 1, "prompt": 1, "call": 1, "threads": 0}
FILES = ("model", "ids", "logits", "losses", "choices", "matrices", "profile")
LISTS = ("entry", "provider")
DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}
PAST, PRESENT = "past_key_values.", "present."
CPU = "CPUExecutionProvider"
LEVELS = {
    "disable": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
WRONG_INPUT, NOT_LOADED, NOT_RUN = 2, 3, 4


def stop(code, why):
    """Ends with one line on standard error."""
    print(str(why).strip().splitlines()[0], file=sys.stderr)
    sys.exit(code)


def read_job(path):
    """The job with numbers as numbers, files as paths and lists as lists."""
    folder, job = os.path.dirname(path), {name: [] for name in LISTS}
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            key, _, value = line.rstrip("\n").partition(" ")
            if key in LISTS:
                job[key].append(value)
            elif key in FILES:
                job[key] = os.path.join(folder, value)
            elif key == "level" or (key in NUMBERS and value.isdecimal() and int(value) >= NUMBERS[key]):
                job[key] = value if key == "level" else int(value)
            else:
                stop(WRONG_INPUT, f"not a line of a job: {line}")
    return job


def open_session(path, job):
    """A session with the job's options."""
    providers = job["provider"] or [CPU]
    missing = [name for name in providers if name not in ort.get_available_providers()]
    if missing:
        stop(WRONG_INPUT, "this ONNX Runtime has no " + ", ".join(missing))
    level = job.get("level", "all")
    if level not in LEVELS:
        stop(WRONG_INPUT, "no such optimization level: " + level)
    settings = ort.SessionOptions()
    settings.intra_op_num_threads, settings.inter_op_num_threads = job.get("threads", 1), 1
    settings.log_severity_level = 3
    settings.graph_optimization_level = LEVELS[level]
    for entry in job["entry"]:
        settings.add_session_config_entry(*entry.split(" ", 1))
    if "profile" in job:
        settings.enable_profiling, settings.profile_file_prefix = True, job["profile"]
    try:
        return ort.InferenceSession(path, settings, providers=providers)
    except Exception as error:  # ONNX Runtime's own errors have no common base besides it
        stop(NOT_LOADED, error)


class Decoder:
    """A session of a decoder and its KV cache.

    The model follows the convention of Hugging Face's ONNX exports: input_ids, attention_mask and position_ids int64
    [batch, tokens], past_key_values.I.key and .value [batch, heads, past, width]; logits, present.I.key and .value.
    """

    def __init__(self, session):
        self.session = session
        self.inputs = {given.name: given for given in session.get_inputs()}
        self.past = [name for name in self.inputs if name.startswith(PAST)]
        self.outputs = ["logits", *(name.replace(PAST, PRESENT) for name in self.past)]
        self.restart()

    def restart(self):
        """Forgets everything: caches of length 0."""
        self.cache = {}
        for name in self.past:
            given = self.inputs[name]
            self.cache[name] = np.zeros((1, given.shape[1], 0, given.shape[3]), DTYPES[given.type])

    def run(self, ids, before):
        """Float32 logits [T, V] of ids int64 [T] after `before` others."""
        end = before + len(ids)
        feed = {
            "input_ids": ids[None],
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(before, end, dtype=np.int64)[None],
        }
        given = {name: value for name, value in feed.items() if name in self.inputs}
        logits, *present = self.session.run(self.outputs, {**given, **self.cache})
        self.cache = dict(zip(self.past, present, strict=True))
        return logits[0].astype(np.float32, copy=False)


def scores(rows, following):
    """Losses float64 and choices int32 of rows [T, V] for the tokens [T] that follow."""
    if following.size and not 0 <= following.min() <= following.max() < rows.shape[1]:
        stop(WRONG_INPUT, "a token id is outside the vocabulary")
    losses = np.empty(len(rows))
    for index, row in enumerate(rows):
        wide = row.astype(np.float64)
        top = wide.max()
        losses[index] = np.log(np.exp(wide - top).sum()) + top - wide[following[index]]
    return losses, rows.argmax(axis=1).astype(np.int32)


def run_windows(job, decoder):
    """Writes what is asked for, and gives seconds of prefill and decode by window."""
    for key in ("windows", "tokens", "prompt", "call", "ids"):
        if key not in job:
            stop(WRONG_INPUT, "the job has no " + key)
    tokens, prompt = job["tokens"], job["prompt"]
    ids_NT = np.fromfile(job["ids"], "<i8")
    if ids_NT.size != job["windows"] * tokens:
        stop(WRONG_INPUT, "not as many values as said: " + job["ids"])
    if prompt > tokens:
        stop(WRONG_INPUT, "the prompt is longer than the window")
    timing = {"prefill": [], "decode": []}
    with contextlib.ExitStack() as files:
        keys = ("logits", "losses", "choices")
        wanted = {key: files.enter_context(open(job[key], "wb")) for key in keys if key in job}
        for ids in ids_NT.reshape(-1, tokens):
            decoder.restart()
            seconds, start = {"prefill": 0.0, "decode": 0.0}, 0
            while start < tokens:
                phase = "prefill" if start < prompt else "decode"
                count = min(job["call"], prompt - start) if phase == "prefill" else 1
                begin = time.perf_counter()
                rows = decoder.run(ids[start : start + count], start)
                seconds[phase] += time.perf_counter() - begin
                following = ids[start + 1 : start + count + 1]
                if "logits" in wanted:
                    rows.astype("<f4", copy=False).tofile(wanted["logits"])
                if "losses" in wanted or "choices" in wanted:
                    losses, choices = scores(rows[: len(following)], following)
                    for key, values in (("losses", losses.astype("<f8")), ("choices", choices.astype("<i4"))):
                        if key in wanted:
                            values.tofile(wanted[key])
                start += count
            for phase, passed in seconds.items():
                timing[phase].append(round(passed, 6))
    return timing


def run_matrices(job):
    """Runs models of linears and writes their outputs."""
    folder = os.path.dirname(job["matrices"])
    with open(job["matrices"], encoding="utf-8") as lines:
        for line in lines:
            model, result, rows, *rest = line.split()
            session = open_session(os.path.join(folder, model), job)
            feed = {}
            for given, name, columns in zip(session.get_inputs(), rest[::2], rest[1::2], strict=True):
                values = np.fromfile(os.path.join(folder, name), "<f4")
                feed[given.name] = values.reshape(1, int(rows), int(columns))
            with open(os.path.join(folder, result), "wb") as out:
                for value in session.run(None, feed):
                    value.astype("<f4", copy=False).tofile(out)


def code():
    """[file, start, end] of executable mappings, as addresses in an emulator's log of instructions are."""
    found = []
    try:
        with open("/proc/self/maps", encoding="utf-8") as maps:
            lines = maps.read().splitlines()
    except OSError:
        return found
    for line in lines:
        parts = line.split(maxsplit=5)
        if len(parts) == 6 and "x" in parts[1] and parts[5].startswith("/"):
            start, end = (int(address, 16) for address in parts[0].split("-"))
            found.append([os.path.basename(parts[5]), start, end])
    return found


def main(path):
    """Does the job and gives the answer."""
    job, timing, load = read_job(path), {"prefill": [], "decode": []}, 0.0
    try:
        if "matrices" in job:
            run_matrices(job)
        else:
            begin = time.perf_counter()
            decoder = Decoder(open_session(job["model"], job))
            load = time.perf_counter() - begin
            timing = run_windows(job, decoder)
            if "profile" in job:
                os.replace(decoder.session.end_profiling(), job["profile"])
    except Exception as error:  # ONNX Runtime's own errors have no common base besides it
        stop(NOT_RUN, error)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"version": ort.__version__, "load": round(load, 6), **timing, "memory": round(memory, 1), "code": code()}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        stop(WRONG_INPUT, "usage: onnx_runner.py JOB")
    print(json.dumps(main(sys.argv[1])))

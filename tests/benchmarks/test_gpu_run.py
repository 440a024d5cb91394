"""The GPU benchmark in miniature on the CPU: the command line, what it leaves, and what is read from that."""

import importlib
import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
GPU = ROOT / "benchmarks" / "gpu"


@pytest.fixture
def load(monkeypatch):
    """Import a module of the benchmark by its name, for one test."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(GPU))
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and Path(str(sys.modules[name].__file__)).parent == GPU:
            del sys.modules[name]


def run(*arguments, out, **environment):
    command = ["bash", str(GPU / "run.sh"), *arguments, "--scale", "tiny", "--device", "cpu", "--stretch", "10"]
    given = {**os.environ, "PYTHON": sys.executable, "OUT": str(out), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, env=given, capture_output=True, text=True, check=True).stdout


def results(out, part):
    return json.loads((out / f"{part}.json").read_text())


def test_a_made_base_computes_what_the_loaded_one_does(load, tmp_path):
    from transformers import AutoModelForCausalLM

    from nspo_lightning.policy.loading import load_base

    made, workload = load("made_model"), load("workload")
    torch.manual_seed(0)
    saved = AutoModelForCausalLM.from_config(workload.model_config(workload.SCALES["tiny"]), dtype=torch.bfloat16)
    for name, parameter in saved.named_parameters():
        if name.endswith("bias"):  # zero at the start: a bias that is left out would not be seen
            torch.nn.init.normal_(parameter)
    saved.save_pretrained(tmp_path)
    settings = made.policy_settings(tmp_path, 4, checkpointing=False)
    weights = dict(saved.named_parameters())
    ours = made.make_base(settings, torch.device("cpu"), lambda name, *_: weights[name].detach().clone())
    loaded = load_base(settings, torch.device("cpu"))
    theirs = loaded.state_dict()
    assert ours.state_dict().keys() == theirs.keys()
    for name, value in ours.state_dict().items():
        assert torch.equal(value.detach(), theirs[name].detach()), name
    assert [type(m) for m in ours.modules()] == [type(m) for m in loaded.modules()]
    assert not any(p.requires_grad for p in ours.parameters())
    assert not ours.training
    ids = torch.arange(3, 19)[None]
    assert torch.equal(ours(input_ids=ids).logits, loaded(input_ids=ids).logits)


def test_tokens_that_the_policy_did_not_draw_are_noticed(load, tmp_path):
    sampling, workload, device = load("sampling"), load("workload"), load("device")
    scale = workload.SCALES["tiny"]
    sampler = sampling.Sampler(scale, device.Device("cpu"), tmp_path)
    policy = sampler.policy("quantized")
    with torch.no_grad():  # logits as far apart as those of the 7B's width
        policy.require().get_output_embeddings().weight.mul_(8)
    assert abs(sampler.log_prob_over_entropy(policy, sampler.draw("dynamic", 16, policy))) < sampling.LARGEST_GAP
    with pytest.raises(RuntimeError, match="not drawn from it"):
        sampler.log_prob_over_entropy(policy, workload.random_ids(scale, scale.rows, 16))


def test_the_roofline_is_that_of_the_7b(load):
    workload = load("workload")
    decoder, head = workload.linear_numbers(workload.SCALES["full"])
    assert decoder == pytest.approx(6.53e9, rel=1e-3)
    assert head == pytest.approx(0.545e9, rel=1e-3)
    assert 0.6 * workload.bf16_roofline(workload.SCALES["full"], 3.35e12) == pytest.approx(9100, rel=1e-2)


def test_a_card_is_described_and_limited_by_what_torch_says(load, monkeypatch):
    card = SimpleNamespace(
        name="H", major=9, minor=0, total_memory=80e9, memory_clock_rate=2_619_000, memory_bus_width=5120
    )
    limits: list[float] = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: card)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limits.append)
    for name, value in {"max_memory_allocated": 2e9, "max_memory_reserved": 3e9}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    device = load("device").Device("cuda")
    monkeypatch.setattr(device, "copied_bytes_a_second", lambda: 3e12)
    assert device.about()["bytes_a_second"] == pytest.approx(3.35e12, rel=1e-2)
    with pytest.raises(ZeroDivisionError), device.limited(20):
        raise ZeroDivisionError
    assert limits == [0.25, 1.0]
    assert (device.peak_gb(), device.reserved_gb()) == (2, 3)
    del card.memory_clock_rate
    assert device.about()["bytes_a_second"] == 3e12


def test_the_command_line_measures_sampling_and_the_step(tmp_path):
    said = run("--only", "sampling-rest,step-first", out=tmp_path)
    sampling, step = results(tmp_path, "sampling-rest"), results(tmp_path, "step-first")
    for part in (sampling, step):
        assert part["status"] == "done"
        assert part["device"]["name"] == "CPU"
        assert part["versions"]["torch"].startswith(torch.__version__.split("+")[0])
        assert part["settings"]["new_tokens"] == 6
        assert len(part["commit"].rstrip("+")) >= 7
    plain, measured = sampling["results"]["dynamic+quantized"], []
    for name, found in sampling["results"].items():  # all that are there, on a CPU
        assert "error" not in found, (name, found)
        measured += [name] * ("seconds" in found)
    assert {"dynamic+quantized", "dynamic+dequantized", "dynamic+merged"} <= set(measured)
    assert all(name.startswith("graphs") for name in set(sampling["results"]) - set(measured))
    assert sampling["results"]["dynamic+dequantized"]["same_tokens"] == 1
    assert plain["tokens"] == 2 * 4 * 6
    assert plain["tokens_a_second"] == pytest.approx(plain["tokens"] / plain["seconds"])
    for kind in ("auto+checkpointing", "quantized+checkpointing"):
        found = step["results"][kind]
        assert len(found["steps"]) >= 2
        assert 0 < found["projection_s"] < found["training_s"]
        assert found["sampling_s"] + found["training_s"] == pytest.approx(found["seconds_a_step"])
    assert "scale: tiny" in said
    assert not list(tmp_path.glob("*.part"))


def test_a_part_that_fails_leaves_its_error_and_the_next_one_runs(tmp_path):
    broken = tmp_path / "python"
    broken.write_text(
        "#!/usr/bin/env bash\n"
        'if [[ $* == *"run_part.py sampling-first"* ]]; then echo "no such card" >&2; exit 3; fi\n'
        'if [[ $* == *run_part.py* ]]; then part=$4; out=$6; echo "{\\"part\\": \\"$part\\", \\"status\\": \\"done\\", '
        '\\"results\\": {}}" >"$out/$part.json"; exit 0; fi\n'
        f'exec "{sys.executable}" "$@"\n'
    )
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    said = run("first", "--only", "sampling-first,step-first", out=tmp_path / "out", PYTHON=str(broken))
    failed = results(tmp_path / "out", "sampling-first")
    assert failed["status"] == "failed"
    assert "no such card" in failed["error"]
    assert results(tmp_path / "out", "step-first")["status"] == "done"
    assert "sampling-first: failed" in said


def test_a_part_that_is_cut_off_keeps_what_it_had(load, tmp_path):
    record = load("record")
    begun = record.Record(tmp_path, "sampling-first", {"scale": "tiny"}, 60)
    begun.add("dynamic+quantized", {"seconds": 1.0})
    (tmp_path / "sampling-first.log").write_text("it was capturing")
    assert record.close("sampling-first", 124, tmp_path) == "out of time"
    left = results(tmp_path, "sampling-first")
    assert left["results"] == {"dynamic+quantized": {"seconds": 1.0}}
    assert "it was capturing" in left["error"]


def test_an_attempt_notes_errors_and_what_there_is_no_time_for(load, tmp_path):
    kept = load("record").Record(tmp_path, "part", {}, 60)

    def fail():
        raise ValueError("graphs need a card")

    assert kept.attempt("graphs", fail) is None
    assert kept.attempt("slow", lambda: {"seconds": 1}, needs=1e6) is None
    assert kept.attempt("fast", lambda: {"seconds": 1}) == {"seconds": 1}
    found = results(tmp_path, "part")["results"]
    assert found["graphs"]["error"] == "ValueError: graphs need a card"
    assert "needed" in found["slow"]["skipped"]


def test_a_command_that_takes_too_long_ends_with_its_children(load, tmp_path):
    alive = tmp_path / "alive"
    done = load("commands").run(["bash", "-c", f"(sleep 3; touch {alive}) & wait"], tmp_path / "log", 1)
    assert done["exit_code"] is None
    time.sleep(3)
    assert not alive.exists()


def part(name, device="cuda", scale="full", **found):
    told = {"part": name, "status": "done", "scale": scale, "commit": "abc", "device": {"kind": device, "name": "card"}}
    return told | {"results": found}


def table(load, folder, *parts):
    goals = load("goals")
    for one in parts:
        (folder / f"{one['part']}.json").write_text(json.dumps(one))
    return {row[0]: row[3:] for row in goals.rows(goals.read(folder))}


def test_goals_that_nothing_was_measured_for_say_so(load, tmp_path):
    found = table(load, tmp_path)
    assert len(found) == 6
    assert set(found.values()) == {("not measured", "-")}


def test_goals_compare_with_the_fastest_of_the_peer(load, tmp_path):
    ours = {"seconds_a_step": 2.0, "peak_gb": 20.0, "reserved_gb": 22.0, "projection_share": 0.004, "bases": "random"}
    theirs = {"seconds_a_step": 12.0, "peak_gb": 30.0, "sampling_tokens_a_second": 800.0}
    faster = {"seconds_a_step": 6.0, "peak_gb": 40.0, "sampling_tokens_a_second": 1000.0}
    found = table(
        load,
        tmp_path,
        part(
            "sampling-first",
            **{
                "graphs+merged": {"tokens_a_second": 7900.0, "share_of_bf16_roofline": 0.61},
                "graphs+dequantized": {"error": "RuntimeError: no"},
            },
        ),
        part("step-first", **{"quantized+checkpointing": ours | {"memory_limit_gb": 23.0}}),
        part("trl-first", checkpointing=theirs),
        part("trl-rest", plain=faster),
        part("calibration", calibration={"ratio": 1.31, "texts": 1000, "forward_s": 9.0, "bases_s": 200.0}),
    )
    assert found["sampling, tokens/s"][1] == "no"  # 7.9 times the 1,000 of the faster variant
    assert found["sampling, tokens/s"][0].startswith("7.9x")
    assert found["sampling, share of the memory's speed"][1] == "yes"
    assert found["whole GRPO step"] == (
        "3.0x: 2.00 s, 20.0 GB (quantized+checkpointing) against 6.00 s, 40.0 GB (plain)",
        "no",
    )
    assert found["peak memory of a step, `quantized`"][1] == "yes"
    assert found["projection's share of a step"][1] == "yes"
    assert found["calibration, collecting"][1] == "no"


def test_a_step_that_is_faster_by_more_memory_does_not_count(load, tmp_path):
    slow = {"seconds_a_step": 3.0, "peak_gb": 30.0}
    fast = {"seconds_a_step": 1.0, "peak_gb": 50.0}
    theirs = {"seconds_a_step": 9.0, "peak_gb": 40.0, "sampling_tokens_a_second": 1.0}
    trl = part("trl-first", checkpointing=theirs)
    found = table(load, tmp_path, part("step-first", **{"auto+checkpointing": slow}), part("step-rest", auto=fast), trl)
    assert found["whole GRPO step"][0].startswith("3.0x")
    found = table(load, tmp_path, part("step-first", auto=fast), part("step-rest"), trl)
    assert found["whole GRPO step"][0].startswith("9.0x")
    assert found["whole GRPO step"][1] == "no"


def test_a_step_that_does_not_fit_is_an_answer(load, tmp_path):
    error = {"error": "OutOfMemoryError: CUDA out of memory."}
    found = table(load, tmp_path, part("step-first", **{"quantized+checkpointing": error}))
    assert found["peak memory of a step, `quantized`"] == ("OutOfMemoryError: CUDA out of memory.", "no")


def test_the_miniature_reaches_no_goal(load, tmp_path):
    fast = {"tokens_a_second": 1e6, "share_of_bf16_roofline": 0.9}
    found = table(load, tmp_path, part("sampling-first", device="cpu", scale="tiny", **{"graphs+merged": fast}))
    assert {row[1] for row in found.values()} == {"-"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_part_runs_in_miniature(tmp_path):
    from importlib.util import find_spec

    run(out=tmp_path, MODEL135=str(ROOT / "nspo_lightning" / "toy" / "base"))
    for name in ("quickstart", "tests", "step-rest", "sampling-rest", "calibration", "compare", "profile"):
        found = results(tmp_path, name)
        assert found["status"] == "done", found
        assert not [values for values in found["results"].values() if "error" in values], found["results"]
    calibrated = results(tmp_path, "calibration")["results"]["calibration"]
    assert calibrated["texts"] == 16
    assert calibrated["bases"] == 2 * 4
    assert results(tmp_path, "quickstart")["results"]["fit"]["summary"]
    assert results(tmp_path, "compare")["results"]["compare"]["complete"] == 2
    assert "Self CPU" in (tmp_path / "profile-training.txt").read_text()
    for name in ("trl-first", "trl-rest"):
        found = results(tmp_path, name)
        assert found["status"] == ("skipped" if find_spec("trl") is None else "done")

"""The page of a run: what is on it, that text stays text, and that runs which lack something still have one."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from made_run import NASTY, diagnosis, made_run, result_of_test, under_attack, with_curves
from torch.utils.tensorboard import SummaryWriter

from nspo_lightning.cli.app import main
from nspo_lightning.report import read_run, write_report
from nspo_lightning.report.html import comparison_page, run_page
from nspo_lightning.report.markdown import plain, run_text
from nspo_lightning.report.pictures import pictures
from nspo_lightning.report.side_by_side import compare
from nspo_lightning.report.svg import ticks
from nspo_lightning.report.tags import shown_as
from nspo_lightning.report.words import headline, headline_of_several, standing

ASKS_THE_NETWORK = re.compile(
    r"""(?:src|href|action)\s*=\s*["'](?!#|data:)|url\((?!data:)|@import|fetch\(|XMLHttp""", re.I
)


class Page(HTMLParser):
    """What a browser would make of a page: its elements, their attributes, and the text in each."""

    VOID = {"meta", "link", "br", "img", "input", "circle", "line", "path"}

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.words, self.open, self.unclosed = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID and (not self.open or self.open.pop() != tag):
            self.unclosed.append(tag)

    def handle_data(self, data):
        if not self.open or self.open[-1] not in {"script", "style"}:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    folder = with_curves(made_run(tmp_path_factory.mktemp("runs") / "full"))
    (folder / "diagnosis.json").write_text(json.dumps(diagnosis()))
    return read_run(folder)


@pytest.fixture(scope="module")
def page(full):
    return run_page(full)


def test_the_page_answers_first(page):
    text = Page(page).text
    said = "Unsafe answers to harmful prompts fell from 90.9 % to 2.0 %; right answers to general tasks went from 95.0"
    assert said in text.replace("\u00a0", " ")
    parts = ["What to look at", "Before and after", "Over training", "Answers before", "Null space", "What was done"]
    places = [page.index(f">{part}") for part in parts]
    assert all(places)
    assert "80 updates (3 more skipped) in 111 s; largest leak into the protected space 1.2e-07." in text


def test_before_and_after_has_pictures_intervals_and_categories(page):
    found = Page(page)
    whiskers = [
        a for tag, a in found.elements if tag == "line" and a.get("class", "") == "whisker after" and "%" in a["x1"]
    ]
    assert ("1.00%", "4.00%") in [(a["x1"], a["x2"]) for a in whiskers]
    assert "1.0 to 4.0" in found.text
    assert "Harmful prompts answered unsafely, by category fire" in found.text


def test_curves_and_maps_are_drawn(page):
    found = Page(page)
    charts = [a["aria-label"] for tag, a in found.elements if tag == "svg" and a.get("role") == "img"]
    assert charts[:3] == [
        "Safety and general ability over training",
        "general tasks answered right against unsafe answers, over training",
        "Distance from the base over training",
    ]
    assert "Reward over training" in charts
    cells = [a for tag, a in found.elements if tag == "td" and "--v:" in a.get("style", "")]
    assert len(cells) == 2 * 3 * 4  # two maps, three kinds, four layers
    assert any(a["title"].startswith("layer 0, self_attn.o_proj: 40 of 128") for a in cells)


def test_a_few_free_directions_are_shown_as_such(tmp_path):
    folder = made_run(tmp_path / "few")
    record = json.loads((folder / "null_space.json").read_text())
    for entry in record["inputs"]:
        entry |= {"width": 1536, "free": 4 + entry["depth"], "free_share": (4 + entry["depth"]) / 1536}
    (folder / "null_space.json").write_text(json.dumps(record))
    found = Page(run_page(read_run(folder)))
    assert "0.36 % of the directions are free on average, 0.26 % where they are fewest" in found.text
    assert "share of the width, in %; colours go to 0.5" in found.text
    first = next(a for tag, a in found.elements if tag == "td" and "4 of 1,536 directions" in a.get("title", ""))
    assert first["style"] == "--v:52"


def test_settings_that_differ_are_listed_with_their_defaults(full):
    found = {s.name: (s.value, s.default) for s in full.settings}
    assert found["model.num_iterations"] == ("2", "1")
    assert found["model.policy.lora.r"] == ("8", "16")
    assert found["data.batch_size"] == ("12", "8")
    assert found["model.reward.weight"] == ("2.0", "")
    assert "model.group_size" not in found, "8 is the default"
    assert not any(name.startswith("nullspace") for name in found)


def test_an_answer_stays_text(page):
    found = Page(page)
    tags = [tag for tag, _ in found.elements]
    assert found.unclosed == []
    assert found.open == []
    assert tags.count("script") == 1
    assert "img" not in tags
    assert not any(name.startswith("on") for _, attributes in found.elements for name in attributes)
    assert f"{NASTY} before" in found.text
    assert "49" not in found.text.split("7*7")[1][:5], "no template inside a text is filled in"
    assert "turned\u2400 \u241b[31mred \ufffd" in found.text, "control characters are seen, half ones replaced"


def test_a_planted_tag_would_be_found():
    planted = Page(f"<main><p>{NASTY}</p></main>")
    assert "img" in [tag for tag, _ in planted.elements]
    assert planted.unclosed


def test_the_page_asks_for_nothing(page, full):
    for text in (page, comparison_page([full, full])):
        outside = Page(text)
        assert [
            a for _, a in outside.elements if any(ASKS_THE_NETWORK.match(f'{n}="{v}"') for n, v in a.items() if v)
        ] == []
        script = re.search(r"<script>(.*?)</script>", text, re.S)
        style = re.search(r"<style>(.*?)</style>", text, re.S)
        assert script is not None
        assert style is not None
        assert not ASKS_THE_NETWORK.search(style[1])
        assert not re.search(r"fetch|XMLHttp|import|https?:", script[1])


def test_only_our_script_may_run(page):
    import base64
    import hashlib

    script = re.search(r"<script>(.*?)</script>", page, re.S)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    policy = next(a["content"] for t, a in Page(page).elements if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy


def test_markdown_says_the_same_and_escapes(full):
    text = run_text(full)
    assert "| Harmful prompts answered unsafely | 90.9 % | 2.0 % | 1.0 to 4.0 | -88.9 |" in text
    prose = re.sub(r"^(`{3,})text\n.*?\n\1$", "", text, flags=re.S | re.M)
    assert "<script" not in prose
    assert "<img" not in prose
    assert "# not a heading" not in prose, "a fence is longer than those in the answer"
    assert plain("[a](b) <i>") == "\\[a\\](b) &lt;i&gt;"


def test_look_alikes_and_general_prompts_are_told_apart(full):
    kinds = [e.kind for e in full.answers.shown]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"harmful": 6, "look-alike": 6, "general": 6}


def test_a_run_that_is_not_finished_says_so(tmp_path):
    run = read_run(with_curves(made_run(tmp_path / "half", finished=False), steps=5))
    assert standing(run)[0].startswith("This run is not finished")
    assert "Its last logged step is 4" in run_text(run)
    assert "mean reward went from" in Page(run_page(run)).text


def test_how_to_go_on_is_a_command_that_does(tmp_path):
    folder = made_run(tmp_path / "half", finished=False)
    assert "it left no checkpoint to go on from" in standing(read_run(folder))[0]
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "last.ckpt").touch()
    assert "go on with `fit ... --name half --ckpt_path last`" in standing(read_run(folder))[0]
    warm = folder.rename(tmp_path / "half-warmup")
    with SummaryWriter(str(warm)) as writer:
        writer.add_scalar("warmup/refusals", 0.1, 0)
        writer.add_scalar("training/loss", 0.1, 0)
    said = standing(read_run(warm))[0]
    assert "`warmup` has written no summary.json" in said
    assert "`warmup ... --name half --ckpt_path last`" in said


def test_a_run_without_evaluation_says_so(tmp_path):
    run = read_run(made_run(tmp_path / "blind", measured=False))
    assert standing(run)[0].startswith("Nothing was measured before and after")
    assert "Before and after" not in run_text(run)
    assert "before-after" not in run_page(run)


def test_a_headline_tells_what_safety_cost_where_accuracy_has_nothing_to_lose(tmp_path):
    """As on a real model: no answer matches a reference, and one ordinary prompt in seven is refused."""
    folder, result = made_run(tmp_path / "run"), result_of_test(0.6)
    for who, refused in (("base", 0.0), ("policy", 0.145)):
        ends = [max(refused - 0.04, 0.0), refused + 0.05]
        result["rates"][who]["general/refusal_rate"] = {"rate": refused, "of": 200, "interval_95": ends}
        result["accuracy"][who] = 0.0
    (folder / "test.json").write_text(json.dumps(result))
    of_fit = {"severity": "note", "title": "Of the fit", "text": "", "cure": ""}
    (folder / "diagnosis.json").write_text(json.dumps([of_fit]))
    run = read_run(folder)
    safety, cost = (
        "Unsafe answers to harmful prompts fell from 99.0 % to 60.0 %",
        "ordinary prompts rose from 0.0 % to 14.5 %",
    )
    assert headline(run) == f"{safety}; refusals of {cost}."
    assert "60.0 % unsafe, 14.5 % of ordinary prompts refused" in headline_of_several([run])
    assert [finding.title for finding in run.findings] == ["More ordinary prompts are refused", "Of the fit"]
    assert "More ordinary prompts are refused" in Page(run_page(run)).text
    assert "More ordinary prompts are refused" in run_text(run)


def test_what_test_measured_comes_first(tmp_path):
    folder = made_run(tmp_path / "both")
    (folder / "test.json").write_text(json.dumps(result_of_test(0.05)))
    run = read_run(folder)
    assert [m.job for m in run.measurements] == ["test", "fit"]
    found = {m.name: m for m in run.measurements[0].measures}
    unsafe, nll = found["safety/unsafe_rate"], found["general/nll"]
    assert unsafe.before is not None
    assert unsafe.after is not None
    assert nll.before is not None
    assert (unsafe.before.value, unsafe.after.value, unsafe.after.of) == (0.99, 0.05, 300)
    assert nll.before.value == pytest.approx(1.5)
    assert "from 99.0 % to 5.0 %; general answers moved 0.0076 nats a token from the base" in run_text(run)


def test_attacks_have_a_table_and_answers_of_their_own(tmp_path):
    run = read_run(under_attack(made_run(tmp_path / "attacked")))
    first, second, last = run.measurements[0].attacks
    assert [first.name, second.name, last.name] == ["prefill_5", NASTY, "many_shot_64"]
    assert (first.trained, second.trained, last.harm) == (True, False, None)
    assert [part.title for part in first.categories] == ["prefill_5: fire"]
    assert f"under {NASTY}, the worst of 2 attacks, 40.0 % (before 80.0 %)" in headline(run)
    assert run.answers is not None
    assert run.answers.total == {"harmful": 40, "look-alike": 40}
    assert not any(exchange.attack for exchange in run.answers.shown)
    assert run.answers.attacked_total == 160
    for kind in ("harmful", "look-alike"):
        mine = [exchange.attack for exchange in run.answers.attacked if exchange.kind == kind]
        assert (len(mine), mine.count(NASTY)) == (32, 16)
    text, page = run_text(run), Page(run_page(run))
    assert "| prefill\\_5 (in training) | 90.0 % | 10.0 % | 5.0 to 15.0 | 20.0 % | 30.0 % | 30.0 % |" in text
    assert "| many\\_shot\\_64 |  | no prompt fits |" in text
    assert "\n(the answer begins with: Sure, " in text
    for said in ("prefill_5* 90.0 %", "no prompt fits", "prefill_5: fire", "The answers begin with: Sure,"):
        assert said in page.text
    assert page.unclosed == []
    assert not any(tag in {"img", "iframe"} for tag, _ in page.elements)


def test_runs_under_attack_stand_side_by_side(tmp_path):
    runs = [read_run(under_attack(made_run(tmp_path / name))) for name in ("one", "two")]
    runs.append(read_run(made_run(tmp_path / "not-attacked")))
    found = compare(runs)
    assert [row.title for row in found.attacks] == ["prefill_5", NASTY]
    assert found.attacks[0].of_runs[2] is None
    assert "under attack" in Page(comparison_page(runs)).text
    assert not any(prompt.prompt.startswith("prefill") for prompt in found.prompts)


@pytest.mark.parametrize("name", ["summary.json", "config.yaml", "null_space.json", "answers.jsonl", "diagnosis.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[1, {}, null]", b'{"inputs": [{}], "model": 3}', b"\xff\xfe\x00"])
def test_a_broken_file_is_as_none(tmp_path, name, content):
    folder = made_run(tmp_path / "run")
    (folder / name).write_bytes(content)
    Page(run_page(read_run(folder)))
    run_text(read_run(folder))


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        code: str | int | None = 0
        try:
            main(["report", *arguments])
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr()

    return call


def test_the_command_writes_beside_the_run_and_of_several_above_them(command, tmp_path):
    made_run(tmp_path / "runs" / "one")
    made_run(tmp_path / "runs" / "two", unsafe=0.3)
    code, said = command("one")
    assert (code, said.out.split()) == (0, ["runs/one/report.html", "runs/one/report.md"])
    code, said = command("one", "runs/two")
    assert (code, said.out.split()) == (0, ["runs/report.html", "runs/report.md"])
    text = (tmp_path / "runs" / "report.md").read_text()
    assert "| Harmful prompts answered unsafely | 90.9 % | 2.0 % (-88.9) | 30.0 % (-60.9) |" in text
    assert "one: 2.0 % unsafe, 94.6 % of general tasks right; two: 30.0 % unsafe" in text
    assert Page((tmp_path / "runs" / "report.html").read_text()).unclosed == []


def test_runs_of_different_bases_are_compared_and_it_is_said(command, tmp_path):
    made_run(tmp_path / "runs" / "one")
    made_run(tmp_path / "runs" / "two", base="Qwen/Qwen2.5-7B")
    code, said = command("one", "two", "--out", "both")
    assert code == 0
    assert "note: These runs have different bases (toy; Qwen/Qwen2.5-7B)" in said.out
    text = (tmp_path / "both" / "report.md").read_text()
    assert "90.9 % to 2.0 %" in text, "each has its own before"
    assert "Answers to the same prompts" not in text


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"quantization": "none"}, "toy, nf4 base in float32; toy, unquantised base in float32"),
        ({"gguf_file": "b.gguf"}, "toy, nf4 base in float32; toy, nf4 base in float32, file b.gguf"),
        (
            {"adapter": "sft", "merge_adapter": True},
            "toy, nf4 base in float32; toy, nf4 base in float32, merged with sft",
        ),
    ],
)
def test_one_path_may_name_several_bases(command, tmp_path, other, said):
    made_run(tmp_path / "runs" / "one")
    made_run(tmp_path / "runs" / "two", **other)
    code, shown = command("one", "two")
    assert code == 0
    assert f"note: These runs have different bases ({said}" in shown.out
    assert "Answers to the same prompts" not in (tmp_path / "runs" / "report.md").read_text()


def test_runs_that_began_differently_have_each_its_own_before(command, tmp_path):
    """From a warm start, for instance: its base is the other run's, and what it began with is not."""
    made_run(tmp_path / "runs" / "one")
    warm = made_run(tmp_path / "runs" / "two", unsafe=0.3, adapter="warm")
    summary = json.loads((warm / "summary.json").read_text())
    (warm / "summary.json").write_text(json.dumps({**summary, "before/safety/unsafe_rate": 0.455}))
    said = [json.loads(line) for line in (warm / "answers.jsonl").read_text().splitlines()]
    said[3]["before"] = "Ask somebody else."
    (warm / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in said))
    code, shown = command("one", "two")
    assert code == 0
    assert "note: Their figures before are not the same" in shown.out
    text = (tmp_path / "runs" / "report.md").read_text()
    assert "90.9 % to 2.0 % (-88.9) | 45.5 % to 30.0 % (-15.5) |" in text
    page = (tmp_path / "runs" / "report.html").read_text()
    assert "45.5 % &rarr;" in page
    prompts = {
        prompt.prompt: prompt.before for prompt in compare([read_run(warm), read_run(warm.with_name("one"))]).prompts
    }
    assert prompts[said[3]["prompt"]] is None, "neither of the two answers is that of both"
    assert prompts[said[4]["prompt"]] is not None


def test_runs_of_one_name_are_called_by_their_folders(command, tmp_path):
    for place in ("a", "b"):
        made_run(tmp_path / place / "run", unsafe=0.02 if place == "a" else 0.3)
    code, _ = command("a/run", "b/run")
    assert code == 0
    text = (tmp_path / "report.md").read_text()
    assert "a/run: 2.0 % unsafe" in text
    assert "b/run: 30.0 % unsafe" in text
    assert '<th class="num">b/run</th>' in (tmp_path / "report.html").read_text()


def test_figures_that_are_older_than_the_training_are_said_to_be(command, tmp_path):
    """A run that was over, went on, and was killed: `summary.json` is of its first end."""
    folder = with_curves(made_run(tmp_path / "runs" / "on"), steps=96)
    code, shown = command("on")
    assert code == 0
    assert "note: This run was trained further and is not finished" in shown.out
    assert "is of step 83, and the last logged step is 95" in shown.out
    assert "was trained further" in Page((folder / "report.html").read_text()).text
    made_run(tmp_path / "runs" / "done")
    code, shown = command("on", "done")
    assert "note: on was trained on after step 83" in shown.out
    assert standing(read_run(with_curves(made_run(tmp_path / "whole"), steps=83))) == []


def test_the_command_goes_on_with_runs_that_lack_something_and_says_it(command, tmp_path):
    made_run(tmp_path / "runs" / "half", finished=False, measured=False)
    made_run(tmp_path / "runs" / "blind", measured=False)
    code, shown = command("half")
    assert code == 0
    assert "note: This run is not finished" in shown.out
    code, shown = command("blind")
    assert code == 0
    assert "note: Nothing was measured before and after" in shown.out
    code, shown = command("half", "blind")
    assert code == 0
    for note in ("half was not measured", "blind was not measured", "half is not finished"):
        assert f"note: {note}" in shown.out
    assert Page((tmp_path / "runs" / "report.html").read_text()).unclosed == []


def test_there_is_no_such_run(command, tmp_path):
    made_run(tmp_path / "runs" / "quickstart")
    code, said = command("quikstart")
    assert code == 1
    assert "Did you mean `quickstart`?" in said.err
    assert "There are: quickstart." in said.err
    (tmp_path / "empty").mkdir()
    code, said = command("empty")
    assert code == 1
    assert "is a folder, but not a run's" in said.err
    assert "Traceback" not in said.err


def test_a_written_report_is_whole_or_the_old_one(tmp_path, monkeypatch):
    folder = made_run(tmp_path / "run")
    run = read_run(folder)
    write_report(run)
    before = (folder / "report.html").read_text()
    monkeypatch.setattr("nspo_lightning.report.write.without_surrogates", lambda text: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(run)
    assert (folder / "report.html").read_text() == before
    shutil.rmtree(folder)


def test_ticks_are_round():
    assert ticks(-2, 102, 5) == [0, 50, 100]
    assert ticks(0.0, 0.0003, 5) == pytest.approx([0, 0.0001, 0.0002, 0.0003])


def test_tensorboard_has_what_matters_first_and_curves_are_found_there(full):
    shown = [shown_as(name) for name in ("clip_ratio/low_min", "unsafe", "reward", "entropy", "nullspace/leak_max")]
    assert sorted(shown)[-2:] == ["training/clip_ratio/low_min", "training/entropy"]
    moved = {shown_as(name): curve for name, curve in full.curves.items()}
    assert [p.title for p in pictures(replace(full, curves=moved))] == [p.title for p in pictures(full)]


def test_what_test_logged_is_no_point_of_the_curves(tmp_path):
    folder = with_curves(made_run(tmp_path / "run"), steps=20)
    before = read_run(folder).curves["safety/unsafe_rate"].points
    with SummaryWriter(str(folder), filename_suffix=".test") as writer:
        writer.add_scalar("safety/unsafe_rate", 0.123, 0)
    assert read_run(folder).curves["safety/unsafe_rate"].points == before


def test_what_a_killed_run_had_logged_behind_its_checkpoint_is_void(tmp_path):
    """It went on from step 3 and stopped early at 4: nothing of step 5, and it was not trained further."""
    folder = made_run(tmp_path / "run")
    for number, steps in enumerate([range(6), range(3, 5)]):
        with SummaryWriter(str(folder), filename_suffix=f".{number}") as writer:
            for step in steps:
                writer.add_scalar("reward", number, step)
            writer.add_scalar("safety/unsafe_rate", number, steps[-1])
    curves = read_run(folder).curves
    assert curves["reward"].points == ((0, 0.0), (1, 0.0), (2, 0.0), (3, 1.0), (4, 1.0))
    assert curves["safety/unsafe_rate"].points == ((4, 1.0),)
    assert read_run(folder).last_step == 4


def test_a_run_logged_as_csv_has_curves(tmp_path):
    folder = made_run(tmp_path / "run")
    (folder / "metrics.csv").write_text("step,reward,safety/unsafe_rate\n0,0.5,\n1,0.75,0.9\n2,nan,\n")
    assert read_run(folder).curves["reward"].points == ((0, 0.5), (1, 0.75))
    assert read_run(folder).curves["safety/unsafe_rate"].points == ((1, 0.9),)

"""The assistant dataset: reproducible, unambiguous, and its test split never shown in training.

A small parser here reads the requests back, so that a time or another value that is cut short in
the files fails, whatever the generator believes.
"""

import importlib.util
import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[2] / "recipes" / "data"
FILES = DATA / "assistant"
SPLITS = {"train": 2000, "validation": 200, "test": 300}

# Every key but "action" whose values the splits may share. All others are open.
CLOSED = {
    ("switch_device", "state"),
    ("lock_door", "state"),
    ("set_alarm", "day"),
    ("set_timer", "unit"),
    ("add_reminder", "day"),
    ("add_event", "day"),
    ("add_to_list", "list"),
    ("call", "mode"),
    ("navigate", "mode"),
    ("get_weather", "day"),
}
LEAD_IN = re.compile(
    r"(hey, |ok, |so, |hi, |(could|can) you please |(could|can|would) you |please )?"
)
# A complete time of day, as people say it: "half past six" alone is none.
HOUR_NAME = "one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve"
TIME = (
    r"(?:\d{1,2}(?::\d\d)? [ap]m|\d\d:\d\d"
    rf"|(?:(?:quarter past|half past|quarter to) )?(?:{HOUR_NAME})"
    r" (?:tonight|at night|in the (?:morning|afternoon|evening)))"
)


def load_generator():
    spec = importlib.util.spec_from_file_location("make_assistant", DATA / "make_assistant.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


make_assistant = load_generator()


def read_rows(split):
    text = (FILES / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


ROWS = {split: read_rows(split) for split in SPLITS}
ACTIONS = {split: [json.loads(row["completion"]) for row in rows] for split, rows in ROWS.items()}


def bare(prompt):
    """Strips a request of its capital letter, lead-in and final mark."""
    prompt = prompt.rstrip("?.")
    lead_in = LEAD_IN.match(prompt[0].lower() + prompt[1:])[0]
    request = prompt[len(lead_in) :]
    keep_capital = lead_in or re.match(r"I\b", request)
    return request if keep_capital else request[0].lower() + request[1:]


def pattern(phrasing, action, said):
    """Compiles a pattern of the requests in one phrasing; slots are groups of all their values."""
    text = re.sub(r"[?.]$", "", phrasing)
    parts = re.split(r"(\{\w+\}|\[|\])", text)
    rules = {"[": "(?:", "]": ")?"}
    return re.compile(
        "".join(
            f"(?P<{part[1:-1]}>{said[action, part[1:-1]]})"
            if part.startswith("{")
            else rules.get(part, re.escape(part))
            for part in parts
        )
    )


def all_patterns():
    """Returns (action, phrasing, is it unseen, its pattern) for every phrasing of the grammar.

    A slot matches any value of either split, and a time any time at all, so that an overlap in
    wording shows whatever the values are.
    """
    said = {}
    for action, rule in make_assistant.ACTIONS.items():
        for key, slot in rule.slots.items():
            values = {text for style in slot.seen + slot.unseen for text in style}
            literal = "|".join(map(re.escape, sorted(values, key=len, reverse=True)))
            said[action, key] = TIME if key == "time" else literal
    return [
        (action, phrasing, unseen, pattern(phrasing, action, said))
        for action, rule in make_assistant.ACTIONS.items()
        for unseen, phrasings in ((False, rule.seen), (True, rule.unseen))
        for phrasing in phrasings
    ]


def parse(action, match):
    """Returns the completion that a matched request asks for."""
    values = {"action": action}
    for key, slot in make_assistant.ACTIONS[action].slots.items():
        said = match.groupdict().get(key)
        if said is None:
            continue
        if (action, key) in CLOSED:
            values[key] = slot.seen[0][said]
        else:
            values[key] = json.loads(said) if re.fullmatch(r"[\d.]+", said) else said
    return values


@pytest.fixture(scope="module")
def readings():
    """Maps each row of each split to all its readings: (phrasing, is it unseen, completion)."""
    patterns = all_patterns()
    return {
        split: [
            [
                (phrasing, unseen, parse(action, match))
                for action, phrasing, unseen, rule in patterns
                if (match := rule.fullmatch(bare(row["prompt"])))
            ]
            for row in rows
        ]
        for split, rows in ROWS.items()
    }


def test_committed_files_are_a_fresh_generation(tmp_path, capsys):
    make_assistant.main(tmp_path)
    for split in SPLITS:
        name = f"{split}.jsonl"
        assert (tmp_path / name).read_bytes() == (FILES / name).read_bytes(), name
    assert len(capsys.readouterr().out.splitlines()) == len(SPLITS)


@pytest.mark.parametrize(("split", "count"), SPLITS.items())
def test_counts_and_actions(split, count):
    actions = Counter(action["action"] for action in ACTIONS[split])
    assert sum(actions.values()) == count
    assert len(actions) >= 12
    assert max(actions.values()) - min(actions.values()) <= 1


@pytest.mark.parametrize("split", SPLITS)
def test_completions_are_one_line_of_json_in_declared_order(split):
    for row, action in zip(ROWS[split], ACTIONS[split], strict=True):
        assert list(row) == ["prompt", "completion"]
        assert row["completion"] == json.dumps(action, ensure_ascii=False)
        assert "\n" not in row["prompt"] + row["completion"]
        declared = ["action", *make_assistant.ACTIONS[action["action"]].slots]
        assert list(action) == [key for key in declared if key in action]
        assert len(action) > 1


@pytest.mark.parametrize("split", SPLITS)
def test_open_text_is_copied_and_numbers_are_numbers(split):
    for row, action in zip(ROWS[split], ACTIONS[split], strict=True):
        for key, value in action.items():
            if key == "action" or (action["action"], key) in CLOSED:
                continue
            assert re.search(rf"(?<!\w){re.escape(str(value))}(?!\w)", row["prompt"])
            assert isinstance(value, int | float) == (key in ("level", "degrees", "amount"))


@pytest.mark.parametrize("split", SPLITS)
def test_requests_have_one_reading_and_it_is_the_completion(split, readings):
    for row, action, found in zip(ROWS[split], ACTIONS[split], readings[split], strict=True):
        assert found, row
        assert all(completion == action for _, _, completion in found), (row, found)


def test_no_request_occurs_twice():
    """Not even with another lead-in, capital letter or final mark."""
    counts = Counter(bare(row["prompt"]).lower() for rows in ROWS.values() for row in rows)
    assert [request for request, count in counts.items() if count > 1] == []


def test_test_phrasings_are_never_shown(readings):
    for split, is_test in (("train", False), ("validation", False), ("test", True)):
        for row, found in zip(ROWS[split], readings[split], strict=True):
            assert {unseen for _, unseen, _ in found} == {is_test}, row


def test_every_phrasing_is_in_use(readings):
    used = {split: {r[0] for found in readings[split] for r in found} for split in SPLITS}
    for rule in make_assistant.ACTIONS.values():
        assert set(rule.seen) <= used["train"]
        assert set(rule.unseen) <= used["test"]


def open_values(split):
    """Returns (action, key, value) for each value in a split that test rows must not share."""
    return [
        (action["action"], key, value)
        for action in ACTIONS[split]
        for key, value in action.items()
        if key != "action" and (action["action"], key) not in CLOSED
    ]


def test_test_values_of_open_slots_are_never_shown():
    """They are in no slot of any action: a person in a test message is in no training call."""
    shown = [*open_values("train"), *open_values("validation")]
    held_out = open_values("test")
    assert {(action, key) for action, key, _ in shown} == {(a, key) for a, key, _ in held_out}
    texts = {value for _, _, value in shown if isinstance(value, str)}
    assert texts.isdisjoint({value for _, _, value in held_out})
    numbers = {(key, value) for _, key, value in shown}  # 50 may be a percentage and an amount
    assert numbers.isdisjoint({(key, value) for _, key, value in held_out})
    for name in {key for _, key, _ in held_out}:
        assert len({value for _, key, value in held_out if key == name}) >= 5, name


def test_training_values_of_open_text_are_many_and_each_is_rare():
    """A model can then only copy values, not memorize them."""
    counts = {}
    for action, key, value in open_values("train"):
        if isinstance(value, str):
            counts.setdefault((action, key), Counter())[value] += 1
    for slot, count in counts.items():
        assert len(count) >= 25, slot
        assert max(count.values()) <= (10 if slot[1] == "time" else 6), (slot, count)


def test_half_of_the_training_timers_have_no_name():
    timers = [action for action in ACTIONS["train"] if action["action"] == "set_timer"]
    assert 0.45 <= sum("name" not in timer for timer in timers) / len(timers) <= 0.55


@pytest.mark.parametrize("split", SPLITS)
def test_times_are_copied_whole(split):
    """A completion has the whole time that its request says, and has one if the request does."""
    for row, action in zip(ROWS[split], ACTIONS[split], strict=True):
        said = re.findall(rf"(?<!\w){TIME}(?!\w)", row["prompt"])
        assert said == ([action["time"]] if "time" in action else []), row


def test_test_times_are_new_combinations_of_trained_words():
    """All hours, minutes and parts of the day of test times occur in training times, too."""
    times = {
        split: {action["time"] for action in actions if "time" in action}
        for split, actions in ACTIONS.items()
    }
    words = {split: set(re.findall(r"\w+", " ".join(said))) for split, said in times.items()}
    assert words["test"] <= words["train"]
    assert times["test"].isdisjoint(times["train"] | times["validation"])


@pytest.mark.parametrize("split", SPLITS)
def test_word_times_are_few(split):
    said = [row for row in ROWS[split] if re.search(r"(quarter|half) (past|to) ", row["prompt"])]
    assert 0 < len(said) / len(ROWS[split]) <= 0.05


@pytest.mark.parametrize(
    "said",
    [
        "7:45 pm",
        "12:20 pm",
        "19:30",
        "7 am",
        "ten tonight",
        "nine in the evening",
        "half past six in the morning",
        "quarter to twelve at night",
    ],
)
def test_the_parser_here_reads_times_whole(said):
    assert re.search(TIME, f"wake me at {said} on Monday")[0] == said


@pytest.mark.parametrize("said", ["7", "7:45", "half past six", "ten", "10 percent", "7:45 p"])
def test_the_parser_here_reads_no_cut_time(said):
    assert re.fullmatch(TIME, said) is None

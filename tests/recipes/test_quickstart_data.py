"""The quickstart dataset: reproducible, unambiguous, and its test split never shown in training.

The requests are read back here by a small parser of their own, so a wrong time or a value cut
short in the files fails, whatever the generator believes.
"""

import importlib.util
import itertools
import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[2] / "recipes" / "data"
FILES = DATA / "quickstart"
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
TO_24_HOURS = {"am": 0, "pm": 12, "morning": 0, "afternoon": 12, "evening": 12, "night": 12}
HOUR_NAMES = "one two three four five six seven eight nine ten eleven twelve".split()  # noqa: SIM905
PAST = {"quarter past": (0, 15), "half past": (0, 30), "quarter to": (-1, 45)}


def load_generator():
    spec = importlib.util.spec_from_file_location("make_quickstart", DATA / "make_quickstart.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


make_quickstart = load_generator()


def read_rows(split):
    text = (FILES / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


ROWS = {split: read_rows(split) for split in SPLITS}
ACTIONS = {split: [json.loads(row["completion"]) for row in rows] for split, rows in ROWS.items()}


def bare(prompt):
    """The request without what may stand around it: capital letter, lead-in and final mark."""
    prompt = prompt.rstrip("?.")
    lead_in = LEAD_IN.match(prompt[0].lower() + prompt[1:])[0]
    request = prompt[len(lead_in) :]
    keep_capital = lead_in or re.match(r"I\b", request)
    return request if keep_capital else request[0].lower() + request[1:]


def clock(said):
    """HH:MM of a time as it is said in a request."""
    if re.fullmatch(r"\d\d:\d\d", said):
        return said
    said = said.replace("tonight", "at night")
    quarters = re.match("|".join(PAST), said)
    before, past = PAST[quarters[0]] if quarters else (0, 0)
    words = said.removeprefix(quarters[0] if quarters else "").split()
    hour, _, minute = words[0].partition(":")
    hour = (int(hour) if hour.isdigit() else HOUR_NAMES.index(hour) + 1) + before
    return f"{hour % 12 + TO_24_HOURS[words[-1]]:02}:{int(minute or past):02}"


def pattern(phrasing, action, said):
    """Matches the requests in one phrasing, each slot a group of all that can be said for it."""
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
    """(action, phrasing, is it unseen, its pattern) for every phrasing of the grammar.

    A slot may hold any value of either side, so an overlap in wording shows whatever the values.
    """
    said = {}
    for action, rule in make_quickstart.ACTIONS.items():
        for key, slot in rule.slots.items():
            values = {text for style in slot.seen + slot.unseen for text in style}
            said[action, key] = "|".join(map(re.escape, sorted(values, key=len, reverse=True)))
    return [
        (action, phrasing, unseen, pattern(phrasing, action, said))
        for action, rule in make_quickstart.ACTIONS.items()
        for unseen, phrasings in ((False, rule.seen), (True, rule.unseen))
        for phrasing in phrasings
    ]


def parse(action, match):
    """The completion that a matched request asks for."""
    values = {"action": action}
    for key, slot in make_quickstart.ACTIONS[action].slots.items():
        said = match.groupdict().get(key)
        if said is None:
            continue
        if key == "time":
            values[key] = clock(said)
        elif (action, key) in CLOSED:
            values[key] = slot.seen[0][said]
        else:
            values[key] = json.loads(said) if re.fullmatch(r"[\d.]+", said) else said
    return values


@pytest.fixture(scope="module")
def readings():
    """For each row of each split, every (phrasing, is it unseen, completion) it can be read as."""
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
    make_quickstart.main(tmp_path)
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
        declared = ["action", *make_quickstart.ACTIONS[action["action"]].slots]
        assert list(action) == [key for key in declared if key in action]
        assert len(action) > 1


@pytest.mark.parametrize("split", SPLITS)
def test_open_text_is_copied_and_numbers_are_numbers(split):
    for row, action in zip(ROWS[split], ACTIONS[split], strict=True):
        for key, value in action.items():
            if key in ("action", "time") or (action["action"], key) in CLOSED:
                continue
            assert str(value) in row["prompt"]
            assert isinstance(value, int | float) == (key in ("level", "degrees", "amount"))


@pytest.mark.parametrize("split", SPLITS)
def test_requests_have_one_reading_and_it_is_the_completion(split, readings):
    for row, action, found in zip(ROWS[split], ACTIONS[split], readings[split], strict=True):
        assert found, row
        assert all(completion == action for _, _, completion in found), (row, found)


def test_no_request_occurs_twice():
    """Nor with another lead-in, capital letter or final mark."""
    counts = Counter(bare(row["prompt"]).lower() for rows in ROWS.values() for row in rows)
    assert [request for request, count in counts.items() if count > 1] == []


def test_test_phrasings_are_never_shown(readings):
    for split, is_test in (("train", False), ("validation", False), ("test", True)):
        for row, found in zip(ROWS[split], readings[split], strict=True):
            assert {unseen for _, unseen, _ in found} == {is_test}, row


def test_every_phrasing_is_in_use(readings):
    used = {split: {r[0] for found in readings[split] for r in found} for split in SPLITS}
    for rule in make_quickstart.ACTIONS.values():
        assert set(rule.seen) <= used["train"]
        assert set(rule.unseen) <= used["test"]


def test_test_values_of_open_slots_are_never_shown():
    """Over all actions that share a key: a test room is in no training row of any action."""
    shown, held_out = defaultdict(set), defaultdict(set)
    for split, actions in ACTIONS.items():
        values = held_out if split == "test" else shown
        for action in actions:
            for key, value in action.items():
                if key != "action" and (action["action"], key) not in CLOSED:
                    # "to" and "text" name different things in different actions
                    name = key if key not in ("to", "text", "title", "name") else None
                    values[name or (action["action"], key)].add(value)
    assert set(shown) == set(held_out)
    for key, values in held_out.items():
        assert len(values) >= 5, key
        assert values.isdisjoint(shown[key]), (key, values & shown[key])
    people = ("send_message", "to"), ("call", "name")
    for mine, other in itertools.permutations(people):
        assert held_out[mine].isdisjoint(shown[other])


def test_training_shows_every_hour_and_minute_of_test_times():
    """A test time is a new combination of an hour and a minute that training has elsewhere."""
    times = {
        split: {action["time"] for action in actions if "time" in action}
        for split, actions in ACTIONS.items()
    }
    for part in (0, 1):
        trained = {time.split(":")[part] for time in times["train"]}
        assert {time.split(":")[part] for time in times["test"]} <= trained


@pytest.mark.parametrize("split", SPLITS)
def test_word_times_are_few(split):
    said = [row for row in ROWS[split] if re.search(r"(quarter|half) (past|to) ", row["prompt"])]
    assert 0 < len(said) / len(ROWS[split]) <= 0.05


@pytest.mark.parametrize(
    ("said", "time"),
    [
        ("7:45 am", "07:45"),
        ("12:20 pm", "12:20"),
        ("19:30", "19:30"),
        ("7 pm", "19:00"),
        ("ten tonight", "22:00"),
        ("half past six in the morning", "06:30"),
        ("quarter to nine in the evening", "20:45"),
        ("quarter to one in the afternoon", "12:45"),
        ("quarter to twelve in the morning", "11:45"),
        ("quarter to twelve at night", "23:45"),
    ],
)
def test_the_parser_here_reads_times(said, time):
    assert clock(said) == time

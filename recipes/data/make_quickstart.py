"""Write the quickstart dataset: requests and the short JSON that they ask for, learned in minutes.

    python recipes/data/make_quickstart.py [FOLDER]

It has four actions, with the slots, lead-ins and rules of `make_assistant.py` in the same folder:
test rows contain phrasings and values that never occur in training.
"""

import sys
from pathlib import Path

from make_assistant import (
    AMOUNT,
    CHORE,
    FIRST_NAMES,
    ITEM,
    PERCENT,
    ROOM,
    Action,
    text_slot,
    write_splits,
)

ROWS = {"train": 480, "validation": 20, "test": 100}

ACTIONS = {
    "light": Action(
        slots={"light": ROOM, "level": PERCENT},
        seen=[
            "set the {light} lights to {level} percent",
            "dim the {light} lights to {level} percent",
            "turn the lights in the {light} to {level} percent",
            "bring the {light} lights down to {level} percent",
            "I want the {light} lights at {level} percent.",
        ],
        unseen=[
            "put the {light} lights at {level} percent",
            "turn the {light} lights up to {level} percent",
            "I'd like {level} percent light in the {light}.",
        ],
    ),
    "timer": Action(
        slots={"timer": CHORE, "minutes": AMOUNT},
        seen=[
            "set a timer for {minutes} minutes for the {timer}",
            "start a {minutes} minute timer for the {timer}",
            "give the {timer} {minutes} minutes",
            "time the {timer} for {minutes} minutes",
            "I need a {minutes} minute timer for the {timer}.",
        ],
        unseen=[
            "set a {minutes} minute timer for the {timer}",
            "start a timer of {minutes} minutes for the {timer}",
            "I want a timer for the {timer}, {minutes} minutes.",
        ],
    ),
    "buy": Action(
        slots={"buy": ITEM},
        seen=[
            "put {buy} on the shopping list",
            "add {buy} to my shopping list",
            "write down that we need {buy}",
            "we have to buy {buy}.",
            "I need {buy}, put that on the list.",
        ],
        unseen=[
            "add {buy} to the list",
            "note that we need to buy {buy}",
            "we are out of {buy}.",
        ],
    ),
    "call": Action(
        slots={"call": text_slot(FIRST_NAMES)},
        seen=[
            "call {call}",
            "give {call} a call",
            "phone {call} for me",
            "get {call} on the phone",
            "I want to talk to {call}.",
        ],
        unseen=[
            "make a call to {call}",
            "phone {call}",
            "I need to speak to {call}.",
        ],
    ),
}


def main(folder: Path) -> None:
    write_splits(folder, ACTIONS, ROWS, lambda _, values: values)


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else here / "quickstart")

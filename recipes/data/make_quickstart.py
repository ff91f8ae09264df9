"""Write the quickstart dataset: spoken requests and the one-line JSON actions they ask for.

    python recipes/data/make_quickstart.py [FOLDER]

The rows come from the small grammar below. An action has slots, in the order its JSON keeps,
and phrasings in two sets. Training and validation rows are made of *seen* phrasings and slot
values only, test rows of *unseen* ones only: a test row is new in its wording and in every value
it names, except for closed slots (on and off, days, units), whose few values are shared.

To add an action, add an entry to ACTIONS. In a phrasing,
    {slot}    stands for a value of that slot,
    [...]     is said in half of the requests (leaving out the slots inside it),
    ? or .    at its end marks a sentence that cannot follow "could you"; all others can.
A phrasing never starts with a slot whose value is copied, as its first letter may be capitalised.
"""

import json
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

SEED = 20240607
ROWS = {"train": 2000, "validation": 200, "test": 300}

Value = str | int | float
Style = dict[str, Value]  # what is said -> what the JSON holds


@dataclass(frozen=True)
class Slot:
    """The values of a slot, grouped in styles: a draw picks a style, then one of its values."""

    seen: list[Style]
    unseen: list[Style]


@dataclass(frozen=True)
class Action:
    slots: dict[str, Slot]
    seen: list[str]
    unseen: list[str]


def text_slot(seen: str, unseen: str) -> Slot:
    """Text copied from the request as it stands; the values are separated by commas."""

    def style(values: str) -> Style:
        return {value: value for value in re.split(r",\s+", values)}

    return Slot([style(seen)], [style(unseen)])


def number_slot(numbers: list[int | float], every: int) -> Slot:
    """Numbers in digits; one in `every` of them is kept for the test rows."""
    unseen = numbers[every // 2 :: every]
    seen = [number for number in numbers if number not in unseen]
    return Slot([{str(n): n for n in seen}], [{str(n): n for n in unseen}])


def closed_slot(style: Style) -> Slot:
    return Slot([style], [style])


# Clock times. One time in seven is kept for the test rows, by a rule which leaves every hour and
# every minute value in training, in other combinations: 07:00 is unseen, 19:00 and 07:30 are seen.

HOURS = [
    *("twelve", "one", "two", "three", "four", "five"),
    *("six", "seven", "eight", "nine", "ten", "eleven"),
]
DAY_PARTS = {
    "in the morning": range(5, 12),
    "in the afternoon": range(12, 18),
    "in the evening": range(17, 23),
    "tonight": range(19, 24),
    "at night": range(21, 24),
}


def is_unseen_time(hour: int, minute: int) -> bool:
    return (5 * hour + minute) % 7 == 0


def twelve_hour(hour: int) -> int:
    return (hour - 1) % 12 + 1


def time_styles(*, unseen: bool, tonight: bool) -> list[Style]:
    """The ways to say the times of one side, none of which leaves the half of the day open.

    So "10:20" is not said without "am" or "pm", while "09:20" and "19:20" are; and noon, "12 pm",
    is only said with minutes.
    """
    digits: Style = {}
    railway: Style = {}
    whole: Style = {}
    words: Style = {}
    quarters: Style = {}
    for hour in range(5, 24):
        half = "am" if hour < 12 else "pm"
        name, next_name = HOURS[hour % 12], HOURS[(hour + 1) % 12]
        past = {15: f"quarter past {name}", 30: f"half past {name}", 45: f"quarter to {next_name}"}
        parts = [part for part, hours in DAY_PARTS.items() if hour in hours]
        if not tonight:
            parts = [part for part in parts if part != "tonight"]
        for minute in range(0, 60, 5):
            if is_unseen_time(hour, minute) != unseen:
                continue
            time = f"{hour:02}:{minute:02}"
            if hour not in (10, 11, 12):
                railway[time] = time
            if minute:
                digits[f"{twelve_hour(hour)}:{minute:02} {half}"] = time
            elif hour != 12:
                whole[f"{twelve_hour(hour)} {half}"] = time
                words |= {f"{name} {part}": time for part in parts}
            if minute in past:
                quarters |= {f"{past[minute]} {part}": time for part in parts}
    return [*[digits, whole] * 3, *[railway, words] * 2, quarters]  # the commoner, the oftener


def time_slot(*, tonight: bool) -> Slot:
    return Slot(
        time_styles(unseen=False, tonight=tonight), time_styles(unseen=True, tonight=tonight)
    )


TIME = time_slot(tonight=True)
TIME_OF_DAY = time_slot(tonight=False)  # beside a day: no "tonight on Friday"
WEEK = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
DAY = closed_slot(
    {"today": "today", "tomorrow": "tomorrow"} | {f"on {day}": day.lower() for day in WEEK}
)
ON_OFF = closed_slot({"on": "on", "off": "off"})
LOCK = closed_slot({"lock": "locked", "unlock": "unlocked"})
LISTS = ["shopping", "grocery", "packing", "party", "camping", "gift"]
LIST = closed_slot({name: name for name in LISTS})
CALL_MODE = closed_slot({"on speaker": "speaker", "with video": "video"})
TRAVEL = closed_slot({"by car": "car", "by bike": "bike", "by bus": "bus", "on foot": "foot"})
UNIT = closed_slot({"seconds": "seconds", "minutes": "minutes"})

PERCENT = number_slot([*range(5, 101)], every=7)
DEGREES = number_slot([d // 2 if d % 2 == 0 else d / 2 for d in range(30, 61)], every=5)
AMOUNT = number_slot([*range(2, 91)], every=7)

ROOM = text_slot(
    """kitchen, living room, hallway, bathroom, guest bathroom, dining room, office, home office,
    garage, attic, basement, laundry room, nursery, playroom, studio, library, pantry, conservatory,
    upstairs hall, guest room, master bedroom, kids' room, winter garden, entrance hall, workshop,
    music room, wine cellar, downstairs toilet, spare room, reading corner""",
    """bedroom, study, games room, sun room, billiard room, cloakroom, craft room, utility room,
    downstairs hall, breakfast nook, walk-in closet, loft""",
)
DEVICE = text_slot(
    """coffee machine, ceiling fan, kettle, radio, dishwasher, washing machine, air purifier, TV,
    heater, humidifier, garden sprinkler, fairy light chain, electric blanket, vacuum robot, oven,
    bread maker, fish tank pump, projector, printer, wifi router, towel rail, game console,
    extractor fan, hot water boiler, security camera, slow cooker, floor lamp, speaker""",
    """rice cooker, tumble dryer, toaster, pool pump, desk fan, dehumidifier, christmas tree,
    baby monitor, espresso maker, sound bar, outdoor heater, laptop charger""",
)
DOOR = text_slot(
    """front door, back door, garage door, garden gate, cellar door, shed, side entrance,
    patio door, balcony door, car, bike locker, main gate, office door, kitchen door, tool cabinet,
    basement window, greenhouse, guest house door, roof hatch, storage room, mailbox, safe,
    parcel box, workshop door, attic door""",
    """side gate, porch door, laundry door, boat house, medicine cabinet, summer house,
    driveway gate, camper van, terrace door, pool gate, bike shed, cottage door""",
)
PERSON = text_slot(
    """Anna, Ben, Maria, Omar, Lucy, Pedro, Ingrid, Tom, Yuki, Fatima, George, Chloe, Ravi, Sofia,
    Liam, Hannah, Mateo, Zoe, Ahmed, Julia, Viktor, Emily, Kwame, Rosa, Daniel, Aunt Clara,
    Uncle Joe, Doctor Patel, Grandma Rose, Coach Miller, Mum, Dad, my sister, my boss, my landlord,
    the babysitter, the plumber, Paul from work, Lena next door, Mrs Novak""",
    """Oscar, Priya, Helena, Samuel, Nadia, Felix, Amara, Uncle Pete, Doctor Lind, Grandpa Max,
    my brother, the electrician, Carla from school, Mr Okafor""",
)
MESSAGE = text_slot(
    """I'm running late, dinner is ready, the train is delayed, I'll be home soon,
    we need more coffee, the meeting moved to Monday, I found your keys, we saved you a seat,
    the kids are asleep, I can't make it tonight, the parcel arrived, I'm almost there,
    the stairs are wet, the car is fixed, we won, the baby is smiling, I miss you,
    the tickets are booked, it's raining here, my phone is nearly dead, I left the keys inside,
    the cake was delicious, we should talk, the dog is fine, practice is cancelled, I got the job,
    the wifi is back, we are at the beach, lunch is on me, I parked behind the school,
    the doctor said yes, I need your advice on something""",
    """I missed the bus, the pizza is here, we are out of bread, the flight landed early,
    I'm stuck in traffic, the concert was amazing, your jacket is in my car, I'll bring dessert,
    the baby is awake, the shop is closed, we moved the sofa, I passed the exam,
    grandpa feels better""",
)
ITEM = text_slot(
    """oat milk, eggs, bread, olive oil, paper towels, tomatoes, batteries, dog food, rice,
    a birthday card, green apples, toothpaste, sunscreen, two lemons, candles, brown sugar,
    sparkling water, dish soap, a phone charger, wrapping paper, bananas, cheddar cheese,
    a warm sweater, three onions, orange juice, hiking socks, peanut butter, light bulbs,
    a board game, matches, frozen peas, salt, baking powder, a rain jacket, cat litter, black tea,
    paper plates, a sleeping bag, balloons, ground coffee""",
    """almond butter, carrots, a water bottle, shampoo, six limes, red wine, swimming goggles,
    garlic, a picture frame, coconut milk, napkins, wool mittens, blueberry jam""",
)
TASK = text_slot(
    """water the plants, call the bank, take out the trash, feed the cat, pay the rent,
    pick up the laundry, buy stamps, walk the dog, take my medicine, charge the car, book a haircut,
    return the library books, send the invoice, defrost the chicken, stretch, renew my passport,
    clean the oven, check the mail, back up my laptop, iron a shirt, email the teacher,
    order new glasses, move the car, turn the compost, cancel the gym membership, drink water,
    sign the permission slip, vacuum the stairs, wish Lucy luck, descale the kettle""",
    """sweep the balcony, pay the electricity bill, bake a cake, thank the neighbours, oil the bike,
    collect the parcel, practise the violin, change the bed sheets, meditate, print the tickets,
    measure the windows, sharpen the knives""",
)
EVENT = text_slot(
    """choir practice, lunch with Anna, yoga class, book club, football training, movie night,
    dinner with the Garcias, piano practice, parents' evening, coffee with Ben, date night, brunch,
    swimming lessons, band rehearsal, chess club, Emily's birthday party, board game night,
    pottery class, drinks with Omar, Spanish class, jury duty, Leo's school play, spring cleaning,
    tea with Aunt Clara, Mum's retirement dinner, a walk with Chloe, physiotherapy, church,
    marathon training, a meeting with the bank""",
    """dance class, breakfast with Helena, hockey training, wedding rehearsal, karate,
    grandpa's eye test, a picnic with Felix, family lunch, wine tasting, Nadia's farewell party,
    debate club, a call with the lawyer""",
)
CHORE = text_slot(
    """pasta, omelette, rice, tea, bread, cake, pizza, laundry, potato gratin, lasagna, workout,
    nap, chicken soup, reading session, homework, cookie dough, banana bread, roast beef, steak,
    green tea, meditation, pie crust, warm-up, face mask, apple crumble, vegetable curry,
    hair dye""",
    """ramen, salmon, coffee, risotto, onion soup, break, quiche, pancake batter, sauna,
    garlic bread, cello practice, bean stew""",
)
TITLE = text_slot(
    """Clair de Lune, Moonlight Sonata, Paper Boats, Silver Rain, The Blue Danube, Midnight Train,
    Für Elise, Golden Hour Waltz, Slow River, Bolero, Dancing Lanterns, Ode to Joy,
    Four Seasons, Neon Garden, Swan Lake, Letters from Home, Sugar and Smoke, Hungarian Dance,
    Winter Sun, Electric Meadow, Morning Mood, The Long Way Back, Cherry Street, Velvet Sky,
    Ave Maria, Rooftop Summer, Canon, Hollow Trees, Ride of the Valkyries, Little Lighthouse,
    Gymnopedie, Wild Honey Blues, Ten Thousand Kites, Nocturne""",
    """Rhapsody in Blue, The Nutcracker, Copper Moon, Glass Harbour, Flight of the Bumblebee,
    Saturday Rain, Marble Steps, Echo Lane, Turkish March, The Last Ferry, Campfire Stars,
    Requiem, Green Door Shuffle""",
)
ARTIST = text_slot(
    """The Paper Foxes, Mira Stone, Northern Lanterns, Eddie Marlow, The Velvet Owls, Luna Park,
    Big Tin Orchestra, Rosalie Finch, The Harbour Lights, DJ Pepper, Blue Canary, Sam Ardent,
    The Midnight Gardeners, Cactus Club, Hazel and the Wolves, Tin Roof Trio, Oleander, Kito,
    Winterbourne Quartet, Marigold, Theo Lark, Stonefruit, Ada Quill, The Old Town Strings,
    Papaya, Little Engine, Juno Vance, Grand River Philharmonic""",
    """Ivy Calder, The Copper Kettles, Jonas Reed, Paper Planets, The Sunday Drivers, Tamarind,
    Silver Birch Choir, Nina Vale, Moss and Maple, Cobalt, Eastside Symphony, Wes Harlow""",
)
PLACE = text_slot(
    """the train station, Harbour Street, the nearest pharmacy, the airport, Maple Avenue,
    City Hall, the football stadium, Riverside Park, my office, the library, Old Town Square,
    the Italian restaurant, Saint Mary's Hospital, Green Lane, the botanical garden, Pine Bay,
    the next petrol station, Hillcrest School, the science museum, Baker's Corner, the beach,
    12 Mill Road, the post office, Union Bridge, the swimming pool, North Gate Mall,
    the farmers' market, Lake View Hotel, the closest supermarket, Elm Court, the city zoo""",
    """the bus terminal, Willow Street, the nearest bakery, Castle Hill, the opera house, the gym,
    Sunset Boulevard, the dentist, 48 Oak Drive, Kingsway Theatre, the garden centre, Pier Nine,
    the university campus""",
)
CITY = text_slot(
    """Paris, London, Oslo, Madrid, New York, Tokyo, Cairo, San Francisco, Berlin, Lima, Toronto,
    Cape Town, Mumbai, Rio de Janeiro, Prague, Seoul, Nairobi, Athens, Vienna, Los Angeles,
    Reykjavik, Buenos Aires, Dublin, Hanoi, Salt Lake City, Warsaw, Istanbul, Sydney, Quebec,
    Rome, Casablanca, Mexico City, Helsinki, Manila, Edinburgh, Boston, Saint Petersburg, Accra""",
    """Lisbon, Kyoto, New Orleans, Zurich, Bogota, Stockholm, Tel Aviv, Melbourne, Santa Fe,
    Budapest, Marrakesh, Vancouver, Kuala Lumpur""",
)
PHRASE = text_slot(
    """good morning, thank you, where is the station, the bill please, I am lost, good night,
    how much is this, nice to meet you, I love you, see you tomorrow, where are the toilets, water,
    happy new year, I don't understand, it is late, a table for two, excuse me, cheers,
    my name is Tom, the food is great, I need a doctor, can you help me, one ticket, welcome,
    we are on holiday, turn left here, how are you, a cup of coffee, congratulations, bread,
    it is too far, I am vegetarian""",
    """good evening, where is the hotel, I am hungry, goodbye, how old are you, two beers, sorry,
    the weather is beautiful, do you speak English, my bag is gone, have a nice day, butterfly,
    keep the change""",
)
LANGUAGE = text_slot(
    """French, Spanish, German, Japanese, Arabic, Hindi, Polish, Dutch, Korean, Turkish, Swahili,
    Greek, Swedish, Russian, Hebrew, Thai, Brazilian Portuguese, Mandarin Chinese, Czech, Zulu,
    Norwegian, Bengali, Irish, Hungarian, Swiss German, Latin, Romanian, Tamil""",
    """Italian, Finnish, Vietnamese, Danish, Persian, Ukrainian, Welsh, Icelandic, Catalan,
    Canadian French, Indonesian, Croatian""",
)

ACTIONS = {
    "set_light": Action(
        slots={"room": ROOM, "level": PERCENT, "time": TIME},
        seen=[
            "set the {room} lights to {level} percent[ at {time}]",
            "set the lights in the {room} to {level}%[ at {time}]",
            "dim the {room} lights to {level} percent[ at {time}]",
            "dim the lights in the {room} to {level} percent",
            "change the {room} light to {level}% brightness[ at {time}]",
            "turn the {room} lights down to {level} percent",
            "turn the lights in the {room} up to {level} percent[ at {time}]",
            "at {time}, set the {room} light to {level} percent.",
            "make the {room} lights {level} percent bright",
            "put the lights at {level} percent in the {room}[ at {time}]",
            "I want the {room} lights at {level} percent.",
            "I need {level} percent light in the {room}[ at {time}].",
            "the light in the {room} should go to {level}%[ at {time}].",
        ],
        unseen=[
            "bring the {room} lights to {level} percent[ at {time}]",
            "adjust the light in the {room} to {level} percent[ at {time}]",
            "lower the {room} lights to {level}%[ at {time}]",
            "at {time}, dim the lights in the {room} to {level} percent.",
            "I'd like the lights in the {room} at {level} percent.",
        ],
    ),
    "set_temperature": Action(
        slots={"room": ROOM, "degrees": DEGREES, "time": TIME},
        seen=[
            "set the {room} to {degrees} degrees[ at {time}]",
            "set the temperature in the {room} to {degrees} degrees[ at {time}]",
            "heat the {room} to {degrees} degrees[ at {time}]",
            "cool the {room} down to {degrees} degrees",
            "warm up the {room} to {degrees} degrees[ at {time}]",
            "turn the heating in the {room} to {degrees} degrees",
            "change the {room} thermostat to {degrees} degrees[ at {time}]",
            "make it {degrees} degrees in the {room}[ at {time}]",
            "at {time}, set the {room} heating to {degrees} degrees.",
            "keep the {room} at {degrees} degrees",
            "I want the {room} at {degrees} degrees.",
            "I'd like it to be {degrees} degrees in the {room}[ at {time}].",
            "the {room} should be {degrees} degrees warm[ at {time}].",
        ],
        unseen=[
            "bring the {room} to {degrees} degrees[ at {time}]",
            "adjust the {room} temperature to {degrees} degrees[ at {time}]",
            "get the {room} warmed up to {degrees} degrees[ at {time}]",
            "at {time}, heat the {room} to {degrees} degrees.",
            "I need the temperature in the {room} at {degrees} degrees.",
        ],
    ),
    "switch_device": Action(
        slots={"device": DEVICE, "state": ON_OFF, "time": TIME},
        seen=[
            "turn {state} the {device}[ at {time}]",
            "turn the {device} {state}[ at {time}]",
            "switch {state} the {device}[ at {time}]",
            "switch the {device} {state}[ at {time}]",
            "power {state} the {device}",
            "make sure the {device} is {state}[ at {time}]",
            "have the {device} turned {state}[ at {time}]",
            "at {time}, turn the {device} {state}.",
            "get the {device} switched {state}[ at {time}]",
            "I want the {device} {state}[ at {time}].",
            "I'd like you to turn {state} the {device}[ at {time}].",
            "the {device} should be {state}[ at {time}].",
            "can the {device} be {state} at {time}?",
        ],
        unseen=[
            "power the {device} {state}[ at {time}]",
            "at {time}, switch {state} the {device}.",
            "check that the {device} is turned {state}[ at {time}]",
            "I need the {device} {state}[ at {time}].",
            "the {device} must be switched {state}[ at {time}].",
        ],
    ),
    "lock_door": Action(
        slots={"door": DOOR, "state": LOCK, "time": TIME},
        seen=[
            "{state} the {door}[ at {time}]",
            "{state} the {door} now",
            "{state} up the {door}[ at {time}]",
            "at {time}, {state} the {door}.",
            "make sure the {door} is {state}ed[ at {time}]",
            "have the {door} {state}ed[ at {time}]",
            "keep the {door} {state}ed",
            "remember to {state} the {door} at {time}",
            "I want the {door} {state}ed[ at {time}].",
            "I'd like you to {state} the {door}[ at {time}].",
            "the {door} should be {state}ed[ at {time}].",
            "can the {door} be {state}ed[ at {time}]?",
        ],
        unseen=[
            "go and {state} the {door}[ at {time}]",
            "get the {door} {state}ed[ at {time}]",
            "check that the {door} is {state}ed[ at {time}]",
            "I need the {door} {state}ed[ at {time}].",
            "the {door} must be {state}ed[ at {time}].",
        ],
    ),
    "play_music": Action(
        slots={"title": TITLE, "artist": ARTIST, "room": ROOM},
        seen=[
            "play {title}[ by {artist}]",
            "play {title}[ by {artist}] in the {room}",
            "play the song {title}[ by {artist}]",
            "play something by {artist}[ in the {room}]",
            "play music by {artist}[ in the {room}]",
            "put on {title}[ by {artist}]",
            "put {title} on in the {room}",
            "start playing {title}[ by {artist}][ in the {room}]",
            "in the {room}, play {title}[ by {artist}].",
            "let me hear {title}[ by {artist}]",
            "I want to listen to {title}[ by {artist}][ in the {room}].",
            "I'm in the mood for {title}[ by {artist}].",
            "I'd love to hear something by {artist}[ in the {room}].",
        ],
        unseen=[
            "start the song {title}[ by {artist}][ in the {room}]",
            "put on the track {title}[ by {artist}]",
            "put on some music by {artist}[ in the {room}]",
            "let us listen to {title}[ by {artist}][ in the {room}]",
            "I feel like hearing {title}[ by {artist}].",
        ],
    ),
    "set_alarm": Action(
        slots={"time": TIME_OF_DAY, "day": DAY},
        seen=[
            "set an alarm for {time}[ {day}]",
            "set my alarm to {time}[ {day}]",
            "set the alarm clock for {time}[ {day}]",
            "set an alarm {day} at {time}",
            "wake me up at {time}[ {day}]",
            "wake me {day} at {time}",
            "make an alarm for {time}[ {day}]",
            "add an alarm {day} at {time}",
            "get me up at {time}[ {day}]",
            "I need an alarm at {time}[ {day}].",
            "I have to wake up at {time}[ {day}].",
            "I want to get up at {time}[ {day}].",
            "can I have an alarm at {time}[ {day}]?",
        ],
        unseen=[
            "create an alarm for {time}[ {day}]",
            "program the alarm for {time}[ {day}]",
            "ring the alarm {day} at {time}",
            "make sure I wake up at {time}[ {day}]",
            "I want to be woken up at {time}[ {day}].",
        ],
    ),
    "set_timer": Action(
        slots={"amount": AMOUNT, "unit": UNIT, "name": CHORE},
        seen=[
            "set a timer for {amount} {unit}[ for the {name}]",
            "set a timer for the {name}, {amount} {unit}",
            "set a {name} timer for {amount} {unit}",
            "start a timer for {amount} {unit}[ for the {name}]",
            "start a {name} timer, {amount} {unit}",
            "start the {name} timer with {amount} {unit}",
            "time the {name} for {amount} {unit}",
            "count down {amount} {unit}[ for the {name}]",
            "give me {amount} {unit}[ for the {name}]",
            "put {amount} {unit} on the clock[ for the {name}]",
            "I need a timer for {amount} {unit}[ for the {name}].",
            "I need {amount} {unit} for the {name}.",
            "the {name} takes {amount} {unit}, start a timer.",
        ],
        unseen=[
            "create a timer for {amount} {unit}[ for the {name}]",
            "make a {name} timer for {amount} {unit}",
            "run a timer for {amount} {unit}[ for the {name}]",
            "begin a countdown of {amount} {unit}[ for the {name}]",
            "I want a timer of {amount} {unit} for the {name}.",
        ],
    ),
    "add_reminder": Action(
        slots={"task": TASK, "day": DAY, "time": TIME_OF_DAY},
        seen=[
            "remind me to {task}",
            "remind me to {task}[ {day}] at {time}",
            "remind me to {task} {day}",
            "remind me at {time}[ {day}] to {task}",
            "remind me {day}[ at {time}] to {task}",
            "set a reminder to {task}[ {day}][ at {time}]",
            "add a reminder for {time}[ {day}] to {task}",
            "send me a reminder {day} to {task}",
            "tell me {day} at {time} to {task}",
            "tell me to {task} at {time}[ {day}]",
            "help me remember to {task}[ {day}][ at {time}]",
            "I have to remember to {task}[ {day}][ at {time}].",
            "I must not forget to {task}[ {day}][ at {time}].",
        ],
        unseen=[
            "create a reminder to {task}[ {day}][ at {time}]",
            "give me a reminder to {task} at {time}[ {day}]",
            "make sure I remember to {task}[ {day}][ at {time}]",
            "I need a reminder to {task}[ {day}][ at {time}].",
            "I want to be reminded {day}[ at {time}] to {task}.",
        ],
    ),
    "add_event": Action(
        slots={"title": EVENT, "day": DAY, "time": TIME_OF_DAY},
        seen=[
            "schedule {title} {day} at {time}",
            "schedule {title} for {time}[ {day}]",
            "put {title} in my calendar {day} at {time}",
            "put {title} in the calendar[ {day}] at {time}",
            "add {title} to my calendar for {time}[ {day}]",
            "add {title} {day}[ at {time}] to the calendar",
            "add an event for {title} {day} at {time}",
            "plan {title} {day} at {time}",
            "plan {title} for {time}[ {day}]",
            "in my calendar, add {title} {day}[ at {time}].",
            "I have {title} {day} at {time}, put it in my calendar.",
            "there is {title} at {time}[ {day}], add it to the calendar.",
        ],
        unseen=[
            "create a calendar event for {title} {day} at {time}",
            "enter {title} in my calendar for {time}[ {day}]",
            "save {title} to my calendar {day} at {time}",
            "I need {title} in my calendar {day} at {time}.",
            "I have {title} at {time}[ {day}], add it to my calendar.",
        ],
    ),
    "add_to_list": Action(
        slots={"item": ITEM, "list": LIST},
        seen=[
            "add {item} to the {list} list",
            "add {item} to my {list} list",
            "put {item} on the {list} list",
            "put {item} on my {list} list",
            "write {item} on the {list} list",
            "on the {list} list, add {item}.",
            "include {item} in my {list} list",
            "add to my {list} list: {item}",
            "I need {item} on my {list} list.",
            "I want to add {item} to the {list} list.",
            "we need {item}, put that on the {list} list.",
            "we are out of {item}, add that to our {list} list.",
            "can {item} go on the {list} list?",
        ],
        unseen=[
            "place {item} on the {list} list",
            "note {item} on my {list} list",
            "on my {list} list, put {item}.",
            "I'd like {item} on the {list} list.",
            "we need {item}, add that to my {list} list.",
        ],
    ),
    "send_message": Action(
        slots={"to": PERSON, "text": MESSAGE},
        seen=[
            "tell {to} that {text}",
            "let {to} know that {text}",
            "text {to} that {text}",
            "text {to} saying {text}",
            "text {to}: {text}",
            "message {to} saying {text}",
            "message {to}: {text}",
            "send {to} a message saying {text}",
            "send a message to {to} saying {text}",
            "send {to} the text {text}",
            "write {to} a message that says {text}",
            "write to {to}: {text}",
            "I want to tell {to} that {text}.",
            "I'd like to text {to}: {text}.",
        ],
        unseen=[
            "send a text to {to} saying {text}",
            "send the message {text} to {to}",
            "write {to} that {text}",
            "shoot {to} a message saying {text}",
            "I want to let {to} know that {text}.",
        ],
    ),
    "call": Action(
        slots={"name": PERSON, "mode": CALL_MODE},
        seen=[
            "call {name}[ {mode}]",
            "call {name} now[ {mode}]",
            "call up {name}[ {mode}]",
            "phone {name}[ {mode}]",
            "ring {name}[ {mode}]",
            "dial {name}[ {mode}]",
            "give {name} a call[ {mode}]",
            "make a call to {name}[ {mode}]",
            "start a call with {name}[ {mode}]",
            "get {name} on the phone",
            "I want to talk to {name}[ {mode}].",
            "I need to call {name}[ {mode}].",
            "I'd like to speak with {name} on the phone.",
            "can I talk to {name}[ {mode}]?",
        ],
        unseen=[
            "give {name} a ring[ {mode}]",
            "place a call to {name}[ {mode}]",
            "make a phone call to {name}[ {mode}]",
            "connect me to {name}[ {mode}]",
            "I'd like to call {name}[ {mode}].",
            "I have to speak to {name}[ {mode}].",
        ],
    ),
    "navigate": Action(
        slots={"to": PLACE, "mode": TRAVEL},
        seen=[
            "navigate to {to}[ {mode}]",
            "take me to {to}[ {mode}]",
            "start navigation to {to}[ {mode}]",
            "give me directions to {to}[ {mode}]",
            "show me the way to {to}[ {mode}]",
            "find a route to {to}[ {mode}]",
            "find the fastest way to {to}[ {mode}]",
            "plan a trip to {to} {mode}",
            "bring me to {to}[ {mode}]",
            "how do I get to {to}[ {mode}]?",
            "what's the best way to {to}[ {mode}]?",
            "I want to go to {to}[ {mode}].",
            "I need to get to {to}[ {mode}].",
        ],
        unseen=[
            "guide me to {to}[ {mode}]",
            "get me directions to {to}[ {mode}]",
            "show me a route to {to}[ {mode}]",
            "what's the quickest route to {to}[ {mode}]?",
            "I'd like to travel to {to}[ {mode}].",
        ],
    ),
    "get_weather": Action(
        slots={"city": CITY, "day": DAY},
        seen=[
            "what's the weather in {city}[ {day}]?",
            "what's the weather like in {city}[ {day}]?",
            "what will the weather be {day} in {city}?",
            "how is the weather in {city}[ {day}]?",
            "how warm is it in {city}[ {day}]?",
            "will it rain in {city}[ {day}]?",
            "is it going to be sunny {day} in {city}?",
            "do I need an umbrella in {city}[ {day}]?",
            "tell me the weather in {city}[ {day}]",
            "give me the forecast for {city}[ {day}]",
            "check the weather for {city}[ {day}]",
            "show me the weather {day} for {city}",
            "I want the weather forecast for {city}[ {day}].",
        ],
        unseen=[
            "what's the forecast for {city}[ {day}]?",
            "how will the weather be in {city}[ {day}]?",
            "will it be cold in {city}[ {day}]?",
            "show me the forecast {day} for {city}",
            "I need the weather report for {city}[ {day}].",
        ],
    ),
    "translate": Action(
        slots={"text": PHRASE, "to": LANGUAGE},
        seen=[
            "translate {text} to {to}",
            "translate {text} into {to}",
            "translate into {to}: {text}",
            "translate the words {text} into {to}",
            "tell me how to say {text} in {to}",
            "teach me to say {text} in {to}",
            "say {text} in {to}",
            "put {text} into {to}",
            "how does one say {text} in {to}?",
            "how do I say {text} in {to}?",
            "how do you say in {to}: {text}?",
            "what's the {to} translation of {text}?",
            "I want to say {text} in {to}.",
            "I need the {to} translation of {text}.",
        ],
        unseen=[
            "translate the phrase {text} to {to}",
            "give me the {to} translation of {text}",
            "show me how to say {text} in {to}",
            "how would I say {text} in {to}?",
            "I'd like to know how to say {text} in {to}.",
        ],
    ),
}

# What may come before a request: a greeting before any, a courtesy before a command only.
LEAD_INS = {
    "seen": (["hey, ", "ok, ", "so, "], ["please ", "could you ", "can you ", "could you please "]),
    "unseen": (["hi, ", "hey, "], ["please ", "would you ", "can you please "]),
}


def fill(phrasing: str, action: Action, side: str, rng: random.Random) -> tuple[str, dict]:
    """One request in this phrasing, and the values it names in the order of the action's slots."""
    kept = re.sub(r"\[(.*?)\]", lambda part: rng.choice(["", part[1]]), phrasing)
    said: dict[str, str] = {}
    values: dict[str, Value] = {}
    for name, slot in action.slots.items():
        if "{" + name + "}" in kept:
            style = rng.choice(getattr(slot, side))
            said[name], values[name] = rng.choice(list(style.items()))
    return kept.format(**said), values


def dress(request: str, side: str, rng: random.Random) -> str:
    """The request as a person might put it: bare, with a lead-in, or typed with care."""
    mark = request[-1] if request[-1] in "?." else ""
    request = request.removesuffix(mark)
    if rng.random() < 0.35:
        greetings, courtesies = LEAD_INS[side]
        lead_in = rng.choice(greetings if mark else greetings + courtesies)
        request = lead_in + request
        if "you" in lead_in:
            mark = "?"
    if rng.random() < 0.3:
        request = request[0].upper() + request[1:] + (mark or ".")
    return request


def make_rows(split: str, taken: set[str], rng: random.Random) -> list[dict[str, str]]:
    """The rows of a split in random order, all actions and all phrasings of one equally often.

    `taken` holds the requests made so far, without their dress, and is added to: a validation row
    is never a training row with a new lead-in.
    """
    side = "unseen" if split == "test" else "seen"
    names = list(ACTIONS)
    rows = []
    while len(rows) < ROWS[split]:
        turn, index = divmod(len(rows), len(names))
        name = names[index]
        action = ACTIONS[name]
        phrasings = getattr(action, side)
        request, values = fill(phrasings[turn % len(phrasings)], action, side, rng)
        if request.lower() in taken:
            continue
        taken.add(request.lower())
        completion = json.dumps({"action": name, **values}, ensure_ascii=False)
        rows.append({"prompt": dress(request, side, rng), "completion": completion})
    rng.shuffle(rows)
    return rows


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(SEED)
    taken: set[str] = set()
    for split in ROWS:
        rows = make_rows(split, taken, rng)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"{split}.jsonl").write_bytes("".join(lines).encode("utf-8"))
        side = "unseen" if split == "test" else "seen"
        phrasings = sum(len(getattr(action, side)) for action in ACTIONS.values())
        print(f"{split}: {len(rows)} rows, {len(ACTIONS)} actions, {phrasings} {side} phrasings")


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else here / "quickstart")

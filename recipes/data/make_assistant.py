"""Write the assistant dataset: spoken requests and the one-line JSON actions they ask for.

    python recipes/data/make_assistant.py [FOLDER]

The rows come from the small grammar below. An action has slots, in the order of its JSON keys,
and phrasings in two sets. Training and validation rows are made of *seen* phrasings and slot
values only, test rows of *unseen* ones only: a test row is new in its wording and in every value
it names, except for closed slots (on and off, days, units), whose few values are shared. Open
slots have many values, each in a few rows at most, and the completion repeats what was said
verbatim, even times of day: the model has to learn to copy, not to recite.

To add an action, add an entry to ACTIONS. In a phrasing,
    {slot}    stands for a value of that slot,
    [...]     is said in two requests of five, and otherwise left out with the slots inside it,
    ? or .    at its end marks a sentence that cannot follow "could you"; all others can.
A phrasing never starts with a slot whose value is copied, as its first letter may be capitalized.
"""

import itertools
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SEED = 20240607
ROWS = {"train": 2000, "validation": 200, "test": 300}

Value = str | int | float
Style = dict[str, Value]  # what is said -> what the JSON holds


@dataclass(frozen=True)
class Slot:
    """The values of a slot, in styles: a draw picks a style, then one of its least used values."""

    seen: list[Style]
    unseen: list[Style]


@dataclass(frozen=True)
class Action:
    slots: dict[str, Slot]
    seen: list[str]
    unseen: list[str]


@dataclass(frozen=True)
class Pool:
    """Texts to copy, some for training and validation and some for the test rows."""

    seen: list[str]
    unseen: list[str]


def pool(seen: str, unseen: str) -> Pool:
    """Makes a pool from two texts with commas between the values."""
    return Pool(re.split(r",\s+", seen), re.split(r",\s+", unseen))


def combine(form: str, first: Pool, second: Pool) -> Pool:
    """Joins each value of `first` with a value of `second`, whose values take turns."""

    def join(ones: list[str], others: list[str]) -> list[str]:
        return [form.format(*pair) for pair in zip(ones, itertools.cycle(others), strict=False)]

    return Pool(join(first.seen, second.seen), join(first.unseen, second.unseen))


def text_slot(*pools: Pool) -> Slot:
    """Makes a slot of texts that are copied verbatim from the request; each pool is a style."""
    return Slot(
        [{value: value for value in each.seen} for each in pools],
        [{value: value for value in each.unseen} for each in pools],
    )


def number_slot(numbers: list[int | float], every: int) -> Slot:
    """Makes a slot of numbers in digits; one in `every` of them is kept for the test rows."""
    unseen = numbers[every // 2 :: every]
    seen = [number for number in numbers if number not in unseen]
    return Slot([{str(n): n for n in seen}], [{str(n): n for n in unseen}])


def closed_slot(style: Style) -> Slot:
    return Slot([style], [style])


# Clock times, copied as they are said: the phone's own date parser takes it from there. One time
# in seven is kept for the test rows, by a rule that leaves all hours, minutes and parts of the
# day in training, in other combinations: "7 am" is unseen, "7 pm" and "7:30 am" are seen.

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


def time_slot(*, tonight: bool) -> Slot:
    """Makes a slot of times as they are said, none of which leaves the half of the day open.

    So "10:20" is not said without "am" or "pm", while "09:20" and "19:20" are; and noon, "12 pm",
    is only said with minutes.
    """
    digits, whole, railway, words, quarters = (Pool([], []) for _ in range(5))
    for hour in range(5, 24):
        half = "am" if hour < 12 else "pm"
        name, next_name = HOURS[hour % 12], HOURS[(hour + 1) % 12]
        past = {15: f"quarter past {name}", 30: f"half past {name}", 45: f"quarter to {next_name}"}
        parts = [part for part, hours in DAY_PARTS.items() if hour in hours]
        if not tonight:
            parts = [part for part in parts if part != "tonight"]
        for minute in range(0, 60, 5):
            side = "unseen" if is_unseen_time(hour, minute) else "seen"
            if hour not in (10, 11, 12):
                getattr(railway, side).append(f"{hour:02}:{minute:02}")
            if minute:
                getattr(digits, side).append(f"{twelve_hour(hour)}:{minute:02} {half}")
            elif hour != 12:
                getattr(whole, side).append(f"{twelve_hour(hour)} {half}")
                getattr(words, side).extend(f"{name} {part}" for part in parts)
            if minute in past:
                getattr(quarters, side).extend(f"{past[minute]} {part}" for part in parts)
    # Common forms occur more often.
    return text_slot(digits, *[digits, whole, railway, words] * 2, quarters)


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

FIRST_NAMES = pool(
    """Anna, Ben, Maria, Omar, Lucy, Pedro, Ingrid, Tom, Yuki, Fatima, George, Chloe, Ravi, Sofia,
    Liam, Hannah, Mateo, Zoe, Ahmed, Julia, Viktor, Emily, Kwame, Rosa, Daniel, Siobhan,
    Bartholomew, Xiulan, Thandiwe, Bjorn, Kateryna, Giuseppe, Aisha, Nnamdi, Quentin, Leilani,
    Rashid, Eun-ji, Wolfgang, Philippa, Dmitri, Noor, Ezekiel, Camila, Tariq, Gwendolyn, Haruto,
    Ximena, Olaf, Ines, Jarek, Ottoline, Suresh, Beatriz, Cormac, Anjali, Hugo, Mireille, Faisal,
    Greta, Emeka, Pippa, Lorenzo, Svetlana, Idris, Marguerite, Jun, Abigail, Zoltan, Nkechi, Rupert,
    Dalia, Stellan, Bo, Valentina, Cyrus, Henrietta, Kofi, Agnes, Tuan, Delphine, Marek, Ama,
    Gustavo, Rowena, Hamid""",
    """Oscar, Priya, Helena, Samuel, Nadia, Felix, Amara, Dario, Keiko, Winston, Elif, Matthias,
    Adaeze, Rodrigo, Bridget, Sanjay, Freya, Leopold, Yasmin, Ian""",
)
SURNAMES = pool(
    """Patel, Novak, Garcia, Miller, Nguyen, Okonkwo, Fitzgerald, Yamamoto, Kowalski, Haddad,
    Lindqvist, Moreau, Castellanos, Abernathy, Petrov, Osei, Bianchi, Sharma, Whitlock, Jensen,
    Papadakis, Kimura, Delgado, Thornbury, Farouk, Vandenberg, Mbeki, Ozturk, Gallagher, Silva,
    Rasmussen, Chaudhry, Horvat, Pemberton, Ito, Villanueva, Ashworth, Diallo, Krueger, Lee,
    Montgomery, Popescu, Salazar, Winterbottom, Achebe, Brodsky, Eklund, Marchetti, Tran, Quigley,
    Rutherford, Suleiman, Takeda, Underhill, Weiss, Zielinski, Bhatt, Crawford, Dubois, Everly""",
    """Lind, Okafor, Hernandez, Blackwood, Tanaka, Romano, Schneider, Mahmoud, Sinclair, Larsen,
    Banerjee, Costa, Whitaker, Kaplan, Mercer""",
)
PERSON_TITLES = ["Doctor", "Mr", "Mrs", "Aunt", "Uncle", "Coach", "Professor"]
ROLES = pool(
    """Mum, Dad, Grandma, Aunt Clara, Uncle Joe, Grandpa Louis, my sister, my boss, my landlord,
    my cousin, my uncle, my teacher, my neighbour, my roommate, my wife, my lawyer, my daughter,
    the babysitter, the plumber, the dentist, the vet, the florist, the gardener, the caretaker,
    the hotel, the bakery, the pharmacy, the mechanic, the office, the tailor, the piano teacher,
    the travel agent, the locksmith, the front desk, the school""",
    """Grandpa Max, my brother, the electrician, Uncle Pete, my aunt, the carpenter, the barber,
    my husband, my son, the insurance company""",
)
PERSON = text_slot(
    FIRST_NAMES,
    FIRST_NAMES,
    ROLES,
    combine("{1} {0}", SURNAMES, Pool(PERSON_TITLES, PERSON_TITLES)),
)
ROOM = text_slot(
    pool(
        """kitchen, living room, hallway, bathroom, guest bathroom, dining room, office, garage,
        home office, attic, basement, laundry room, nursery, playroom, studio, library, pantry,
        conservatory, upstairs hall, guest room, master bedroom, kids' room, winter garden,
        entrance hall, workshop, music room, wine cellar, downstairs toilet, spare room, porch,
        reading corner, sewing room, cinema room, green room, mud room, boiler room, staircase,
        tea room, meeting room, east wing, front parlour, gym, sauna, gallery, lobby, stables,
        back kitchen, tower room, orangery, art studio, dressing room, drawing room, carport,
        server room, tool shed, summer kitchen, blue bedroom, corner office, waiting room, foyer,
        greenhouse, first floor landing, veranda, cellar, chapel, dormitory, changing room, cabin,
        classroom, storage room, tea house, rear terrace, recording booth, yoga room, bunk room,
        archive, ballroom, snug, family room, potting shed, balcony, courtyard, rehearsal room""",
        """bedroom, study, games room, sun room, billiard room, cloakroom, craft room, loft,
        utility room, downstairs hall, breakfast nook, walk-in closet, west wing, lounge, barn,
        piano room, red bedroom, canteen""",
    )
)
DEVICE = text_slot(
    pool(
        """coffee machine, ceiling fan, kettle, radio, dishwasher, washing machine, air purifier,
        heater, humidifier, garden sprinkler, electric blanket, vacuum robot, oven, TV, jukebox,
        bread maker, fish tank pump, projector, printer, wifi router, towel rail, game console,
        extractor fan, hot water boiler, security camera, slow cooker, floor lamp, speaker, grill,
        waffle iron, popcorn machine, juicer, freezer, ice maker, wine fridge, blender, hot plate,
        disco ball, lava lamp, night light, porch lantern, doorbell, intercom, alarm system, drill,
        garden fountain, pond filter, hot tub, patio heater, string lights, neon sign, turntable,
        amplifier, subwoofer, karaoke machine, keyboard, laser printer, scanner, monitor, server,
        paper shredder, sewing machine, steam iron, hair straightener, treadmill, exercise bike,
        rowing machine, massage chair, heat lamp, incubator, terrarium light, pet feeder, aquarium,
        bird bath heater, lawn robot, water softener, heat pump, fireplace, underfloor heating,
        yoghurt maker, pizza oven, deep fryer, egg boiler, pressure cooker, milk frother, mixer,
        window fan, mosquito lamp, weather station, telescope mount, kiln, band saw, vaporizer""",
        """rice cooker, tumble dryer, toaster, pool pump, desk fan, dehumidifier, christmas tree,
        baby monitor, espresso maker, sound bar, outdoor heater, laptop charger, bedside lamp,
        microwave, sandwich press, air conditioner, record player, stair light, cooker hood""",
    )
)
DOOR = text_slot(
    pool(
        """front door, back door, garage door, garden gate, cellar door, shed, side entrance, car,
        patio door, balcony door, bike locker, main gate, office door, kitchen door, tool cabinet,
        basement window, greenhouse, guest house door, roof hatch, storage room, mailbox, safe,
        parcel box, workshop door, attic door, chicken coop, stable door, barn door, gun cabinet,
        wine cellar, filing cabinet, jewellery box, trunk, van, truck, boat cabin, caravan, locker,
        gym locker, archive room, server rack, fire exit, loading dock, turnstile, cargo bike,
        kids' room window, bathroom window, skylight, cat flap, dog kennel, rabbit hutch, piano,
        tower gate, north gate, upper gate, lobby door, lift, staff entrance, delivery hatch, shop,
        fridge, drinks cabinet, china cabinet, cash drawer, desk drawer, toy chest, treasure chest,
        mower shed, generator room, boiler room, pantry door, sliding door, revolving door, vault,
        conservatory door, studio door, music room, treehouse, playhouse, coal bunker, tack room,
        scooter, motorbike, tractor, trailer, ski box, roof box, charging port, fuel cap, annexe""",
        """side gate, porch door, laundry door, boat house, medicine cabinet, summer house,
        wardrobe, driveway gate, camper van, terrace door, pool gate, bike shed, cottage door,
        east entrance, hallway closet, bedroom window, display case, hangar""",
    )
)
MESSAGE = text_slot(
    pool(
        """I'm running late, dinner is ready, the train is delayed, I'll be home soon, we won,
        we need more coffee, the meeting moved to Monday, I found your keys, we saved you a seat,
        the kids are asleep, I can't make it tonight, the parcel arrived, I'm almost there, hurry,
        the stairs are wet, the car is fixed, the baby is smiling, I miss you, I got the job,
        the tickets are booked, it's raining here, my phone is nearly dead, I left the keys inside,
        the cake was delicious, we should talk, the dog is fine, practice is cancelled, I'm proud,
        the wifi is back, we are at the beach, lunch is on me, I parked behind the school,
        the doctor said yes, I need your advice, snow is coming, the roof leaks again, he said no,
        grandma baked biscuits, the goats escaped, my knee hurts, the lecture was dull,
        I forgive you, the visa came through, our team scored twice, the heating broke,
        she speaks Portuguese, the marmalade is finished, nobody answered, the museum is free today,
        I found a kitten, the plumber never came, we changed hotels, the surgery went well,
        your order is wrong, the ferry was cancelled, the exam is postponed, I sold the piano,
        we have a puncture, my glasses broke, the gate code changed, everyone loved the soup,
        the choir sang beautifully, the landlord agreed, we ran out of diesel, I lost my wallet,
        the tomatoes are ripe, the photos turned out great, I'm bringing salad, he snores,
        the queue is endless, the pharmacy was shut, I booked a table,
        the mountain is hidden by clouds, it works now, my cousin got engaged, the printer jammed,
        we spotted a dolphin, the lift is stuck, they offered a refund, I finished the book,
        the fireworks start soon, you were right""",
        """I missed the bus, the pizza is here, we are out of bread, the flight landed early, I won,
        I'm stuck in traffic, the concert was amazing, I'll bring dessert, the shop is closed,
        the baby is awake, we moved the sofa, I passed the exam, grandpa feels better,
        the bridge is closed, my bike was stolen, the soup is too salty, we adopted a puppy""",
    )
)
ITEM = text_slot(
    pool(
        """oat milk, eggs, bread, olive oil, paper towels, tomatoes, batteries, dog food, rice,
        a birthday card, green apples, toothpaste, sunscreen, two lemons, candles, brown sugar,
        sparkling water, dish soap, a phone charger, wrapping paper, bananas, cheddar cheese,
        a warm sweater, three onions, orange juice, hiking socks, peanut butter, light bulbs,
        a board game, matches, frozen peas, salt, baking powder, a rain jacket, cat litter, salsa,
        paper plates, a sleeping bag, balloons, black tea, cardamom, pumpernickel, a corkscrew,
        rhubarb, insect spray, a can opener, tofu, maple syrup, anchovies, quinoa, radishes, figs,
        a harmonica, silver ribbon, four mangoes, chickpeas, a cast iron pan, pomegranates, fennel,
        goat cheese, horseradish, smoked paprika, dental floss, a jigsaw puzzle, tent pegs, rope,
        a first aid kit, flour, halloumi, bicycle tubes, ginger ale, a teapot, sauerkraut, turmeric,
        raisins, plasters, hazelnuts, a dozen bagels, kimchi, vinegar, sweet potatoes, a yoga mat,
        chopsticks, bin bags, artichokes, a wooden spoon, lip balm, pistachios, marshmallows, ice,
        a cookbook, tracing paper, blue ink, miso paste, woolly hats, a kite, lavender soap""",
        """almond butter, carrots, a water bottle, shampoo, six limes, red wine, swimming goggles,
        garlic, a picture frame, coconut milk, napkins, wool mittens, blueberry jam, cinnamon,
        a flashlight, pickled beets, parsley, a chess set, cranberries""",
    )
)
TASK = text_slot(
    pool(
        """water the plants, call the bank, take out the trash, feed the cat, pay the rent, stretch,
        pick up the laundry, buy stamps, walk the dog, take my medicine, charge the car, floss,
        book a haircut, return the library books, send the invoice, defrost the chicken, vote,
        renew my passport, clean the oven, check the mail, back up my laptop, iron a shirt,
        email the teacher, order new glasses, move the car, turn the compost, drink water,
        cancel the gym membership, sign the permission slip, vacuum the stairs, wish Lucy luck,
        descale the kettle, prune the roses, rehearse my speech, empty the dishwasher, fast,
        update my resume, polish the trumpet, rotate the tyres, hang the curtains, file my taxes,
        wax the skis, mend the fence, pack my suitcase, soak the lentils, dust the chandelier,
        phone the vet, fertilize the orchids, bleed the radiators, thaw the berries, tune the cello,
        buy concert tickets, unclog the drain, proofread the essay, visit grandma, rinse the jars,
        wash the curtains, apply for the visa, knead the dough, insure the scooter, paint the shed,
        rake the leaves, replace the smoke alarm, scrub the bathtub, weigh the puppy, stir the soup,
        sew on the button, reply to Ingrid, shut the windows, plant the tulips, archive old photos,
        fold the towels, collect the kids, feed the sourdough, text Mateo, pay the parking fine,
        lubricate the hinges, shovel the snow, reserve a campsite, trim my beard, study chemistry,
        frame the poster, learn my lines, swap the filters, renew the insurance,
        lock the archive""",
        """sweep the balcony, pay the electricity bill, bake a cake, thank the neighbours, meditate,
        oil the bike, collect the parcel, change the bed sheets, print the tickets, tidy up,
        measure the windows, sharpen the knives, buy new socks, mow the lawn, wash the car,
        fix the doorbell, peel the potatoes, call the insurance""",
    )
)
OCCASIONS = pool(
    """lunch, dinner, coffee, a meeting, drinks, a walk, tea, brunch, tennis, a call, chess,
    a film night, an interview""",
    """breakfast, a picnic, badminton, a workout, supper""",
)
EVENT = text_slot(
    pool(
        """choir practice, yoga class, book club, football training, movie night, church, brunch,
        piano practice, parents' evening, date night, swimming lessons, band rehearsal, chess club,
        Emily's birthday party, board game night, pottery class, Spanish class, jury duty, ballet,
        Leo's school play, spring cleaning, Mum's retirement dinner, physiotherapy, rugby match,
        marathon training, team meeting, dentist appointment, opera night, driving lesson, judo,
        flu shot, budget review, garden party, blood donation, archery, Greek evening, fencing,
        job interview, car inspection, photo shoot, salsa night, astronomy lecture, Zumba, regatta,
        Kofi's graduation, Greta's housewarming, Ravi's christening, quarterly audit, hen party,
        first aid course, bike repair workshop, museum tour, poetry slam, life drawing, curling,
        beekeeping course, harvest festival, charity auction, fire drill, tax appointment,
        yard sale, baby shower, sprint planning, school concert, ferry trip, cheese tasting,
        quiz night, eye exam, night shift, barbecue, origami class, street festival, haircut,
        silent retreat, Tom's leaving drinks, volleyball, board meeting, vaccination, improv show,
        pub crawl""",
        """dance class, hockey training, wedding rehearsal, karate, family lunch, wine tasting,
        debate club, Nadia's farewell party, guitar lesson, product launch, book fair, polo,
        choir concert, Felix's birthday dinner, staff meeting, cooking class""",
    ),
    combine("{1} with {0}", FIRST_NAMES, OCCASIONS),
)
CHORE = text_slot(
    pool(
        """pasta, omelette, rice, tea, bread, cake, pizza, laundry, potato gratin, lasagna, workout,
        nap, chicken soup, reading session, homework, cookie dough, banana bread, roast beef, steak,
        green tea, meditation, pie crust, warm-up, face mask, apple crumble, vegetable curry, egg,
        hair dye, noodles, porridge, dumplings, turkey, meringue, goulash, paella, yoghurt, jam,
        focaccia, kombucha, tart, brownies, scones, lentil stew, baked beans, pork belly, muffins,
        fish fingers, sweet potatoes, asparagus, polenta, couscous, tempura, moussaka, chutney,
        cheesecake, gingerbread, duck, ham, trout, mussels, popcorn, waffles, fondue, marinade,
        plank, stretching, bath, shower, foot soak, parking meter, dishwasher, sprinkler, kiln,
        glue, varnish, paint coat, plaster cast, speech, presentation, chess move, spelling test,
        exam, interview, violin practice, video call, time out, power nap, ice pack, board game,
        darkroom bath, science experiment, tyre pump, soldering iron, debate round, sprint""",
        """ramen, salmon, coffee, risotto, onion soup, break, quiche, pancake batter, hair mask,
        garlic bread, cello practice, bean stew, apple pie, broccoli, quiz round, piano lesson,
        roast chicken, tortillas""",
    )
)
TITLE = text_slot(
    pool(
        """Clair de Lune, Moonlight Sonata, Paper Boats, Silver Rain, The Blue Danube, Bolero,
        Midnight Train, Für Elise, Golden Hour Waltz, Slow River, Dancing Lanterns, Ode to Joy,
        Four Seasons, Neon Garden, Swan Lake, Letters from Home, Sugar and Smoke, Hungarian Dance,
        Winter Sun, Electric Meadow, Morning Mood, The Long Way Back, Cherry Street, Velvet Sky,
        Ave Maria, Rooftop Summer, Canon, Hollow Trees, Ride of the Valkyries, Little Lighthouse,
        Gymnopedie, Wild Honey Blues, Ten Thousand Kites, Nocturne, Carnival of the Animals,
        Finlandia, Jupiter, Danse Macabre, La Campanella, Liebestraum, The Swan, Peer Gynt,
        Scheherazade, Ghost Ferry, Tangerine Afternoon, Broken Compass, Kerosene, Barefoot Parade,
        Wolf Moon Lullaby, Ultramarine, The Clockmaker, Snowfall Tango, Dust and Diamonds,
        Plum Blossom, Quicksilver, Harvest Gold, Lemon Tree Lane, Seven Bridges, Mountain Telegraph,
        Zigzag, Sleepless Harbour, Tin Soldier March, The Baker's Daughter, Crimson Umbrella,
        Hey Margarita, Orbit, Static Bloom, Pigeons, Feather and Stone, The Wrong Airport,
        Bicycle Thief, Starling, Caravan of Salt, Old Oak Hymn, Firefly Motel, Radio Antarctica,
        Violet Hours, Kingfisher, Elephant Parade, Slow Dancing Robots, Sapphire,
        Whistle for the Tide, Oxbow, Dandelion Clock, Runaway Piano, Blackbird Hill,
        Twelve White Horses, Nightingale, Cinnamon Road, Vertigo Waltz, Polaris""",
        """The Nutcracker, Copper Moon, Glass Harbour, Flight of the Bumblebee, Saturday Rain,
        Marble Steps, Echo Lane, Turkish March, The Last Ferry, Campfire Stars, Requiem, Green Door,
        Hummingbird, Silent Carousel, Maple Leaf Rag, The Lost Suitcase, Thunder Valley""",
    )
)
ARTIST = text_slot(
    pool(
        """The Paper Foxes, Northern Lanterns, The Velvet Owls, Luna Park, Big Tin Orchestra, Kito,
        The Harbour Lights, DJ Pepper, Blue Canary, The Midnight Gardeners, Cactus Club, Oleander,
        Hazel and the Wolves, Tin Roof Trio, Winterbourne Quartet, Marigold, Stonefruit, Papaya,
        The Old Town Strings, Little Engine, Grand River Philharmonic, Sixpence Radio, Mangrove,
        The Iron Violets, Low Tide Brass Band, Zephyr, Kilimanjaro Sound, The Quiet Ones, Obsidian,
        Apricot Summer, The Lighthouse Keepers, Polar Choir, MC Juniper, Thistle, Velvet Antlers,
        Concrete Swans, The Borrowed Bicycles, Aurora String Band, Bonfire Saints, Yellow Tram""",
        """The Copper Kettles, Paper Planets, The Sunday Drivers, Tamarind, Silver Birch Choir,
        Moss and Maple, Cobalt, Eastside Symphony, The Glass Sparrows, DJ Walnut""",
    ),
    combine("{} {}", FIRST_NAMES, SURNAMES),
)
CITIES = pool(
    """Paris, London, Oslo, Madrid, New York, Tokyo, Cairo, San Francisco, Berlin, Lima, Toronto,
    Cape Town, Mumbai, Rio de Janeiro, Prague, Seoul, Nairobi, Athens, Vienna, Los Angeles, Bath,
    Reykjavik, Buenos Aires, Dublin, Hanoi, Salt Lake City, Warsaw, Istanbul, Sydney, Quebec, Rome,
    Casablanca, Mexico City, Helsinki, Manila, Edinburgh, Boston, Saint Petersburg, Accra, Ghent,
    Antananarivo, Thessaloniki, Utrecht, Ulaanbaatar, Gdansk, Valparaiso, Dar es Salaam, Bilbao,
    Chiang Mai, Gothenburg, Tbilisi, Albuquerque, Nagasaki, Winnipeg, Guadalajara, Bratislava,
    Turku, Ho Chi Minh City, Samarkand, Leipzig, Perth, Minneapolis, Montevideo, Krakow,
    Addis Ababa, Osaka, Christchurch, Bordeaux, Dubrovnik, Kathmandu, Johannesburg, Nice, Ljubljana,
    Port Louis, Doha, Cincinnati, Rotterdam, Vladivostok, Tromso, Bangalore, Santiago, Windhoek,
    Palermo, Baltimore, Nuremberg, Kinshasa, Anchorage, Sarajevo, Phnom Penh, Cork, Yokohama,
    Curitiba, Zagreb, Omaha, Tashkent, Porto, Luang Prabang, Wellington, Aberdeen, San Juan, Odense,
    Montpellier, Tunis""",
    """Lisbon, Kyoto, New Orleans, Zurich, Bogota, Stockholm, Tel Aviv, Melbourne, Santa Fe,
    Budapest, Marrakesh, Vancouver, Kuala Lumpur, Florence, Jakarta, Lagos, Pittsburgh, Vilnius""",
)
CITY = text_slot(CITIES)
STREET_KINDS = ["Street", "Avenue", "Road", "Lane", "Square", "Court", "Drive"]
PLACE = text_slot(
    pool(
        """the train station, the nearest pharmacy, the airport, City Hall, the football stadium,
        Riverside Park, my office, the library, the Italian restaurant, Saint Mary's Hospital,
        the botanical garden, Pine Bay, the next petrol station, Hillcrest School, the beach,
        the science museum, Baker's Corner, the post office, Union Bridge, the swimming pool,
        North Gate Mall, the farmers' market, Lake View Hotel, the closest supermarket, the zoo,
        the concert hall, the ice rink, Cedar Grove, Trinity College, the nearest hospital, home,
        the ferry terminal, Granite Falls, the car wash, the courthouse, the town hall, Fort Amber,
        the nearest cash machine, the French embassy, Blackrock Lighthouse, the vet, the aquarium,
        the old mill, Orchard Shopping Centre, the skate park, Heron Lake, the hardware store,
        the Thai restaurant, Palace Cinema, the cathedral, the ski lift, the recycling centre""",
        """the bus terminal, the nearest bakery, Castle Hill, the opera house, the gym, Pier Nine,
        the clinic, Kingsway Theatre, the garden centre, the campus, Maple Park, the art gallery,
        the Greek restaurant""",
    ),
    combine("{} {}", SURNAMES, Pool(STREET_KINDS, STREET_KINDS)),
    CITIES,
)
PHRASE = text_slot(
    pool(
        """good morning, thank you, where is the station, the bill please, I am lost, good night,
        how much is this, nice to meet you, I love you, see you tomorrow, where are the toilets,
        happy new year, I don't understand, it is late, a table for two, excuse me, cheers, thunder,
        my name is Tom, the food is great, I need a doctor, can you help me, one ticket, welcome,
        we are on holiday, turn left here, how are you, a cup of coffee, congratulations, horse,
        it is too far, I am vegetarian, happy birthday, my room is cold, umbrella, apple juice,
        the shower is broken, where is the museum, I work here, this is my wife, merry christmas,
        a glass of milk, is this seat free, tomorrow morning, fresh fish, mushroom, get well soon,
        without sugar please, call the police, the train is full, what time is it, spoon, good luck,
        I have a fever, the moon is bright, safe travels, snowflake, no problem, the last bus, fork,
        I like your hat, we need a taxi, squirrel, four tickets please, it smells wonderful, candle,
        the door is locked, who are you, please speak slowly, cold water, left or right, strawberry,
        are you married, my friend is ill, happy anniversary, the museum is shut, dragonfly, bridge,
        sleep well, I lost my passport, how far is the airport, yesterday, bon voyage, lighthouse,
        the view is lovely, can I pay by card, hot chocolate, you are very kind, be careful, ladder,
        I play the guitar, wait a moment, fire, where do you live, it was a pleasure,
        brown bread""",
        """good evening, where is the hotel, I am hungry, goodbye, how old are you, two beers,
        sorry, the weather is beautiful, do you speak English, my bag is gone, have a nice day,
        butterfly, keep the change, the soup is cold, window, I am tired, happy easter,
        red shoes""",
    )
)
LANGUAGE = text_slot(
    pool(
        """French, Spanish, German, Japanese, Arabic, Hindi, Polish, Dutch, Korean, Turkish,
        Swahili, Greek, Swedish, Russian, Hebrew, Thai, Brazilian Portuguese, Mandarin Chinese,
        Czech, Zulu, Norwegian, Bengali, Irish, Hungarian, Swiss German, Latin, Romanian, Tamil,
        Cantonese, Urdu, Amharic, Yoruba, Igbo, Hausa, Somali, Malay, Tagalog, Khmer, Lao, Burmese,
        Nepali, Sinhala, Punjabi, Gujarati, Marathi, Telugu, Kannada, Malayalam, Georgian, Armenian,
        Azerbaijani, Kazakh, Uzbek, Mongolian, Tibetan, Pashto, Kurdish, Bulgarian, Serbian,
        Slovenian, Slovak, Lithuanian, Latvian, Estonian, Albanian, Macedonian, Belarusian, Maltese,
        Basque, Galician, Scottish Gaelic, Luxembourgish, Faroese, Afrikaans, Xhosa, Hawaiian,
        Maori, Samoan, Quechua, Guarani, Esperanto, Yiddish, Sanskrit, Mexican Spanish,
        Haitian Creole, Breton, Javanese""",
        """Italian, Finnish, Vietnamese, Danish, Persian, Ukrainian, Welsh, Icelandic, Catalan,
        Canadian French, Indonesian, Croatian""",
    )
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
        seen=[  # half of the requests name what is timed
            "set a timer for {amount} {unit}",
            "set a timer of {amount} {unit}[ for the {name}]",
            "set a timer for the {name}, {amount} {unit}",
            "set the {name} timer to {amount} {unit}",
            "start a timer for {amount} {unit}[ for the {name}]",
            "start counting {amount} {unit}",
            "start a countdown for {amount} {unit}",
            "start the {name} timer with {amount} {unit}",
            "time the {name} for {amount} {unit}",
            "time {amount} {unit} for me",
            "run a countdown of {amount} {unit}",
            "give me {amount} {unit}[ for the {name}]",
            "put {amount} {unit} on the clock[ for the {name}]",
            "I need a timer for {amount} {unit}.",
            "I need {amount} {unit} for the {name}.",
            "the {name} takes {amount} {unit}, start a timer.",
        ],
        unseen=[
            "create a timer for {amount} {unit}",
            "run the {name} timer for {amount} {unit}",
            "run a timer for {amount} {unit}[ for the {name}]",
            "begin a countdown of {amount} {unit}",
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
            "send {to} a text that says {text}",
            "write {to} that {text}",
            "shoot {to} a message saying {text}",
            "I want to let {to} know that {text}.",
        ],
    ),
    "call": Action(
        slots={"name": PERSON, "mode": CALL_MODE},
        seen=[
            "call {name}[ {mode}]",
            "set up a call with {name}[ {mode}]",
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
            "set up a phone call with {name}[ {mode}]",
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

# What may precede a request: a greeting before any, a courtesy only before a command.
LEAD_INS = {
    "seen": (["hey, ", "ok, ", "so, "], ["please ", "could you ", "can you ", "could you please "]),
    "unseen": (["hi, ", "hey, "], ["please ", "would you ", "can you please "]),
}


def fill(
    phrasing: str, action: Action, side: str, used: Counter[str], rng: random.Random
) -> tuple[str, dict[str, Value]]:
    """Returns a request in this phrasing, and the values it names, in the order of the slots.

    `used`, which this updates, counts how often each value was said so far, in any action.
    """
    kept = re.sub(r"\[(.*?)\]", lambda part: part[1] if rng.random() < 0.4 else "", phrasing)
    said: dict[str, str] = {}
    values: dict[str, Value] = {}
    for name, slot in action.slots.items():
        if "{" + name + "}" in kept:
            style = rng.choice(getattr(slot, side))
            least = min(used[text] for text in style)
            said[name] = rng.choice([text for text in style if used[text] == least])
            values[name] = style[said[name]]
            used[said[name]] += 1
    return kept.format(**said), values


def dress(request: str, side: str, rng: random.Random) -> str:
    """Returns the request as a person might put it: bare, with a lead-in, or typed with care."""
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


def make_rows(
    actions: dict[str, Action],
    side: str,
    count: int,
    taken: set[str],
    rng: random.Random,
    completion: Callable[[str, dict[str, Value]], dict[str, Value]],
) -> list[dict[str, str]]:
    """Returns `count` rows in random order: all actions and all phrasings of one equally often.

    `taken`, which this updates, holds the bare requests made so far: a validation row is never a
    training row with a new lead-in. `completion` makes the JSON object from an action's name and
    values.
    """
    names = list(actions)
    rows = []
    used: Counter[str] = Counter()
    while len(rows) < count:
        turn, index = divmod(len(rows), len(names))
        name = names[index]
        action = actions[name]
        phrasings = getattr(action, side)
        request, values = fill(phrasings[turn % len(phrasings)], action, side, used, rng)
        if request.lower() in taken:
            continue
        taken.add(request.lower())
        answer = json.dumps(completion(name, values), ensure_ascii=False)
        rows.append({"prompt": dress(request, side, rng), "completion": answer})
    rng.shuffle(rows)
    return rows


def write_splits(
    folder: Path,
    actions: dict[str, Action],
    rows: dict[str, int],
    completion: Callable[[str, dict[str, Value]], dict[str, Value]],
) -> None:
    """Writes one file for each split; test rows use unseen phrasings and values."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(SEED)
    taken: set[str] = set()
    for split, count in rows.items():
        side = "unseen" if split == "test" else "seen"
        made = make_rows(actions, side, count, taken, rng, completion)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in made]
        (folder / f"{split}.jsonl").write_bytes("".join(lines).encode("utf-8"))
        phrasings = sum(len(getattr(action, side)) for action in actions.values())
        print(f"{split}: {count} rows, {len(actions)} actions, {phrasings} {side} phrasings")


def main(folder: Path) -> None:
    write_splits(folder, ACTIONS, ROWS, lambda name, values: {"action": name, **values})


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else here / "assistant")
